"""A small GGUF file in the making, written by the `gguf` package: what the tests of all architectures change."""

from pathlib import Path
from typing import Any

import numpy as np

import gguf
from phiquant import arch
from phiquant.gguf import GGUFFile

U32, F32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING


class SmallFile:
    """Keys, tokens and tensors, to be changed before the file is written.

    Attributes:
        keys: (value, type) of each; the type of a list is None.
        tokens: texts of the vocabulary; without any the file has no list of them.
    """

    def __init__(self, architecture: str, keys: dict[str, tuple[Any, Any]]) -> None:
        self.architecture, self.keys = architecture, keys
        self.tokens: list[str] = []
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, name: str, *shape: int) -> None:
        """A weight, float16 if it is a matrix, and its bias."""
        self.tensors[f"{name}.weight"] = np.zeros(shape, np.float16 if len(shape) > 1 else np.float32)
        self.tensors[f"{name}.bias"] = np.zeros(shape[0], np.float32)

    def drop(self, *names: str) -> None:
        """Leave out keys or tensors."""
        for name in names:
            (self.keys if name in self.keys else self.tensors).pop(name)  # type: ignore[attr-defined]

    def load(self, folder: Path) -> Any:
        """Written as model.gguf, and what is read of it."""
        path = folder / "model.gguf"
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, (value, kind) in self.keys.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, kind)
        if self.tokens:
            writer.add_array("tokenizer.ggml.tokens", self.tokens)
        for name, tensor in self.tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with GGUFFile.open(path) as file:
            return arch.load(file)
