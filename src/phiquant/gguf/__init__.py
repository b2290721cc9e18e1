"""The GGUF file format: types, keys, a reader that trusts nothing, and a streaming writer."""

from phiquant.gguf.header import Field, TensorInfo, parameter_count
from phiquant.gguf.reader import GGUFFile
from phiquant.gguf.split import open_model
from phiquant.gguf.types import FileType, GGMLType, ValueType
from phiquant.gguf.writer import GGUFWriter

__all__ = [
    "Field",
    "FileType",
    "GGMLType",
    "GGUFFile",
    "GGUFWriter",
    "TensorInfo",
    "ValueType",
    "open_model",
    "parameter_count",
]
