"""Which tensor gets which type: the rules of llama.cpp's converter and of llama-quantize, as pure functions.

llama-quantize gives the types that matter most more bits: the output matrix, the attention values (here the fused
attn_qkv, which counts as such) and ffn_down, the last two in some layers only. The rules are those of the llama.cpp in
llama-cpp-python 0.3.36; older releases gave attn_qkv other types.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

from phiquant.convert.filetypes import Target, parse_tensor_type
from phiquant.errors import RequestError, WeightsError
from phiquant.gguf.types import FileType, GGMLType

__all__ = [
    "Model",
    "Options",
    "PlannedTensor",
    "Tensor",
    "TypePattern",
    "check_requantization",
    "plan_conversion",
    "plan_quantization",
]

_PLAIN = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.F64})


@dataclass(frozen=True)
class Tensor:
    """What a recipe needs to know of a tensor: GGUF name, shape with the contiguous extent last, type as stored."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType


@dataclass(frozen=True)
class Model:
    """What the mixing rules need to know of a model."""

    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class TypePattern:
    """`--tensor-type PATTERN=TYPE`: tensors whose name has a match anywhere get the type."""

    pattern: re.Pattern[str]
    type: GGMLType

    @classmethod
    def parse(cls, text: str) -> "TypePattern":
        """Read PATTERN=TYPE, the pattern in lower case as llama-quantize takes it; RequestError if malformed."""
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern or not name:
            raise RequestError(f"--tensor-type {text!r} is not PATTERN=TYPE, such as attn_qkv=q6_k.")
        try:
            return cls(re.compile(pattern.lower()), parse_tensor_type(name))
        except re.error as exc:
            raise RequestError(f"--tensor-type {text!r}: the pattern is not a regular expression: {exc}.") from exc


@dataclass(frozen=True)
class Options:
    """llama-quantize's options that choose types."""

    pure: bool = False
    output_tensor_type: GGMLType | None = None
    token_embedding_type: GGMLType | None = None
    tensor_types: tuple[TypePattern, ...] = ()
    leave_output_tensor: bool = False


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor's type in the output, and a sentence if its shape did not allow the type that was wanted."""

    name: str
    shape: tuple[int, ...]
    source: GGMLType
    type: GGMLType
    fallback: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the output."""
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])

    @property
    def rows(self) -> int:
        """Rows of `shape[-1]` elements."""
        return prod(self.shape[:-1])


def plan_conversion(tensors: Iterable[Tensor], default: GGMLType) -> list[PlannedTensor]:
    """llama.cpp's converter: vectors, norms and non-weights in F32, the rest in `default` or, failing that, F16."""
    planned = []
    for tensor in tensors:
        wanted = GGMLType.F32 if _stays_f32(tensor) else default
        if tensor.shape[-1] % wanted.block_elements:
            note = (
                f"rows of {tensor.shape[-1]} do not divide into {wanted.name}'s blocks of {wanted.block_elements}: F16"
            )
            planned.append(PlannedTensor(tensor.name, tensor.shape, tensor.type, GGMLType.F16, note))
        else:
            planned.append(PlannedTensor(tensor.name, tensor.shape, tensor.type, wanted))
    return planned


def plan_quantization(tensors: Sequence[Tensor], target: Target, model: Model, options: Options) -> list[PlannedTensor]:
    """llama-quantize: plan every tensor, in its writing order (outside blocks first, then by block, then by name)."""
    ordered = sorted(tensors, key=lambda tensor: (_block(tensor.name), tensor.name))
    default = target.default
    if default is None:
        return [PlannedTensor(t.name, t.shape, t.type, t.type) for t in ordered]
    mixer = _Mixer(target.file_type, default, model, options, ordered)
    return [mixer.plan(tensor) for tensor in ordered]


def check_requantization(planned: Iterable[PlannedTensor]) -> None:
    """Raise WeightsError if a tensor that is quantized already would be quantized again to another type."""
    for tensor in planned:
        if tensor.source not in _PLAIN and tensor.source != tensor.type:
            raise WeightsError(
                f"Tensor {tensor.name} is {tensor.source.name} already and would be quantized to {tensor.type.name}, "
                "which costs quality; quantize from the original weights, or pass --allow-requantize."
            )


def _stays_f32(tensor: Tensor) -> bool:
    name = tensor.name
    return (
        len(tensor.shape) < 2 or name.endswith("_norm.weight") or "ffn_gate_inp" in name or not name.endswith(".weight")
    )


