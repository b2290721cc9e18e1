"""Which forward pass belongs to which configuration."""

from collections.abc import Mapping

from phiquant.arch import Config, LlamaConfig, Phi2Config, Phi3Config, Phi3SmallConfig, PhiMoEConfig
from phiquant.errors import ArchitectureError
from phiquant.kernels.ops import Program, Weight
from phiquant.model import llama, phi2, phi3, phi3small, phimoe

__all__ = ["record"]


def record(config: Config, weights: Mapping[str, Weight]) -> Program:
    """The Program that makes logits of tokens; KernelError where a weight does not fit."""
    match config:
        case LlamaConfig():
            return llama.record(config, weights)
        case Phi2Config():
            return phi2.record(config, weights)
        case Phi3Config():
            return phi3.record(config, weights)
        case Phi3SmallConfig():
            return phi3small.record(config, weights)
        case PhiMoEConfig():
            return phimoe.record(config, weights)
    raise ArchitectureError(f"there is no forward pass for the architecture {config.architecture}")
