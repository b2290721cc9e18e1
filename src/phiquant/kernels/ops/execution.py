"""Running a Program: what room is made for it, what one step is given, and what a backend must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import ContextError, KernelError, TokenError
from ...gguf.types import GGMLType
from ..cache_types import check_cache
from .recorder import Program

__all__ = ["Backend", "Capacity", "Executable", "Step"]


@dataclass(frozen=True)
class Capacity:
    """What an Executable makes room for.

    Attributes:
        tokens: most tokens of a step.
        outputs: most rows of logits of a step.
        sequences: most sequences of a step.
        pages: pages of the key-value cache.
        page_tokens: tokens of a page; a multiple of 16.
        pages_per_sequence: most pages of one sequence.
        cache_type: element type of the cache, one of `CACHE_TYPES`; heads are quantized one by one.
        threads: native threads, the caller's included; 0 for as many as the process may use.
        pack: bring the weights into the form that is fastest for the processor, once; or leave them in the mapped file,
            which saves their memory and costs time in every step. Backends that need no other form do not care.
        bf16_dot: activations that meet BF16 weights are rounded to BF16 themselves, which processors with products of
            that type multiply twice as fast.
    """

    tokens: int = 512
    outputs: int = 512
    sequences: int = 1
    pages: int = 64
    page_tokens: int = 64
    pages_per_sequence: int = 64
    cache_type: GGMLType = GGMLType.F16
    threads: int = 0
    pack: bool = True
    bf16_dot: bool = False

    def __post_init__(self) -> None:
        sizes = (self.tokens, self.outputs, self.sequences, self.pages, self.page_tokens, self.pages_per_sequence)
        if min(sizes) < 1 or self.threads < 0 or self.page_tokens % 16:
            raise KernelError(f"impossible capacity: {self}")
        check_cache(self.cache_type)


@dataclass(frozen=True, eq=False)
class Step:
    """One pass over some tokens of some sequences; every key a token may see is in the cache or in this step.

    Attributes:
        tokens: int32 [n], ids.
        positions: int32 [n], place of each token in its sequence, from 0; ascending within a sequence.
        slots: int32 [n], row of `pages` of each token's sequence; tokens of one sequence are adjacent.
        pages: int32 [s, p], page numbers; position i of a sequence is in page pages[slot, i // page_tokens].
        cos, sin: float32 [n, rotary // 2], of each token's rotation, attention factor included.
        outputs: int32 [m], indices of the tokens whose rows are wanted.
        hidden: the rows that are wanted are those of `Program.hidden`; the step ends before logits are made of them.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    pages: NDArray[np.int32]
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    outputs: NDArray[np.int32]
    hidden: bool = False

    def check(self, program: Program, capacity: Capacity) -> None:
        """Refuse whatever would make a kernel reach outside a buffer.

        Raises:
            TokenError: a token id outside the vocabulary.
            ContextError: more tokens, outputs, sequences or positions than there is room for.
        """
        n, m = len(self.tokens), len(self.outputs)
        if n == 0 or n > capacity.tokens or m > capacity.outputs or len(self.pages) > capacity.sequences:
            raise ContextError(f"a step of {n} tokens, {m} outputs, {len(self.pages)} sequences exceeds {capacity}")
        if self.tokens.min() < 0 or self.tokens.max() >= program.vocab_size:
            bad = self.tokens[(self.tokens < 0) | (self.tokens >= program.vocab_size)][0]
            raise TokenError(f"token id {bad} is outside the vocabulary of {program.vocab_size}")
        half = program.attention.rotary // 2
        arrays: list[tuple[Any, tuple[int, ...], type]] = [
            (self.tokens, (n,), np.int32),
            (self.positions, (n,), np.int32),
            (self.slots, (n,), np.int32),
            (self.pages, (len(self.pages), self.pages.shape[1]), np.int32),
            (self.cos, (n, half), np.float32),
            (self.sin, (n, half), np.float32),
            (self.outputs, (m,), np.int32),
        ]
        if any(a.shape != shape or a.dtype != dtype for a, shape, dtype in arrays):
            raise KernelError("the arrays of a step have the wrong shapes or types")
        if (
            self.slots.min() < 0
            or self.slots.max() >= len(self.pages)
            or self.pages.shape[1] > capacity.pages_per_sequence
        ):
            raise ContextError("a step names a sequence that has no row in its page table")
        if self.positions.min() < 0 or self.positions.max() >= self.pages.shape[1] * capacity.page_tokens:
            raise ContextError("a position lies beyond the pages of its sequence")
        if self.pages.min() < 0 or self.pages.max() >= capacity.pages:
            raise ContextError("a page number lies outside the cache")
        if self.hidden and program.hidden is None:
            raise KernelError("the model has no hidden states to give")
        if m and (self.outputs.min() < 0 or self.outputs.max() >= n):
            raise KernelError("an output names a token that is not in the step")


class Executable(Protocol):
    """A Program bound to a processor, with its weights, buffers and cache."""

    program: Program
    capacity: Capacity

    @property
    def threads(self) -> int:
        """Threads that compute, the caller's included."""

    def run(self, step: Step) -> NDArray[np.float32]:
        """Execute; the logits [outputs, vocabulary], or hidden states [outputs, width], valid until the next run."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of the cache, all layers."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the cache, all layers."""

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """A copy of a page's bytes [page_bytes], in the backend's own order."""

    def write_page(self, page: int, data: NDArray[np.uint8]) -> None:
        """Put bytes that `read_page` gave, of an Executable like this, into a page. KernelError if they do not fit."""

    def cancel(self) -> None:
        """From any thread: end the running step early; its `run` raises KernelError."""

    def close(self) -> None:
        """Free threads and memory; the Executable must not be used afterwards."""


class Backend(Protocol):
    """A kind of processor."""

    name: str

    def prepare(self, program: Program, capacity: Capacity) -> Executable:
        """Repack or upload the weights, bind a kernel to every operation, allocate buffers and cache."""
