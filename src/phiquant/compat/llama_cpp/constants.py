"""Numbers that scripts hand to the constructor of `Llama` by name; the values are llama.cpp's."""

from typing import Final

from phiquant.gguf import GGMLType

LLAMA_DEFAULT_SEED: Final = 0xFFFFFFFF

LLAMA_SPLIT_MODE_NONE: Final = 0
LLAMA_SPLIT_MODE_LAYER: Final = 1
LLAMA_SPLIT_MODE_ROW: Final = 2

LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED: Final = -1
LLAMA_ROPE_SCALING_TYPE_NONE: Final = 0
LLAMA_ROPE_SCALING_TYPE_LINEAR: Final = 1
LLAMA_ROPE_SCALING_TYPE_YARN: Final = 2
LLAMA_ROPE_SCALING_TYPE_LONGROPE: Final = 3

LLAMA_POOLING_TYPE_UNSPECIFIED: Final = -1
LLAMA_POOLING_TYPE_NONE: Final = 0
LLAMA_POOLING_TYPE_MEAN: Final = 1
LLAMA_POOLING_TYPE_CLS: Final = 2
LLAMA_POOLING_TYPE_LAST: Final = 3
LLAMA_POOLING_TYPE_RANK: Final = 4

LLAMA_ATTENTION_TYPE_UNSPECIFIED: Final = -1
LLAMA_ATTENTION_TYPE_CAUSAL: Final = 0
LLAMA_ATTENTION_TYPE_NON_CAUSAL: Final = 1

GGML_TYPE_F32: Final = int(GGMLType.F32)
GGML_TYPE_F16: Final = int(GGMLType.F16)
GGML_TYPE_Q4_0: Final = int(GGMLType.Q4_0)
GGML_TYPE_Q8_0: Final = int(GGMLType.Q8_0)

__all__ = [name for name in globals() if name.startswith(("LLAMA_", "GGML_TYPE_"))]
