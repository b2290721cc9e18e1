"""What `save_state` gives: tokens and what is computed of them. It is data, and nothing of it is ever run."""

import io
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import CacheError

__all__ = ["LlamaState"]

_ARRAYS: Final = {"input_ids": "i4", "scores": "f4", "llama_state": "u1", "numbers": "i8"}


@dataclass(eq=False)
class LlamaState:
    """A model's state after some tokens.

    Attributes:
        input_ids: int32 [context], of which the first `n_tokens` count.
        scores: float32 [n_tokens, vocabulary], or [0, vocabulary] of a model without `logits_all`.
        n_tokens: tokens that are computed.
        llama_state: keys and values of whole pages of them, as `LLM.save_cache` writes them; may be empty.
        llama_state_size: bytes of it.
        seed: of chance.
    """

    input_ids: NDArray[np.intc]
    scores: NDArray[np.single]
    n_tokens: int
    llama_state: bytes
    llama_state_size: int
    seed: int

    @property
    def ids(self) -> list[int]:
        """The tokens that count."""
        found: list[int] = self.input_ids[: self.n_tokens].tolist()
        return found

    def to_bytes(self) -> bytes:
        """The same as a file, NumPy's .npz without pickled objects."""
        file = io.BytesIO()
        state = np.frombuffer(self.llama_state, np.uint8)
        numbers = np.array([self.n_tokens, self.seed], np.int64)
        np.savez(file, input_ids=self.input_ids, scores=self.scores, llama_state=state, numbers=numbers)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "LlamaState":
        """What `to_bytes` gave. Raises CacheError for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = {name: file[name] for name in _ARRAYS}
            if any(array.dtype != np.dtype(_ARRAYS[name]) for name, array in arrays.items()):
                raise ValueError
            n_tokens, seed = (int(number) for number in arrays["numbers"])
            input_ids, scores, state = (arrays[name] for name in ("input_ids", "scores", "llama_state"))
            if input_ids.ndim != 1 or scores.ndim != 2 or not 0 <= n_tokens <= len(input_ids):
                raise ValueError
        except Exception:  # whatever NumPy and zipfile make of bytes that may be anything
            raise CacheError("this is no saved state of a Llama; make one with save_state") from None
        return cls(input_ids, scores, n_tokens, state.tobytes(), state.size, seed)
