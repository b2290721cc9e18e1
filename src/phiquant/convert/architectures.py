"""Which checkpoints can be converted: the classes that config.json names, each with what knows its tensors."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import numpy as np

from phiquant.convert import llama, phi2, phi3, phi3small, phimoe
from phiquant.convert.assembly import Assembly
from phiquant.convert.entries import Entry
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import ArchitectureError

__all__ = ["CLASSES", "Settings", "settings_of"]


class Settings(Protocol):
    """The hyperparameters of config.json that matter for one architecture, checked."""

    architecture: ClassVar[str]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    def entries(self) -> list[Entry]:
        """The keys of the architecture in the order of llama.cpp's converter, then our own."""

    def constants(self) -> dict[str, np.ndarray]:
        """Tensors that are made of config.json, float32; they come first in the file."""

    def assemble(self, stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
        """Every other tensor by GGUF's name, in the checkpoint's order. CheckpointError where they do not fit."""


CLASSES: Final[Mapping[str, Callable[[Mapping[str, Any]], Settings]]] = MappingProxyType(
    {
        "Phi3ForCausalLM": phi3.Settings.from_config,
        "Phi3SmallForCausalLM": phi3small.Settings.from_config,
        "PhiForCausalLM": phi2.Settings.from_config,
        "MixFormerSequentialForCausalLM": phi2.Settings.from_config,
        "LlamaForCausalLM": llama.Settings.from_config,
        "MistralForCausalLM": llama.Settings.from_mistral,
        "PhiMoEForCausalLM": phimoe.Settings.from_config,
        "PhimoeForCausalLM": phimoe.Settings.from_config,
    }
)
"""By the name in `architectures` of config.json."""

_MODEL_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "phi3": "Phi3ForCausalLM",
        "phi3small": "Phi3SmallForCausalLM",
        "phimoe": "PhiMoEForCausalLM",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "phi": "PhiForCausalLM",
        "phi-msft": "PhiForCausalLM",
        "mixformer-sequential": "MixFormerSequentialForCausalLM",
        "phi3_v": "Phi3VForCausalLM",
        "phi4mm": "Phi4MMForCausalLM",
        "phi4_multimodal": "Phi4MultimodalForCausalLM",
        "phi4flash": "Phi4FlashForCausalLM",
    }
)
"""By `model_type`, for a config.json that names no class."""

_SIBLINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "Phi3VForCausalLM": "its image encoder and projector",
        "Phi4MMForCausalLM": "its image and audio encoders and their adapters",
        "Phi4MultimodalForCausalLM": "its image and audio encoders and their adapters",
        "Phi4ForCausalLMV": "its image encoder and projector",
        "Phi4FlashForCausalLM": "its state-space and gated-memory layers",
    }
)
"""Classes of the family that cannot be converted yet, each with what would be lost."""


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Read config.json. ArchitectureError for a class that is not known; of a sibling it says what would be lost."""
    names = config.get("architectures")
    found = names[0] if isinstance(names, list) and names else None
    if names is None:
        found = config.get("model_type")
        found = _MODEL_TYPES.get(found, found) if isinstance(found, str) else found
    if isinstance(found, str) and found in _SIBLINGS:
        raise ArchitectureError(
            f"{found} is not supported yet: {_SIBLINGS[found]} would be lost. It is planned; until then use "
            "transformers for it."
        )
    read = CLASSES.get(found) if isinstance(found, str) else None
    if read is None:
        shown = repr(found)[:80] if found is not None else "(none named in config.json)"
        raise ArchitectureError(f"The architecture {shown} is not supported; known are {', '.join(CLASSES)}.")
    return read(config)
