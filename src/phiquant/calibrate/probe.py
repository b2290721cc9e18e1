"""How far a model's predictions move when some of its weights are replaced, measured with the engine.

The model reads chunks of a text once as it is; its logits are the base. Then it is recorded again with other bytes for
some of its weights, as often as one likes, and reads the same chunks.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant import arch
from phiquant.calibrate.chunks import Chunks, chunk_step, cut
from phiquant.errors import RequestError
from phiquant.eval.rows import LogitRows, compare
from phiquant.gguf import open_model
from phiquant.gguf.closing import Closing
from phiquant.kernels.ops import Capacity, Executable, Weight
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record
from phiquant.text import Tokenizer

__all__ = ["Probe"]

_PAGE_TOKENS: Final = 64
_BASE_BYTES: Final = 1 << 30  # of the base's logits, which are held; of more tokens, every second or third is scored


class Probe(Closing):
    """A model that is measured with other weights. A context manager.

    Args:
        path: a GGUF file; of a model in several parts, the first.
        text: what the model reads, as `Calibration` reads it: chunks with the token of beginning in front.
        context: tokens of a chunk.
        tokens: read about this many, in chunks that lie evenly in the text.
        drawn: part of these chunks in which tokens are drawn at random instead, as `Chunks.with_drawn` has it.
        threads: native threads; 0 for as many as the process may use.
        backend: as for `LLM.load`.
        tell: is told, in a line, what takes its time.

    Attributes:
        weights: the model's, by name.
        tokens: how many are read each time.
        scored: of how many the predictions are compared.

    Raises:
        FormatError: the file is broken. UnsupportedError: not a model that this version runs.
        RequestError: the text is too short, or an argument makes no sense.
        KernelError: a kernel could not be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        text: str,
        *,
        context: int = 512,
        tokens: int = 1536,
        drawn: float = 0.0,
        threads: int = 0,
        backend: str = "auto",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if context < 2 or tokens < 1 or threads < 0:
            raise RequestError(f"a model cannot read {tokens} tokens in chunks of {context} with {threads} threads")
        self._gguf = open_model(path)
        try:
            self._config = config = arch.load(self._gguf)
            tokenizer = Tokenizer.from_gguf(self._gguf)
            ids = np.array(tokenizer.encode(text, special=False), np.int32)
            context = min(context, config.context_length, max(len(ids) // 2, 2))
            chunks = cut(ids, context, 0, None)
            count = max(1, min(len(chunks), round(tokens / context)))
            whole = Chunks(chunks, "")
            picked = Chunks(chunks[np.arange(count) * len(chunks) // count].copy(), "")
            if tokenizer.add_bos and tokenizer.bos_id is not None:
                picked.ids[:, 0] = tokenizer.bos_id
            self._chunks = picked.with_drawn(tokenizer, drawn, of=whole).ids
            self.tokens = count * context
            stride = max(1, -(-self.tokens * config.vocab_size * 4 // _BASE_BYTES))
            self._outputs = np.arange(stride - 1, context, stride, dtype=np.int32)
            self.scored = count * len(self._outputs)
            pages = -(-context // _PAGE_TOKENS)
            self._capacity = Capacity(
                tokens=context,
                outputs=len(self._outputs),
                pages=pages,
                page_tokens=_PAGE_TOKENS,
                pages_per_sequence=pages,
                threads=threads,
            )
            self._backend = select(backend, tell)
            rope = Rope(config.rotary)
            self._rotation = rope.rotation(np.arange(context, dtype=np.int32), rope.regime(context))
            self.weights: Mapping[str, Weight] = load_weights(self._gguf, config)
            self._base = [LogitRows(rows.copy()) for rows in self._logits(self.weights)]
        except BaseException:
            self._gguf.close()
            raise

    def divergence(self, replaced: Mapping[str, Weight]) -> float:
        """Mean KL(model ‖ model with these weights), in nats for each scored token.

        KernelError if a weight does not fit or cannot be computed with, RequestError if logits are NaN.
        """
        rows = zip(self._base, self._logits({**self.weights, **replaced}), strict=True)
        return float(np.mean(np.concatenate([compare(base, logits).divergence for base, logits in rows])))

    def close(self) -> None:
        """Unmap the file."""
        self._gguf.close()

    def _logits(self, weights: Mapping[str, Weight]) -> Iterator[NDArray[np.float32]]:
        """Of each chunk the scored rows [rows, vocabulary], valid until the next."""
        executable: Executable = self._backend.prepare(record(self._config, weights), self._capacity)
        try:
            for chunk in self._chunks:
                yield executable.run(chunk_step(chunk, self._rotation, executable.capacity.pages, self._outputs))
        finally:
            executable.close()
