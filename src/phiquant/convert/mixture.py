"""The mixtures of llama-quantize: which type each weight of a file type gets, by what it does and in which layer.

Weights whose errors matter most get more bits: the output matrix; the attention values, as which the fused attn_qkv
counts too; ffn_down and attn_output; some of them in a part of the layers only. The rules are those of the llama.cpp
in llama-cpp-python 0.3.36; older releases gave attn_qkv other types.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from phiquant.gguf.types import FileType, GGMLType

__all__ = ["Mixture", "Model", "Tensor", "block_of", "fit", "is_embedding", "needs_importance"]

_T = GGMLType
_F = FileType
_EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
_BLOCK: Final = re.compile(r"blk\.(\d+)\.")
_LAYERS_OF_70B: Final = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class Tensor:
    """What a recipe needs to know of a tensor: GGUF name, shape with the contiguous extent last, type as stored."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def matrices(self) -> int:
        """Matrices in it: one for each expert of a mixture, else 1."""
        return self.shape[-3] if len(self.shape) > 2 else 1


@dataclass(frozen=True)
class Model:
    """What the mixing rules need to know of a model."""

    blocks: int
    heads: int
    kv_heads: int
    experts: int = 0
    architecture: str = "phi3"

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for one of the 70B models, whose attention values are few and get more bits."""
        grouped = self.architecture != "llama" or (self.heads != self.kv_heads and self.experts != 8)
        return grouped and self.blocks == _LAYERS_OF_70B.get(self.architecture)


@dataclass(frozen=True)
class _Place:
    """Where a weight stands: in layer `layer` of `layers`, of a model that is quantized with importance or without."""

    layer: int
    layers: int
    model: Model
    importance: bool

    @property
    def grouped(self) -> bool:
        return self.model.query_heads_per_group >= 4

    @property
    def first_eighth(self) -> bool:
        return self.layer < self.layers // 8

    @property
    def middle(self) -> bool:
        return self.layers // 8 <= self.layer < 7 * self.layers // 8

    @property
    def more_bits(self) -> bool:
        """The first and the last eighth, and every third layer between."""
        first, last = self.layers // 8, 7 * self.layers // 8
        return self.layer < first or self.layer >= last or (self.layer - first) % 3 == 2


# The type that a rule gives to a weight; None leaves the file type's default.
_Rule = Callable[[_Place], GGMLType | None]

# The 1- and 2-bit mixtures have rules of their own: only they look for four experts, and not for 70B.
_LOWEST = {_F.IQ1_S, _F.IQ1_M, _F.IQ2_XXS, _F.IQ2_XS, _F.IQ2_S, _F.IQ2_M}
_SPARED: dict[FileType, GGMLType] = dict.fromkeys((_F.IQ1_S, _F.IQ1_M, _F.IQ2_XXS, _F.IQ2_XS), _T.Q2_K) | dict.fromkeys(
    (_F.IQ2_S, _F.IQ2_M), _T.IQ3_S
)
_LOWEST_ATTENTION_OUTPUT = {
    _F.IQ1_S: _T.IQ2_XXS,
    _F.IQ1_M: _T.IQ2_XXS,
    _F.IQ2_S: _T.IQ3_S,
    _F.IQ2_M: _T.IQ3_S,
}
_VALUES: dict[FileType, _Rule] = {
    _F.Q2_K: lambda p: _T.Q4_K if p.grouped else _T.Q3_K,
    _F.Q2_K_S: lambda p: _T.Q4_K if p.grouped else None,
    _F.Q3_K_M: lambda p: _T.Q5_K if p.layer < 2 else _T.Q4_K,
    _F.Q3_K_L: lambda p: _T.Q5_K,
    _F.Q4_K_S: lambda p: _T.Q5_K if p.layer < 4 else None,
    _F.Q4_K_M: lambda p: _T.Q6_K if p.more_bits else None,
    _F.Q5_K_M: lambda p: _T.Q6_K if p.more_bits else None,
    _F.IQ3_XXS: lambda p: _T.Q4_K if p.grouped else (None if p.importance else _T.IQ3_S),
    _F.IQ3_XS: lambda p: _T.Q4_K if p.grouped else None,
    _F.IQ3_S: lambda p: _T.Q4_K if p.grouped else None,
    _F.IQ3_M: lambda p: _T.Q4_K,
    _F.IQ4_NL: lambda p: _T.Q5_K if p.grouped else None,
    _F.IQ4_XS: lambda p: _T.Q5_K if p.grouped else None,
}
_DOWN: dict[FileType, _Rule] = {
    # with importance Q4_0 and Q5_0 can fail badly in the first layers, and only then are _1 types safe
    _F.Q4_0: lambda p: _T.Q4_1 if p.importance and p.first_eighth else None,
    _F.Q5_0: lambda p: _T.Q5_1 if p.importance and p.first_eighth else None,
    _F.Q2_K: lambda p: _T.Q3_K,
    _F.Q2_K_S: lambda p: _T.Q4_K if p.first_eighth else None,
    _F.Q3_K_M: lambda p: _T.Q5_K if p.layer < p.layers // 16 else _T.Q4_K,
    _F.Q3_K_L: lambda p: _T.Q5_K,
    _F.Q4_K_S: lambda p: _T.Q5_K if p.first_eighth else None,
    _F.Q4_K_M: lambda p: _T.Q6_K if p.more_bits else None,
    _F.Q5_K_M: lambda p: _T.Q6_K if p.more_bits else None,
    _F.IQ3_XXS: lambda p: None if p.importance else (_T.Q4_K if p.first_eighth else _T.Q3_K),
    _F.IQ3_M: lambda p: _T.Q4_K if p.first_eighth or (p.model.experts == 8 and p.more_bits) else None,
    _F.IQ4_NL: lambda p: _T.Q5_K if p.first_eighth and not p.importance else None,
    _F.IQ4_XS: lambda p: _T.Q5_K if p.first_eighth and not p.importance else None,
}
_ATTENTION_OUTPUT = {
    _F.Q2_K: _T.Q3_K,
    _F.Q3_K_M: _T.Q4_K,
    _F.Q3_K_L: _T.Q5_K,
    _F.IQ3_XXS: _T.IQ3_S,
    _F.IQ3_M: _T.Q4_K,
}
# the file types whose attn_output is Q5_K in a mixture of exactly eight experts
_EIGHT_EXPERTS_OUTPUT = {
    *(_F.Q2_K, _F.Q3_K_S, _F.Q3_K_M, _F.Q4_K_S, _F.Q4_K_M),
    *(_F.IQ3_XXS, _F.IQ3_XS, _F.IQ3_S, _F.IQ3_M, _F.IQ4_NL, _F.IQ4_XS),
}
_QUERIES_AND_KEYS = {_F.IQ3_XS: _T.IQ3_XXS, _F.IQ3_XXS: _T.IQ2_S}

_EMBEDDING: dict[FileType, GGMLType] = (
    dict.fromkeys((_F.IQ2_XXS, _F.IQ2_XS, _F.IQ1_S, _F.IQ1_M), _T.Q2_K)
    | dict.fromkeys((_F.IQ2_S, _F.IQ2_M, _F.IQ3_XXS), _T.IQ3_S)
    | dict.fromkeys((_F.TQ1_0, _F.TQ2_0, _F.Q2_0), _T.Q4_K)
)

# What a type becomes where rows do not divide into its blocks; types of 32 are their own and become F16. Q1_0 (128) and
# NVFP4 (64) have none.
_FALLBACKS: dict[GGMLType, GGMLType] = (
    dict.fromkeys((_T.IQ1_S, _T.IQ1_M, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S), _T.IQ4_NL)
    | dict.fromkeys((_T.Q2_0, _T.Q2_K, _T.Q3_K, _T.TQ1_0, _T.TQ2_0), _T.Q4_0)
    | {_T.IQ4_XS: _T.IQ4_NL, _T.Q4_K: _T.Q5_0, _T.Q5_K: _T.Q5_1, _T.Q6_K: _T.Q8_0}
)

_BLIND = {_T.IQ3_XXS, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ1_M, _T.IQ1_S}


def block_of(name: str) -> int:
    """The block a tensor belongs to, -1 for one outside of all."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else -1


