"""The contract between models and processors: a dozen operations, recorded once and then executed.

A model is a Python function that calls the methods of a `Recorder`; the result is a `Program`, a flat list of
operations over buffers whose number of rows is only known when a step runs. A `Backend` turns a Program into an
`Executable`, which runs `Step`s. The NumPy backend in `reference/` is the definition of what each operation means.

Shapes are in NumPy order. A buffer holds float32 rows: one for each token of a step ("tokens"), or one for each token
whose logits are wanted ("outputs").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ContextError, KernelError, TokenError, WeightsError
from ..gguf.types import GGMLType
from .cache_types import check_cache

__all__ = [
    "Attention",
    "AttentionShape",
    "Backend",
    "Buffer",
    "Capacity",
    "Embed",
    "Executable",
    "MatMul",
    "Operation",
    "Program",
    "RMSNorm",
    "Recorder",
    "RotateStore",
    "Select",
    "Step",
    "SumSquares",
    "SwiGLU",
    "Weight",
]

Rows = Literal["tokens", "outputs"]


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor as the file holds it.

    Attributes:
        name: GGUF's name.
        type: how the elements are stored.
        shape: NumPy order; a matrix is [outputs, inputs], a vector [n].
        data: the raw bytes, uint8 [nbytes], read-only (a view of the mapped file).
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        expected = int(np.prod(self.shape[:-1], dtype=np.int64)) * self.type.row_bytes(self.shape[-1])
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.size != expected:
            raise WeightsError(f"tensor {self.name} has {self.data.size} bytes where its shape needs {expected}")

    @property
    def rows(self) -> int:
        """Outputs of a matrix; 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Inputs of a matrix; length of a vector."""
        return self.shape[-1]


@dataclass(frozen=True, eq=False)
class Buffer:
    """Activations: float32 [rows of the step, width]."""

    name: str
    width: int
    rows: Rows = "tokens"


@dataclass(frozen=True)
class AttentionShape:
    """What the attention operations of one model have in common.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads; divides `heads`, query head h reads key head h // (heads // kv_heads).
        head_size: channels of a head.
        rotary: leading channels of a head that are rotated: channel i with i + rotary // 2 ("NEOX" pairing).
        scale: factor of the scores.
        window: a token sees this many tokens, itself included; 0 for all before it.
    """

    heads: int
    kv_heads: int
    head_size: int
    rotary: int
    scale: float
    window: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.rotary % 2 or not 0 <= self.rotary <= self.head_size or self.window < 0:
            raise KernelError(f"attention of an impossible shape: {self}")

    @property
    def q_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Channels of all key (or value) heads."""
        return self.kv_heads * self.head_size


@dataclass(frozen=True)
class Embed:
    """out[t] = row tokens[t] of the weight, widened to float32."""

    weight: Weight
    out: Buffer


@dataclass(frozen=True)
class RMSNorm:
    """out[t] = x[t] / sqrt(mean(x[t]²) + epsilon) * weight."""

    x: Buffer
    weight: Weight
    epsilon: float
    out: Buffer


@dataclass(frozen=True)
class MatMul:
    """out[t] = W x[t], or with `add` out[t] += W x[t].

    For a quantized W the rows of x are first rounded to 8 bits, as llama.cpp does: per 32 values for types with
    blocks of 32 (scale amax / 127), per 256 for the K-quants (scale -m / 127, m the signed value of largest
    magnitude); the scale is float32. F32, F16 and BF16 weights are widened and x is not rounded.
    """

    weight: Weight
    x: Buffer
    out: Buffer
    add: bool = False


@dataclass(frozen=True)
class RotateStore:
    """Splits qkv[t] into q, k and v heads; rotates q and k; q goes to q_out, k and v to the cache.

    For a rotated pair (a, b) = (channel i, channel i + rotary/2): a' = a cos - b sin, b' = b cos + a sin.
    """

    qkv: Buffer
    layer: int
    q_out: Buffer


@dataclass(frozen=True)
class Attention:
    """out[t] = softmax(scale q[t] · K) V over the keys of t's sequence at positions visible from t's own."""

    q: Buffer
    layer: int
    out: Buffer


@dataclass(frozen=True)
class SwiGLU:
    """out[t] = silu(x[t, :n]) * x[t, n:], with n = out.width."""

    x: Buffer
    out: Buffer


@dataclass(frozen=True)
class Select:
    """out[i] = x[outputs[i]]."""

    x: Buffer
    out: Buffer


