"""Embeddings: hidden states after the last norm, pooled as the constructor was told."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phiquant.compat.llama_cpp import constants as c
from phiquant.compat.llama_cpp.core import Core
from phiquant.compat.llama_cpp.llama_types import CreateEmbeddingResponse
from phiquant.compat.llama_cpp.refusals import ArgumentError, StateError
from phiquant.engine import Sequence as Job

__all__ = ["Embeds"]


class Embeds(Core):
    """A `Core` that embeds texts.

    Attributes:
        model_path: of the file, which is the name of the model in results.
    """

    model_path: str
    _embedding: bool
    _pooling: int

    def create_embedding(self, input: str | list[str], model: str | None = None) -> CreateEmbeddingResponse:
        """Embed texts, in OpenAI's shape; see `embed`."""
        texts = input if isinstance(input, list) else [input]
        vectors, tokens = self.embed(texts, return_count=True)
        return {
            "object": "list",
            "data": [{"object": "embedding", "embedding": vector, "index": i} for i, vector in enumerate(vectors)],
            "model": self.model_path if model is None else model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def embed(
        self, input: str | list[str], normalize: bool = False, truncate: bool = True, return_count: bool = False
    ) -> Any:
        """Vectors of texts: a list of numbers for each, or without pooling one for each of its tokens.

        Args:
            input: a text, whose vector comes alone, or a list of texts.
            normalize: give vectors the length 1.
            truncate: read `n_batch` tokens of a text that has more.
            return_count: give a pair, the second of which is how many tokens were read.

        Raises:
            StateError (a RuntimeError): the model was loaded without `embedding=True`.
            ArgumentError (a ValueError): a text has more than `n_batch` tokens and is not to be truncated.
        """
        if not self._embedding:
            raise StateError("the model was not loaded for embeddings; load it with embedding=True")
        total, vectors = 0, []
        for text in [input] if isinstance(input, str) else input:
            ids = self.tokenize(text.encode())
            if len(ids) > self.n_batch:
                if not truncate:
                    raise ArgumentError(f"a text has {len(ids)} tokens, more than n_batch, which is {self.n_batch}")
                ids = ids[: self.n_batch]
            total += len(ids)
            vectors.append(self._vectors(ids, normalize))
        self.reset()
        found = vectors[0] if isinstance(input, str) else vectors
        return (found, total) if return_count else found

    def pooling_type(self) -> int:
        """How tokens become one vector: one of LLAMA_POOLING_TYPE_*."""
        return self._pooling

    def _vectors(self, ids: list[int], normalize: bool) -> list[float] | list[list[float]]:
        rows: list[NDArray[np.float64]] = []
        last = self._pooling == c.LLAMA_POOLING_TYPE_LAST

        def sink(position: int, found: NDArray[np.float32]) -> None:
            rows.append(found.astype(np.float64))

        self._work(Job(ids, None, hidden=True, first=len(ids) - 1 if last else 0, sink=sink))
        states = np.concatenate(rows)
        if self._pooling == c.LLAMA_POOLING_TYPE_MEAN:
            states = states.mean(axis=0, keepdims=True)
        elif self._pooling == c.LLAMA_POOLING_TYPE_CLS:
            states = states[:1]
        if normalize:
            lengths = np.sqrt((states * states).sum(axis=1, keepdims=True))
            states = states / np.where(lengths == 0, 1, lengths)
        vectors: list[list[float]] = states.tolist()
        return vectors if self._pooling == c.LLAMA_POOLING_TYPE_NONE else vectors[0]