def is_embedding(name: str) -> bool:
    """Whether a tensor is a token embedding, for which the rules make exceptions."""
    return name in _EMBEDDINGS


def needs_importance(name: str, type: GGMLType, file_type: FileType | None) -> bool:
    """Whether llama-quantize refuses to give a weight this type without importance: the result would be garbage."""
    if is_embedding(name) or name == "output.weight":
        return False
    return type in _BLIND or (type is _T.Q2_K and file_type is _F.Q2_K_S)


def fit(wanted: GGMLType, columns: int) -> GGMLType | None:
    """`wanted`, or what stands in for it where rows do not divide into its blocks; None if nothing is to."""
    if columns % wanted.block_elements == 0:
        return wanted
    other = _FALLBACKS.get(wanted, wanted if wanted.block_elements <= 32 else None)
    return other if other is None or columns % other.block_elements == 0 else _T.F16


@dataclass
class Mixture:
    """Gives types to weights that come in writing order; its counters say which layer of its kind a weight is.

    `names` are those of all tensors of the output, `importance` whether an importance matrix is at hand.
    """

    file_type: FileType
    default: GGMLType
    model: Model
    names: Sequence[str]
    importance: bool = False
    output_type: GGMLType | None = None
    _seen: dict[str, int] = field(init=False, default_factory=dict)
    _values: int = field(init=False)
    _tied: bool = field(init=False)

    def __post_init__(self) -> None:
        self._values = sum(_part(name) == "values" for name in self.names)
        self._tied = "output.weight" not in self.names

    def type_of(self, tensor: Tensor) -> GGMLType:
        """The type of the next weight."""
        name, kind = tensor.name, self.file_type
        if name == "output.weight" or (self._tied and is_embedding(name)):
            return self._output_type(tensor)
        if kind is _F.MXFP4_MOE:
            return _T.MXFP4 if tensor.matrices > 1 else _T.Q8_0
        if is_embedding(name):
            return _EMBEDDING.get(kind, self.default)
        part = _part(name)
        count = self._seen.get(part, 0)
        self._seen[part] = count + 1
        chosen = (self._lowest if kind in _LOWEST else self._higher)(part, count, name)
        return self.default if chosen is None else chosen

    def _output_type(self, tensor: Tensor) -> GGMLType:
        if self.output_type is not None:
            return self.output_type
        if self.file_type is _F.MXFP4_MOE or self.default is _T.Q8_0:
            return _T.Q8_0
        if tensor.shape[-1] % self.default.block_elements:
            return _T.Q8_0
        return _T.Q5_K if self.file_type in _LOWEST | {_F.IQ3_XXS} else _T.Q6_K

    def _lowest(self, part: str, count: int, name: str) -> GGMLType | None:
        kind, experts = self.file_type, self.model.experts
        if part == "values":
            return _T.Q4_K if self.model.query_heads_per_group >= 4 or experts >= 4 else _SPARED[kind]
        if part == "down":  # counted one by one, even in mixtures of experts
            return _SPARED[kind] if count < self.model.blocks // 8 else None
        if part == "keys":
            return _T.Q4_K if experts == 8 else None
        if part == "output":
            return _T.Q5_K if experts == 8 else _LOWEST_ATTENTION_OUTPUT.get(kind)
        return None

    def _higher(self, part: str, count: int, name: str) -> GGMLType | None:
        kind, eight = self.file_type, self.model.experts == 8
        if part == "values":
            chosen = _apply(_VALUES.get(kind), _Place(count, self._values, self.model, self.importance))
            if self.model.is_70b and (chosen or self.default) in (_T.Q3_K, _T.Q4_K):
                chosen = _T.Q5_K
            return _T.Q8_0 if eight else chosen
        if part == "keys" and eight:
            return _T.Q8_0
        if part in ("keys", "queries"):
            return _QUERIES_AND_KEYS.get(kind)
        if part == "output":
            if eight:
                return _T.Q5_K if kind in _EIGHT_EXPERTS_OUTPUT else None
            return _ATTENTION_OUTPUT.get(kind)
        # experts may be tensors of their own, in any order: then the name says the layer
        layer = block_of(name) if self.model.experts > 1 else count
        place = _Place(layer, self.model.blocks, self.model, self.importance)
        if part == "down":
            return _apply(_DOWN.get(kind), place)
        return _T.IQ3_XXS if part in ("gate", "up") and kind is _F.IQ3_XS and place.middle else None


def _apply(rule: _Rule | None, place: _Place) -> GGMLType | None:
    return rule(place) if rule else None


def _part(name: str) -> str:
    """What a weight does, as the rules sort them; the first that fits."""
    parts = {
        "values": ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight"),
        "keys": ("attn_k.weight",),
        "queries": ("attn_q.weight",),
        "output": ("attn_output.weight",),
        "up": ("ffn_up",),
        "gate": ("ffn_gate",),
        "down": ("ffn_down",),
    }
    if name == "output.weight" or is_embedding(name):
        return ""
    return next((part for part, found in parts.items() if any(text in name for text in found)), "")