@dataclass(frozen=True, eq=False)
class SumSquares:
    """sums[0, c] += x[t, c]² over the rows t in their order, in float64; counts[0] += how many there are.

    What a matrix that reads x is given, for `calibrate`; no model records it. The arrays are the caller's, float64
    [matrices, width] and int64 [matrices], one matrix here: experts will have one each, and rows that name theirs.
    """

    x: Buffer
    sums: NDArray[np.float64]
    counts: NDArray[np.int64]


Operation = Embed | RMSNorm | MatMul | RotateStore | Attention | SwiGLU | Select | SumSquares


@dataclass(frozen=True)
class Program:
    """A recorded model; validated by the Recorder that made it."""

    operations: tuple[Operation, ...]
    buffers: tuple[Buffer, ...]
    attention: AttentionShape
    layers: int
    vocab_size: int
    logits: Buffer


class Recorder:
    """Records operations, refusing shapes that do not fit. Errors: KernelError, naming the tensor."""

    def __init__(self, attention: AttentionShape, layers: int) -> None:
        self._attention, self._layers = attention, layers
        self._operations: list[Operation] = []
        self._buffers: list[Buffer] = []

    def buffer(self, name: str, width: int, rows: Rows = "tokens") -> Buffer:
        """A new buffer."""
        made = Buffer(name, width, rows)
        self._buffers.append(made)
        return made

    def _record(self, operation: Operation, label: str, *conditions: bool) -> None:
        if not all(conditions):
            raise KernelError(f"{label}: shapes do not fit in {operation}")
        self._operations.append(operation)

    def embed(self, weight: Weight, out: Buffer) -> None:
        """Look up the rows of the step's tokens."""
        self._record(Embed(weight, out), weight.name, len(weight.shape) == 2, weight.columns == out.width)

    def rms_norm(self, x: Buffer, weight: Weight, epsilon: float, out: Buffer) -> None:
        """Normalise rows."""
        fits = weight.shape == (x.width,) and x.width == out.width and x.rows == out.rows
        self._record(RMSNorm(x, weight, epsilon, out), weight.name, fits, weight.type is GGMLType.F32, epsilon > 0)

    def matmul(self, weight: Weight, x: Buffer, out: Buffer, *, add: bool = False) -> None:
        """Multiply rows by a matrix."""
        fits = len(weight.shape) == 2 and weight.shape == (out.width, x.width) and x.rows == out.rows and x is not out
        self._record(MatMul(weight, x, out, add), weight.name, fits)

    def rotate_store(self, qkv: Buffer, layer: int, q_out: Buffer) -> None:
        """Rotate queries and keys, store keys and values."""
        a = self._attention
        fits = qkv.width == a.q_width + 2 * a.kv_width and q_out.width == a.q_width and 0 <= layer < self._layers
        self._record(RotateStore(qkv, layer, q_out), f"layer {layer}", fits, qkv.rows == q_out.rows == "tokens")

    def attention(self, q: Buffer, layer: int, out: Buffer) -> None:
        """Attend."""
        fits = q.width == out.width == self._attention.q_width and 0 <= layer < self._layers and q is not out
        self._record(Attention(q, layer, out), f"layer {layer}", fits, q.rows == out.rows == "tokens")

    def swiglu(self, x: Buffer, out: Buffer) -> None:
        """Gate."""
        self._record(SwiGLU(x, out), out.name, x.width == 2 * out.width, x.rows == out.rows, x is not out)

    def select(self, x: Buffer, out: Buffer) -> None:
        """Keep the rows whose logits are wanted."""
        self._record(Select(x, out), out.name, x.width == out.width, x.rows == "tokens", out.rows == "outputs")

    def finish(self, logits: Buffer) -> Program:
        """The Program; `logits` has rows "outputs" and the vocabulary's width."""
        if logits.rows != "outputs":
            raise KernelError("logits must have one row for each output")
        operations, buffers = tuple(self._operations), tuple(self._buffers)
        return Program(operations, buffers, self._attention, self._layers, logits.width, logits)


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
        outputs: int32 [m], indices of the tokens whose logits are wanted.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    pages: NDArray[np.int32]
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    outputs: NDArray[np.int32]

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
        """Execute; the logits [outputs, vocabulary], valid until the next run."""

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of the cache, all layers."""

    def cancel(self) -> None:
        """From any thread: end the running step early; its `run` raises KernelError."""

    def close(self) -> None:
        """Free threads and memory; the Executable must not be used afterwards."""


class Backend(Protocol):
    """A kind of processor."""

    name: str

    def prepare(self, program: Program, capacity: Capacity) -> Executable:
        """Repack or upload the weights, bind a kernel to every operation, allocate buffers and cache."""
