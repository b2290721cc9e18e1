"""The constructor's parameters: which are followed, which change nothing here, and which are refused.

`docs/howto/llama-cpp-python.md` has the same as a table. A parameter is refused where leaving it out would change what
comes out, and warned of, once, where it would not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from phiquant.compat.llama_cpp import constants as c
from phiquant.compat.llama_cpp.refusals import ArgumentError, note_ignored
from phiquant.gguf import GGMLType
from phiquant.kernels.cache_types import CACHE_TYPES

__all__ = ["Settings", "settings"]

_NO_GPU: Final = "there is no GPU backend, and everything runs on the CPU"

# Parameters that change nothing here: their default, and why.
_IGNORED: Final[Mapping[str, tuple[Any, str]]] = MappingProxyType(
    {
        "split_mode": (c.LLAMA_SPLIT_MODE_LAYER, _NO_GPU),
        "main_gpu": (0, _NO_GPU),
        "tensor_split": (None, _NO_GPU),
        "offload_kqv": (True, _NO_GPU),
        "op_offload": (None, _NO_GPU),
        "use_mlock": (False, "weights are not locked in memory"),
        "n_ubatch": (512, "a step has n_batch tokens"),
        "flash_attn": (False, "attention never stores a matrix of scores anyway"),
        "swa_full": (None, "the cache always keeps all tokens"),
        "no_perf": (False, "nothing is printed about speed"),
        "lora_scale": (1.0, "there is no LoRA"),
        "numa": (False, "threads are placed by the operating system"),
        "spm_infill": (False, "there is no infill, because the models have no tokens for it"),
    }
)

# Parameters that would change the model: the values that leave it as it is, and what to do instead.
_REFUSED: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = MappingProxyType(
    {
        "vocab_only": ((False,), "the model is always loaded; for a tokenizer alone, LlamaTokenizer.from_ggml_file"),
        "kv_overrides": ((None, {}), "write a GGUF file with other metadata instead"),
        "rope_scaling_type": ((None, c.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED), "positions are as the file says"),
        "rope_freq_base": ((0, None), "positions are as the file says"),
        "rope_freq_scale": ((0, None), "positions are as the file says"),
        "yarn_ext_factor": ((-1.0,), "there is no YaRN"),
        "yarn_attn_factor": ((1.0,), "there is no YaRN"),
        "yarn_beta_fast": ((32.0,), "there is no YaRN"),
        "yarn_beta_slow": ((1.0,), "there is no YaRN"),
        "yarn_orig_ctx": ((0,), "the file says for how many tokens the model was made"),
        "attention_type": (
            (c.LLAMA_ATTENTION_TYPE_UNSPECIFIED, c.LLAMA_ATTENTION_TYPE_CAUSAL),
            "the models see what came before, and nothing else",
        ),
        "lora_base": ((None,), "there is no LoRA; merge it into the weights before conversion"),
        "lora_path": ((None,), "there is no LoRA; merge it into the weights before conversion"),
        "chat_format": (
            (None, "chat_template.default"),
            "the model's own template is used; give a chat_handler for another format",
        ),
    }
)

_POOLINGS: Final = (
    c.LLAMA_POOLING_TYPE_NONE,
    c.LLAMA_POOLING_TYPE_MEAN,
    c.LLAMA_POOLING_TYPE_CLS,
    c.LLAMA_POOLING_TYPE_LAST,
)


@dataclass(frozen=True)
class Settings:
    """What the parameters come to.

    Attributes:
        path: of the file.
        context: most tokens; 0 for all that the model can.
        batch: most tokens of a step.
        threads: 0 for as many as the process may use.
        gpu_layers: layers that are wanted on a GPU.
        cache_type: by `LLM.load`'s names.
        pooling: one of LLAMA_POOLING_TYPE_*, none but by request.
    """

    path: str
    context: int
    batch: int
    threads: int
    gpu_layers: int
    cache_type: str
    pooling: int


def settings(given: Mapping[str, Any]) -> Settings:
    """Read the constructor's arguments, all of them. Raises ArgumentError, which is a ValueError."""
    path = str(given["model_path"])
    if not Path(path).exists():
        raise ArgumentError(f"there is no file {path}")
    for name, (accepted, remedy) in _REFUSED.items():
        if given[name] not in accepted:
            raise ArgumentError(f"{name}={given[name]!r:.80} is not supported: {remedy}")
    note_ignored(given, _IGNORED)
    threads, others = given["n_threads"] or 0, given["n_threads_batch"] or 0
    if others not in (0, threads):
        note_ignored(given, {"n_threads_batch": (threads, "prompts are computed by the threads of n_threads")})
    for name, value in given["kwargs"].items():
        note_ignored({name: value}, {name: (object(), "there is no such parameter")})
    pooling = given["pooling_type"]
    if pooling == c.LLAMA_POOLING_TYPE_UNSPECIFIED:
        pooling = c.LLAMA_POOLING_TYPE_NONE
    if pooling not in _POOLINGS:
        raise ArgumentError(f"pooling_type={pooling!r:.80} is not supported; none, mean, CLS and last are")
    context, batch = given["n_ctx"], given["n_batch"]
    return Settings(
        path=path,
        context=context,
        batch=max(1, min(context, batch) if context else batch),
        threads=threads,
        gpu_layers=1 << 30 if given["n_gpu_layers"] == -1 else given["n_gpu_layers"],
        cache_type=_cache_type(given["type_k"], given["type_v"]),
        pooling=pooling,
    )


def _cache_type(keys: int | None, values: int | None) -> str:
    types = {c.GGML_TYPE_F16 if kind is None else kind for kind in (keys, values)}
    names = [name for name, kind in CACHE_TYPES.items() if types == {int(kind)}]
    if not names:
        known = ", ".join(f"{int(GGMLType[name.upper()])} ({name})" for name in CACHE_TYPES)
        raise ArgumentError(f"type_k={keys} and type_v={values} are not supported; both must be the same of {known}")
    return names[0]
