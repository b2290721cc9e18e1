"""Typed access to config.json: what is there is checked, what is not has a default or is asked for by name."""

from collections.abc import Mapping
from typing import Any

from phiquant.errors import CheckpointError

__all__ = ["MAX_LAYERS", "MAX_VOCABULARY", "Fields", "short"]

# far beyond any model; tables of this many tokens or layers are made before a tensor is looked at
_MAX_DIMENSION, MAX_VOCABULARY, MAX_LAYERS = 2**24, 2**20, 4096


class Fields:
    """Typed access to config.json, or to its rope part with the top level behind it."""

    def __init__(self, values: Mapping[str, Any], outer: Mapping[str, Any] | None = None) -> None:
        self.values = values
        self._outer = outer or {}

    def rope(self) -> "Fields":
        """The rope part: rope_scaling of the older style if it is set, else rope_parameters; empty if neither."""
        part = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        if not isinstance(part, dict):
            raise CheckpointError("config.json: rope_parameters or rope_scaling is not an object.")
        return Fields(part, self.values)

    @property
    def kind(self) -> object:
        """What a rope part calls its scaling: rope_type, or the older type; None or "default" for none."""
        return self.values.get("rope_type", self.values.get("type"))

    def _get(self, key: str, top: bool) -> object:
        value = self.values.get(key)
        return self._outer.get(key) if value is None and top else value

    def count(self, key: str, default: int | None = None, *, top: bool = False, most: int = _MAX_DIMENSION) -> int:
        """A whole number from 1 to `most`; with `top` it may stand outside of the rope part."""
        value = self._get(key, top)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json lacks {key}.")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise CheckpointError(f"config.json: {key} is {short(value)}, not a whole number from 1 to {most:,}.")
        return value

    def number(self, key: str, default: float, *, top: bool = False, most: float = 1e30) -> float:
        """A number above 0; `top` as for `count`."""
        value = self._get(key, top)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            raise CheckpointError(f"config.json: {key} is {short(value)}, not a positive number of at most {most:g}.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {short(value)}, not true or false.")
        return value

    def factors(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != count:
            found = f"has {len(value)} entries" if isinstance(value, list) else "is not a list"
            raise CheckpointError(
                f"config.json: {key} {found}; LongRoPE needs {count}, one for each pair of rotated channels."
            )
        for factor in value:
            if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 1e30:
                raise CheckpointError(f"config.json: {key} holds {short(factor)}, not a positive number.")
        return tuple(float(factor) for factor in value)


def short(value: object) -> str:
    """A value as a message shows it."""
    return repr(value)[:60]