def _block(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _may_quantize(tensor: Tensor, options: Options) -> bool:
    name = tensor.name
    return (
        len(tensor.shape) > 1
        and name.endswith("weight")
        and "_norm.weight" not in name
        and "ffn_gate_inp.weight" not in name
        and ".position_embd" not in name
        and ".patch_embd" not in name
        and name not in ("position_embd.weight", "token_types.weight")
        and not (options.leave_output_tensor and name == "output.weight")
    )


def _is_value(name: str) -> bool:
    """Attention values, whose errors matter most; the fused matrix counts as such."""
    return any(part in name for part in ("attn_qkv.weight", "attn_v.weight", "attn_kv_b.weight"))


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


# The type that a rule gives to layer i of n; None leaves the file type's default.
_Rule = Callable[[int, int, Model], GGMLType | None]

_VALUE_RULES: dict[FileType, _Rule] = {
    FileType.Q2_K: lambda i, n, m: GGMLType.Q4_K if m.query_heads_per_group >= 4 else GGMLType.Q3_K,
    FileType.Q2_K_S: lambda i, n, m: GGMLType.Q4_K if m.query_heads_per_group >= 4 else None,
    FileType.Q3_K_M: lambda i, n, m: GGMLType.Q5_K if i < 2 else GGMLType.Q4_K,
    FileType.Q3_K_L: lambda i, n, m: GGMLType.Q5_K,
    FileType.Q4_K_S: lambda i, n, m: GGMLType.Q5_K if i < 4 else None,
    FileType.Q4_K_M: lambda i, n, m: GGMLType.Q6_K if _more_bits(i, n) else None,
    FileType.Q5_K_M: lambda i, n, m: GGMLType.Q6_K if _more_bits(i, n) else None,
}
_DOWN_RULES: dict[FileType, _Rule] = {
    FileType.Q2_K: lambda i, n, m: GGMLType.Q3_K,
    FileType.Q2_K_S: lambda i, n, m: GGMLType.Q4_K if i < n // 8 else None,
    FileType.Q3_K_M: lambda i, n, m: GGMLType.Q5_K if i < n // 16 else GGMLType.Q4_K,
    FileType.Q3_K_L: lambda i, n, m: GGMLType.Q5_K,
    FileType.Q4_K_S: lambda i, n, m: GGMLType.Q5_K if i < n // 8 else None,
    FileType.Q4_K_M: lambda i, n, m: GGMLType.Q6_K if _more_bits(i, n) else None,
    FileType.Q5_K_M: lambda i, n, m: GGMLType.Q6_K if _more_bits(i, n) else None,
}
_ATTENTION_OUTPUT = {FileType.Q2_K: GGMLType.Q3_K, FileType.Q3_K_M: GGMLType.Q4_K, FileType.Q3_K_L: GGMLType.Q5_K}

# what a type becomes where rows do not divide into its blocks of 256
_FALLBACKS = {
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}


@dataclass
class _Mixer:
    """Walks the tensors in writing order; the counters say which layer of its kind a tensor is."""

    file_type: FileType | None
    default: GGMLType
    model: Model
    options: Options
    tensors: Sequence[Tensor]
    values_seen: int = 0
    downs_seen: int = 0
    values: int = field(init=False)
    tied: bool = field(init=False)

    def __post_init__(self) -> None:
        self.values = sum(_is_value(tensor.name) for tensor in self.tensors)
        self.tied = all(tensor.name != "output.weight" for tensor in self.tensors)

    def plan(self, tensor: Tensor) -> PlannedTensor:
        if not _may_quantize(tensor, self.options):
            return PlannedTensor(tensor.name, tensor.shape, tensor.type, tensor.type)
        wanted = self._wanted(tensor)
        fitting = _fit(wanted, tensor.shape[-1])
        note = None
        if fitting is not wanted:
            blocks = f"{wanted.name}'s blocks of {wanted.block_elements}"
            note = f"rows of {tensor.shape[-1]} do not divide into {blocks}: {fitting.name}"
        return PlannedTensor(tensor.name, tensor.shape, tensor.type, fitting, note)

    def _wanted(self, tensor: Tensor) -> GGMLType:
        options = self.options
        if tensor.name == "token_embd.weight" and options.token_embedding_type is not None:
            return options.token_embedding_type
        if tensor.name == "output.weight" and options.output_tensor_type is not None:
            return options.output_tensor_type
        if not self.default.is_quantized:
            return self.default
        for entry in options.tensor_types:
            if entry.pattern.search(tensor.name):
                return entry.type  # the counters do not move, as in llama.cpp
        return self.default if options.pure else self._mixed(tensor)

    def _mixed(self, tensor: Tensor) -> GGMLType:
        name, kind = tensor.name, self.file_type
        assert kind is not None
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return self._output_type(tensor)
        if name == "token_embd.weight":
            return self.default
        rule: _Rule | None = None
        layer, layers = 0, 0
        if _is_value(name):
            rule, layer, layers = _VALUE_RULES.get(kind), self.values_seen, self.values
            self.values_seen += 1
        elif "ffn_down" in name:
            rule, layers = _DOWN_RULES.get(kind), self.model.blocks
            layer = _block(name) if self.model.experts > 1 else self.downs_seen
            self.downs_seen += 1
        elif "attn_output.weight" in name:
            return _ATTENTION_OUTPUT.get(kind, self.default)
        chosen = rule(layer, layers, self.model) if rule else None
        return self.default if chosen is None else chosen

    def _output_type(self, tensor: Tensor) -> GGMLType:
        if self.options.output_tensor_type is not None:
            return self.options.output_tensor_type
        if tensor.shape[-1] % self.default.block_elements or self.default is GGMLType.Q8_0:
            return GGMLType.Q8_0
        return GGMLType.Q6_K


def _fit(wanted: GGMLType, columns: int) -> GGMLType:
    """`wanted`, or the type of smaller blocks that stands in for it, or F16, so that rows divide into blocks."""
    for kind in (wanted, _FALLBACKS.get(wanted, wanted)):
        if columns % kind.block_elements == 0:
            return kind
    return GGMLType.F16
