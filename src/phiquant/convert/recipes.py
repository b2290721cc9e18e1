"""Which tensor gets which type: the rules of llama.cpp's converter, and llama-quantize's options over its mixtures."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from phiquant.convert.filetypes import Target, parse_tensor_type
from phiquant.convert.mixture import Mixture, Model, Tensor, block_of, fit, is_embedding
from phiquant.errors import RequestError, WeightsError
from phiquant.gguf.types import GGMLType

__all__ = [
    "Model",
    "Options",
    "PlannedTensor",
    "Tensor",
    "TypePattern",
    "check_options",
    "check_requantization",
    "may_quantize",
    "plan_conversion",
    "plan_quantization",
]

_PLAIN = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.F64})

# Weights that llama-quantize leaves as they are, whatever the architecture: vectors and gates in the guise of matrices,
# positions, and the small matrices of state space models, audio and vision.
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(
        f"time_mix_{part}.weight"
        for part in ["first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2"]
    ),
    *("time_mix_lerp_fused.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos"),
    *(".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)


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
    """A tensor's type in the output, and a sentence if its shape did not allow the type that was wanted.

    `origin`: its name in the source, where that is another; `importance`: float32 [matrices, columns] of the weights,
    with which it is quantized; `calibrated`: it is made of what the model computes on a text, by a `Maker` of its own.
    """

    name: str
    shape: tuple[int, ...]
    source: GGMLType
    type: GGMLType
    fallback: str | None = None
    origin: str = ""
    calibrated: bool = False
    importance: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the output."""
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])

    @property
    def rows(self) -> int:
        """Rows of `shape[-1]` elements."""
        return prod(self.shape[:-1])

    @property
    def matrix_rows(self) -> int:
        """Rows that share one row of `importance`: those of one matrix."""
        return self.rows if self.importance is None else self.rows // len(self.importance)

    @property
    def source_name(self) -> str:
        """The name of the tensor in the source."""
        return self.origin or self.name

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensor in the source."""
        return self.rows * self.source.row_bytes(self.shape[-1])


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


def plan_quantization(
    tensors: Sequence[Tensor], target: Target, model: Model, options: Options, *, importance: bool = False
) -> list[PlannedTensor]:
    """llama-quantize: plan every tensor, in its writing order (outside blocks first, then by block, then by name).

    `importance`: whether there is an importance matrix, which changes some mixtures. RequestError if a pattern of the
    options is in no weight's name; WeightsError if rows do not divide and nothing stands in for the type.
    """
    ordered = sorted(tensors, key=lambda tensor: (block_of(tensor.name), tensor.name))
    kind, default = target.file_type, target.default
    if kind is None or default is None:
        return [PlannedTensor(t.name, t.shape, t.type, t.type) for t in ordered]
    _check_patterns(ordered, options)
    names = [tensor.name for tensor in ordered]
    mixture = Mixture(kind, default, model, names, importance, options.output_tensor_type)
    return [_plan(tensor, mixture, options) for tensor in ordered]


def _plan(tensor: Tensor, mixture: Mixture, options: Options) -> PlannedTensor:
    if not may_quantize(tensor, options):
        return PlannedTensor(tensor.name, tensor.shape, tensor.type, tensor.type)
    wanted = _wanted(tensor, mixture, options)
    columns = tensor.shape[-1]
    fitting = fit(wanted, columns)
    blocks = f"rows of {columns} do not divide into {wanted.name}'s blocks of {wanted.block_elements}"
    if fitting is None:
        raise WeightsError(
            f"Tensor {tensor.name}: {blocks}, and no other type stands in; "
            f"choose one with --tensor-type {tensor.name}=TYPE."
        )
    note = None if fitting is wanted else f"{blocks}: {fitting.name}"
    return PlannedTensor(tensor.name, tensor.shape, tensor.type, fitting, note)


def _wanted(tensor: Tensor, mixture: Mixture, options: Options) -> GGMLType:
    patterns = [entry for entry in options.tensor_types if entry.pattern.search(tensor.name)]
    if options.token_embedding_type is not None and is_embedding(tensor.name):
        # per_layer_token_embd follows too, unless it is named
        if tensor.name == "token_embd.weight" or not patterns:
            return options.token_embedding_type
    if tensor.name == "output.weight" and options.output_tensor_type is not None:
        return options.output_tensor_type
    if not mixture.default.is_quantized:
        return mixture.default
    if patterns:
        return patterns[0].type  # the counters do not move, as in llama.cpp
    return mixture.default if options.pure else mixture.type_of(tensor)


def _check_patterns(tensors: Sequence[Tensor], options: Options) -> None:
    names = [tensor.name for tensor in tensors if may_quantize(tensor, options)]
    for entry in options.tensor_types:
        if not any(entry.pattern.search(name) for name in names):
            example = names[-1] if names else "blk.0.attn_qkv.weight"
            raise RequestError(
                f"--tensor-type {entry.pattern.pattern}: no weight's name holds this pattern; names are like {example}."
            )


def check_options(target: Target, options: Options) -> None:
    """Raise RequestError for options that contradict one another or the file type."""
    chosen = {
        "--pure": options.pure,
        "--output-tensor-type": options.output_tensor_type is not None,
        "--token-embedding-type": options.token_embedding_type is not None,
        "--tensor-type": bool(options.tensor_types),
    }
    if target.file_type is None:
        for name, given in chosen.items():
            if given:
                raise RequestError(f"{name} chooses types, and COPY keeps all as they are; leave one of them out.")
    elif options.tensor_types and target.default is not None and not target.default.is_quantized:
        raise RequestError(f"--tensor-type works with quantized file types only, not with {target.name}.")
    if options.leave_output_tensor and options.output_tensor_type is not None:
        raise RequestError("--leave-output-tensor and --output-tensor-type contradict one another; choose one.")


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


def may_quantize(tensor: Tensor, options: Options) -> bool:
    """Whether llama-quantize gives a tensor a type at all: matrices that are weights, but for some that stay."""
    name = tensor.name
    return (
        prod(tensor.shape[:-1]) > 1
        and name.endswith("weight")
        and not any(part in name for part in _KEPT)
        and name not in ("position_embd.weight", "token_types.weight")
        and not (options.leave_output_tensor and name == "output.weight")
    )
