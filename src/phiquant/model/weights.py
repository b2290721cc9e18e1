"""The tensors of an open GGUF file as Weights: views of the mapped bytes, nothing is read yet."""

from phiquant.arch import Config
from phiquant.gguf import GGUFFile
from phiquant.kernels.ops import Weight

__all__ = ["load_weights"]


def load_weights(gguf: GGUFFile, config: Config) -> dict[str, Weight]:
    """Every tensor of the model by GGUF's name; the file must stay open while the weights are used."""
    weights = {}
    for name, shape in config.tensor_shapes():
        weights[name] = Weight(name, gguf.tensors[name].type, shape, gguf.data(name))
    return weights
