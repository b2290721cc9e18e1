"""Adam (arXiv 1412.6980): descent by steps whose size does not depend on that of the derivatives."""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Adam"]

_FIRST: Final = 0.9
_SECOND: Final = 0.99  # some hundred steps are all there are
_EPSILON: Final = 1e-12

Floats = NDArray[np.float32]


class Adam:
    """Changes arrays, by name, in place.

    Args:
        values: the arrays.
        sizes: of a step of each, in units of the rate.

    Attributes:
        count: steps that were taken.
    """

    def __init__(self, values: Mapping[str, Floats], sizes: Mapping[str, float]) -> None:
        self._values, self._sizes = values, sizes
        self._first = {name: np.zeros_like(value) for name, value in values.items()}
        self._second = {name: np.zeros_like(value) for name, value in values.items()}
        self.count = 0

    def step(self, gradients: Mapping[str, Floats], rate: float) -> None:
        """One step down; the gradients are 0 afterwards. A value whose gradient was always 0 stays as it is."""
        self.count += 1
        rate *= (1 - _SECOND**self.count) ** 0.5 / (1 - _FIRST**self.count)
        for name, value in self._values.items():
            gradient, first, second = gradients[name], self._first[name], self._second[name]
            first += (1 - _FIRST) * (gradient - first)
            second += (1 - _SECOND) * (gradient * gradient - second)
            value -= rate * self._sizes[name] * first / (np.sqrt(second) + _EPSILON)
            gradient[...] = 0
