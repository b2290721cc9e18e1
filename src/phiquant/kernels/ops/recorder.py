"""Recording a model: the Recorder that a forward pass calls, and the Program that it yields."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import KernelError
from ...gguf.types import GGMLType
from .operations import (
    GELU,
    Attention,
    AttentionShape,
    BlockSparse,
    Buffer,
    Combine,
    Embed,
    ExpertMatMul,
    GeGELU,
    LayerNorm,
    MatMul,
    Operation,
    RMSNorm,
    RotateStore,
    Route,
    Rows,
    Select,
    SwiGLU,
    Weight,
)

__all__ = ["Program", "Recorder"]


@dataclass(frozen=True)
class Program:
    """A recorded model; validated by the Recorder that made it.

    Attributes:
        operations: in the order in which they are executed.
        buffers: all that stand for themselves.
        attention: shape of its heads.
        layers: layers of the key-value cache.
        vocab_size: width of the logits.
        logits: the result.
        routes: experts that are chosen for a token, at most; 0 for a model without.
        hidden: what the last operation makes logits of, the states after the last norm; None if it is no product.
    """

    operations: tuple[Operation, ...]
    buffers: tuple[Buffer, ...]
    attention: AttentionShape
    layers: int
    vocab_size: int
    logits: Buffer
    routes: int = 0
    hidden: Buffer | None = None


class Recorder:
    """Records operations, refusing shapes that do not fit. Errors: KernelError, naming the tensor."""

    def __init__(self, attention: AttentionShape, layers: int) -> None:
        self._attention, self._layers = attention, layers
        self._operations: list[Operation] = []
        self._buffers: list[Buffer] = []
        self._routes = 0

    def buffer(self, name: str, width: int, rows: Rows = "tokens") -> Buffer:
        """A new buffer."""
        made = Buffer(name, width, rows)
        self._buffers.append(made)
        return made

    def _record(self, operation: Operation, label: str, *conditions: bool) -> None:
        if not all(conditions):
            raise KernelError(f"{label}: shapes do not fit in {operation}")
        self._operations.append(operation)

    def embed(self, weight: Weight, out: Buffer, *, scale: float = 1.0) -> None:
        """Look up the rows of the step's tokens."""
        fits = len(weight.shape) == 2 and weight.columns == out.width and out.whole is None
        self._record(Embed(weight, out, scale), weight.name, fits)

    def rms_norm(self, x: Buffer, weight: Weight, epsilon: float, out: Buffer) -> None:
        """Normalise rows by their root mean square."""
        fits = weight.shape == (x.width,) and _alike(x, out)
        self._record(RMSNorm(x, weight, epsilon, out), weight.name, fits, weight.type is GGMLType.F32, epsilon > 0)

    def layer_norm(self, x: Buffer, weight: Weight, bias: Weight, epsilon: float, out: Buffer) -> None:
        """Normalise rows by mean and variance."""
        fits = weight.shape == bias.shape == (x.width,) and _alike(x, out)
        floats = weight.type is GGMLType.F32 is bias.type
        self._record(LayerNorm(x, weight, bias, epsilon, out), weight.name, fits, floats, epsilon > 0)

    def matmul(self, weight: Weight, x: Buffer, out: Buffer, *, add: bool = False, bias: Weight | None = None) -> None:
        """Multiply rows by a matrix."""
        fits = len(weight.shape) == 2 and weight.shape == (out.width, x.width) and x.rows == out.rows
        biased = bias is None or (bias.shape == (out.width,) and bias.type is GGMLType.F32)
        apart = x.base is not out.base and x.whole is None
        self._record(MatMul(weight, x, out, add, bias), weight.name, fits, biased, apart)

    def rotate_store(self, qkv: Buffer, layer: int, q_out: Buffer) -> None:
        """Rotate queries and keys, store keys and values."""
        a = self._attention
        fits = qkv.width == a.q_width + 2 * a.kv_width and q_out.width == a.q_width and 0 <= layer < self._layers
        whole = qkv.whole is None is q_out.whole
        self._record(RotateStore(qkv, layer, q_out), f"layer {layer}", fits, whole, qkv.rows == q_out.rows == "tokens")

    def attention(self, q: Buffer, layer: int, out: Buffer, *, sparse: BlockSparse | None = None) -> None:
        """Attend."""
        fits = q.width == out.width == self._attention.q_width and 0 <= layer < self._layers and q is not out
        dense = sparse is None or not self._attention.window
        whole = q.whole is None is out.whole
        self._record(
            Attention(q, layer, out, sparse), f"layer {layer}", fits, dense, whole, q.rows == out.rows == "tokens"
        )

    def swiglu(self, x: Buffer, out: Buffer) -> None:
        """Gate by silu."""
        self._record(SwiGLU(x, out), out.name, x.width == 2 * out.width, _alike(x, out, widths=False), x is not out)

    def gelu(self, x: Buffer, out: Buffer) -> None:
        """Activate; `out` may be `x`."""
        self._record(GELU(x, out), out.name, _alike(x, out))

    def gegelu(self, x: Buffer, out: Buffer, limit: float) -> None:
        """Gate as Phi-3-small does."""
        fits = x.width == 2 * out.width and _alike(x, out, widths=False) and x is not out
        self._record(GeGELU(x, out, limit), out.name, fits, limit > 0)

    def route(self, logits: Buffer, used: int, jitter: float) -> Route:
        """Choose experts; the operation stands for the choice."""
        made = Route(logits, used, jitter)
        fits = 1 <= used <= logits.width and logits.rows == "tokens" and logits.whole is None and jitter >= 0
        self._record(made, logits.name, fits, self._routes in (0, used))
        self._routes = used
        return made

    def expert_matmul(self, weight: Weight, route: Route, x: Buffer, out: Buffer) -> None:
        """Multiply the rows of each expert by its matrix."""
        fits = weight.shape == (route.logits.width, out.width, x.width) and x.base is not out.base and x.whole is None
        rows = out.rows == "routes" and x.rows in ("tokens", "routes")
        self._record(ExpertMatMul(weight, route, x, out), weight.name, fits, rows, route in self._operations)

    def combine(self, route: Route, x: Buffer, out: Buffer) -> None:
        """Add the experts' results up."""
        fits = x.width == out.width and (x.rows, out.rows) == ("routes", "tokens") and x.whole is None is out.whole
        self._record(Combine(route, x, out), out.name, fits, route in self._operations)

    def select(self, x: Buffer, out: Buffer) -> None:
        """Keep the rows whose logits are wanted."""
        fits = x.width == out.width and x.whole is None is out.whole
        self._record(Select(x, out), out.name, fits, x.rows == "tokens", out.rows == "outputs")

    def finish(self, logits: Buffer) -> Program:
        """The Program; `logits` has rows "outputs" and the vocabulary's width."""
        if logits.rows != "outputs" or logits.whole is not None:
            raise KernelError("logits must have one row for each output")
        operations, buffers = tuple(self._operations), tuple(self._buffers)
        last = operations[-1] if operations else None
        hidden = last.x if isinstance(last, MatMul) and last.out is logits and last.x.whole is None else None
        return Program(operations, buffers, self._attention, self._layers, logits.width, logits, self._routes, hidden)


def _alike(x: Buffer, out: Buffer, *, widths: bool = True) -> bool:
    """Whether two buffers have the same rows, each a buffer of its own, and the same width."""
    return x.rows == out.rows and x.whole is None is out.whole and (x.width == out.width or not widths)
