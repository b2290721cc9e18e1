"""What is computed: the operations of the contract, over weights and buffers.

Each docstring is a definition, which `reference/` executes. Shapes are in NumPy order; `t` is a token of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError, WeightsError
from ...gguf.types import GGMLType

__all__ = [
    "GELU",
    "Attention",
    "AttentionShape",
    "BlockSparse",
    "Buffer",
    "Combine",
    "Embed",
    "ExpertMatMul",
    "GeGELU",
    "Keep",
    "LayerNorm",
    "MatMul",
    "Operation",
    "RMSNorm",
    "RotateStore",
    "Route",
    "Rows",
    "Select",
    "SumSquares",
    "SwiGLU",
    "Weight",
]

Rows = Literal["tokens", "outputs", "routes"]
"""What a row of a buffer belongs to: a token of the step; a token whose logits are wanted; one of the experts chosen
for a token, in the order token, choice."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor as the file holds it.

    Attributes:
        name: GGUF's name.
        type: how the elements are stored.
        shape: NumPy order; a matrix is [outputs, inputs], a vector [n], those of experts [experts, outputs, inputs].
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
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Inputs of a matrix; length of a vector."""
        return self.shape[-1]

    @property
    def matrices(self) -> int:
        """Matrices in it: one for each expert, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def matrix(self, index: int) -> Weight:
        """One expert's matrix."""
        size = self.data.size // self.matrices
        return Weight(self.name, self.type, self.shape[1:], self.data[index * size : (index + 1) * size])


@dataclass(frozen=True, eq=False)
class Buffer:
    """Activations: float32 [rows of the step, width]; or some columns of the rows of another buffer.

    Attributes:
        name: for messages.
        width: columns.
        rows: what its rows belong to.
        whole: the buffer that these are columns of; None for one that stands for itself.
        first: the first of the columns in it.
    """

    name: str
    width: int
    rows: Rows = "tokens"
    whole: Buffer | None = None
    first: int = 0

    def columns(self, first: int, width: int) -> Buffer:
        """A part of the columns, to be written or read like a buffer. KernelError if there are not so many."""
        if first < 0 or width < 1 or first + width > self.width:
            raise KernelError(f"{self.name} has {self.width} columns, not {width} from {first} on")
        return Buffer(f"{self.name}[{first}:{first + width}]", width, self.rows, self.base, self.first + first)

    @property
    def base(self) -> Buffer:
        """The buffer whose memory it is."""
        return self if self.whole is None else self.whole


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
        neighbours: rotated is channel 2i with 2i + 1 instead, as in files whose rows are in this order.
    """

    heads: int
    kv_heads: int
    head_size: int
    rotary: int
    scale: float
    window: int = 0
    neighbours: bool = False

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
class BlockSparse:
    """Which keys a query sees of those before it, itself included: by blocks of `block` positions, from position 0 on.

    A query in block i sees with its head h the keys of the blocks j <= i for which i - j < local, or for which
    (j + h + 1) % stride == 0.
    """

    block: int
    local: int
    stride: int

    def __post_init__(self) -> None:
        if min(self.block, self.local, self.stride) < 1:
            raise KernelError(f"sparse attention of an impossible pattern: {self}")


@dataclass(frozen=True)
class Embed:
    """out[t] = scale * row tokens[t] of the weight, widened to float32."""

    weight: Weight
    out: Buffer
    scale: float = 1.0


@dataclass(frozen=True)
class RMSNorm:
    """out[t] = x[t] / sqrt(mean(x[t]²) + epsilon) * weight."""

    x: Buffer
    weight: Weight
    epsilon: float
    out: Buffer


@dataclass(frozen=True)
class LayerNorm:
    """out[t] = (x[t] - m) / sqrt(mean((x[t] - m)²) + epsilon) * weight + bias, with m = mean(x[t])."""

    x: Buffer
    weight: Weight
    bias: Weight
    epsilon: float
    out: Buffer


@dataclass(frozen=True)
class MatMul:
    """out[t] = W x[t] + bias, or with `add` out[t] += W x[t] + bias; no bias is 0.

    For a quantized W the rows of x are first rounded to 8 bits, as llama.cpp does: per 32 values for types with
    blocks of 32 (scale amax / 127), per 256 for the K-quants (scale -m / 127, m the signed value of largest
    magnitude); the scale is float32. F32, F16 and BF16 weights are widened and x is not rounded.
    """

    weight: Weight
    x: Buffer
    out: Buffer
    add: bool = False
    bias: Weight | None = None


@dataclass(frozen=True)
class RotateStore:
    """Splits qkv[t] into q, k and v heads; rotates q and k; q goes to q_out, k and v to the cache.

    For a rotated pair (a, b) = (channel i, channel i + rotary/2), or (channel 2i, channel 2i + 1) if the shape says so:
    a' = a cos - b sin, b' = b cos + a sin.
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
    sparse: BlockSparse | None = None


