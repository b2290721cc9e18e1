"""Which files of a repository are one GGUF model, and which model a quant means; from names alone.

Repositories name their files as they like: `Phi-Q4_K_M.gguf`, `phi-q4.gguf`, `Q4_K_M/phi-00001-of-00003.gguf`. A quant
is a word of the path in any capitalisation. If none is said, it is what llama.cpp's `-hf` takes: Q4_K_M, else Q8_0,
else the first file.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from phiquant.errors import RequestError
from phiquant.gguf.split import split_name

__all__ = ["USUAL", "Found", "choose", "label_of", "models_among"]

USUAL: Final = ("Q4_K_M", "Q8_0")
"""Taken in this order if nothing is said."""

_LABEL: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q[1-9](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32)(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
_SHOWN: Final = 24  # choices in a sentence


@dataclass(frozen=True)
class Found:
    """A GGUF model among a repository's files.

    Attributes:
        files: paths in the repository, in the order of the parts; the first is the one to open.
        parts: how many files there should be; more than there are if some are missing.
        quant: the quant that the name states, in capitals; "" if it states none.
    """

    files: tuple[str, ...]
    parts: int
    quant: str

    @property
    def complete(self) -> bool:
        """Whether no part is missing."""
        return len(self.files) == self.parts


def label_of(path: str) -> str:
    """The quant that a path states, in capitals, the last if there are several; "" if none. FP16 is F16."""
    found = _LABEL.findall(path)
    return _normal(found[-1]) if found else ""


def models_among(paths: Iterable[str]) -> list[Found]:
    """The GGUF models among a repository's files, in the order of their first files.

    Projectors of images and importance matrices are GGUF files, too, and no language models: they are left out.
    """
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for path in paths:
        if not path.lower().endswith(".gguf") or not _is_language_model(path):
            continue
        split = split_name(path[:-5] + ".gguf")
        prefix, index, count = (str(split[0]), split[1], split[2]) if split else (path, 0, 1)
        groups.setdefault((prefix, count), {})[index] = path
    return [
        Found(tuple(parts[index] for index in sorted(parts)), count, label_of(prefix))
        for (prefix, count), parts in groups.items()
    ]


def choose(models: Sequence[Found], quant: str | None, repository: str) -> Found:
    """The model that `quant` means, or the usual one. RequestError with the choices if there is none, or several."""
    if not models:
        raise RequestError(f"{repository} holds no GGUF model.")
    wanted = USUAL if quant is None else (quant,)
    for name in wanted:
        matching = _matching(models, name)
        if len(matching) > 1:
            raise RequestError(
                f"{repository} has several models that are {name}; name one of them: "
                f"{_choices(repository, [model.files[0] for model in matching])}."
            )
        if matching:
            return _whole(matching[0], repository)
    if quant is None:
        return _whole(models[0], repository)
    labels = [model.quant for model in models]
    if not all(labels) or len(set(labels)) < len(labels):
        labels = [model.files[0] for model in models]
    raise RequestError(f"{repository} has no {quant}; it has {_listed(labels)}.")


def _matching(models: Sequence[Found], quant: str) -> list[Found]:
    """By the quant that the name states, else by a word of the path: `q4-v2` finds `phi-q4-v2.gguf`."""
    exact = [model for model in models if model.quant == _normal(quant)]
    if exact:
        return exact
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?=[-./]|$)", re.IGNORECASE)
    return [model for model in models if word.search(model.files[0])]


def _normal(quant: str) -> str:
    return re.sub(r"^FP(?=16$|32$)", "F", quant.upper())


def _is_language_model(path: str) -> bool:
    name = PurePosixPath(path).name.lower()
    return "mmproj" not in name and ("imatrix" not in name or label_of(name) != "")


def _whole(model: Found, repository: str) -> Found:
    if not model.complete:
        raise RequestError(
            f"{repository} has {len(model.files)} of the {model.parts} parts of {model.files[0]}; choose another file."
        )
    return model


def _choices(repository: str, files: Sequence[str]) -> str:
    return _listed([f"{repository}:{file}" for file in files])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
