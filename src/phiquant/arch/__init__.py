"""Model architectures: hyperparameters and tensor names as GGUF files carry them, one file each; no arithmetic."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from phiquant.arch.config import Config, Rotary
from phiquant.arch.llama import LlamaConfig
from phiquant.arch.phi2 import Phi2Config
from phiquant.arch.phi3 import Phi3Config
from phiquant.arch.phi3small import Phi3SmallConfig
from phiquant.arch.phimoe import PhiMoEConfig
from phiquant.errors import ArchitectureError, GGUFError, UnsupportedError
from phiquant.gguf import GGUFFile, keys

__all__ = [
    "ARCHITECTURES",
    "Config",
    "LlamaConfig",
    "Phi2Config",
    "Phi3Config",
    "Phi3SmallConfig",
    "PhiMoEConfig",
    "Rotary",
    "load",
]

ARCHITECTURES: Final[Mapping[str, Callable[[GGUFFile], Config]]] = MappingProxyType(
    {
        "llama": LlamaConfig.from_gguf,
        "phi2": Phi2Config.from_gguf,
        "phi3": Phi3Config.from_gguf,
        "phi3small": Phi3SmallConfig.from_gguf,
        "phimoe": PhiMoEConfig.from_gguf,
    }
)
"""The known values of `general.architecture`, each with the function that reads its hyperparameters."""


def load(gguf: GGUFFile) -> Config:
    """The checked hyperparameters of the model in a file.

    ArchitectureError for an unknown architecture, UnsupportedError for a lone part of a split model, GGUFError where
    keys and tensors do not make a model.
    """
    architecture = gguf.require(keys.ARCHITECTURE, str)
    read = ARCHITECTURES.get(architecture)
    if read is None:
        raise ArchitectureError(
            f"{gguf.path} is of the architecture {architecture!r:.80}, which is not supported; known: "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    parts = gguf.get(keys.SPLIT_COUNT, int, 1)
    if parts > 1 and len(gguf.parts) != parts:
        raise UnsupportedError(
            f"{gguf.path} is one of the {parts} parts of a split model and was opened alone; open the model by its "
            "first part (phiquant.gguf.open_model)."
        )
    if not gguf.tensors:
        raise GGUFError(f"{gguf.path} holds a vocabulary and no weights; give a file with the whole model.")
    return read(gguf)