@dataclass(frozen=True)
class SwiGLU:
    """out[t] = silu(x[t, :n]) * x[t, n:], with n = out.width and silu(v) = v / (1 + exp(-v))."""

    x: Buffer
    out: Buffer


@dataclass(frozen=True)
class GELU:
    """out[t] = x[t] / 2 * (1 + tanh(sqrt(2 / pi) (x[t] + 0.044715 x[t]³)))."""

    x: Buffer
    out: Buffer


@dataclass(frozen=True)
class GeGELU:
    """out[t] = a sigmoid(1.702 a) * (b + 1), a = min(x[t, :n], limit), b = x[t, n:] clipped to +- limit, n = out.width.

    The gate of Phi-3-small; its checkpoints interleave a and b, which conversion takes apart.
    """

    x: Buffer
    out: Buffer
    limit: float


@dataclass(frozen=True, eq=False)
class Route:
    """Chooses `used` experts for each token, and what their results weigh: sparsemixer, as PhiMoE was trained.

    With s = logits[t], one choice after the other among the experts that are left:
        chosen  e = argmax s, the first of equals
        weight  softmax of s at e, over those left whose (s[e] - s) / max(|s|, s[e]) is at most 2 * jitter
    The weights are not normalised. The operation itself names what it chose, for ExpertMatMul and Combine.
    """

    logits: Buffer
    used: int
    jitter: float


@dataclass(frozen=True)
class ExpertMatMul:
    """out[r] = W[expert of route r] x[r], or x[token of route r] where the rows of x are tokens; rounded as in MatMul.

    W is [experts, outputs, inputs]; `out` has rows "routes". Only the experts that are chosen in a step are read.
    """

    weight: Weight
    route: Route
    x: Buffer
    out: Buffer


@dataclass(frozen=True)
class Combine:
    """out[t] += Σ weight of r * x[r] over the routes r of t, in the order in which they were chosen."""

    route: Route
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
    [matrices, width] and int64 [matrices]: one matrix, or with `route` one for each expert, which then gets the rows
    that are routed to it (x has rows "tokens" or "routes", as for ExpertMatMul).
    """

    x: Buffer
    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    route: Route | None = None


@dataclass(frozen=True, eq=False)
class Keep:
    """kept[t] = x[t] for the rows of the step; with `route` chosen[r] = the expert of route r.

    What a matrix that reads x is given, for `calibrate`; no model records it. The arrays are the caller's: float32
    [at least the rows of x, width] and int32 [at least the routes]. They hold the last step's, and what is beyond its
    rows is left as it was.
    """

    x: Buffer
    kept: NDArray[np.float32]
    route: Route | None = None
    chosen: NDArray[np.int32] | None = None


Operation = (
    Embed
    | RMSNorm
    | LayerNorm
    | MatMul
    | RotateStore
    | Attention
    | SwiGLU
    | GELU
    | GeGELU
    | Route
    | ExpertMatMul
    | Combine
    | Select
    | SumSquares
    | Keep
)
