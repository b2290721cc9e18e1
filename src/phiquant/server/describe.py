"""What a model's file says of it, read once and without loading it."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from phiquant.gguf import FileType, open_model

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Description:
    """A model as its file describes it.

    Attributes:
        architecture: such as phi3.
        parameters: numbers in its tensors.
        kind: of its weights, such as Q4_K_M; where the file does not tell, the type of most of them.
        context: most tokens that it was trained for; 0 if the file does not tell.
        size: bytes of all its parts.
        modified: when the file was written, seconds since 1970.
        template: its chat template, or nothing.
        metadata: short values of its header.
    """

    architecture: str
    parameters: int
    kind: str
    context: int
    size: int
    modified: float
    template: str
    metadata: dict[str, Any]


@lru_cache(maxsize=64)
def describe(path: Path) -> Description:
    """Read a file's header. Raises FormatError, OSError."""
    with open_model(path) as gguf:
        architecture = str(gguf.metadata.get("general.architecture", ""))
        template = gguf.metadata.get("tokenizer.chat_template")
        context = gguf.metadata.get(f"{architecture}.context_length")
        weights = Counter[str]()
        for tensor in gguf.tensors.values():
            weights[tensor.type.name] += math.prod(tensor.shape)
        try:
            kind = FileType(int(gguf.metadata["general.file_type"])).name
        except (KeyError, ValueError, TypeError):
            kind = weights.most_common(1)[0][0] if weights else ""
        short = {
            key: value
            for key, field in gguf.fields.items()
            if isinstance(value := field.value, int | float | bool | str) and len(str(value)) <= 1000
        }
        return Description(
            architecture=architecture,
            parameters=sum(weights.values()),
            kind=kind.removeprefix("MOSTLY_").removeprefix("ALL_"),
            context=context if isinstance(context, int) else 0,
            size=sum(part.size for part in gguf.parts),
            modified=path.stat().st_mtime,
            template=template if isinstance(template, str) else "",
            metadata={
                key: value for key, value in short.items() if not isinstance(value, float) or math.isfinite(value)
            },
        )
