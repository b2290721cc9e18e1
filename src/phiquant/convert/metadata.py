"""`general.*`: who made the model and what it is, from its model card, its generation config and its name.

The parts of a name (basename, size, finetune, version) are found by the rules of llama.cpp's converter, so that files
from either are sorted alike by tools and hubs. `general.name` alone differs: it keeps its hyphens, because llama.cpp
treats the special tokens of a file as Phi-3's only if the name contains "phi-3" or "phi3".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from phiquant.convert.entries import Entry, float32, int32, string, strings, uint32
from phiquant.errors import CheckpointError

__all__ = ["NameParts", "general_metadata", "model_name", "parse_name", "read_model_card", "size_label"]

_MAX_CARD_BYTES = 4_000_000

# keys of a model card in the order they are tried for each field
_CARD_FIELDS = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "description": ("description", "model_description"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "size_label": ("size_label", "model_size_label"),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
}
_WRITTEN_ORDER = (
    *("name", "author", "version", "organization", "finetune", "basename", "description", "size_label"),
    *("license", "license.name", "license.link", "source.url", "source.doi", "source.uuid", "source.repo_url"),
)

# generation_config.json's names -> (key, whether a whole number), in written order
_SAMPLING = {
    "top_k": (("top_k",), True),
    "top_p": (("top_p",), False),
    "min_p": (("min_p",), False),
    "xtc_probability": (("xtc_probability",), False),
    "xtc_threshold": (("xtc_threshold",), False),
    "temp": (("temperature",), False),
    "penalty_last_n": (("penalty_last_n",), True),
    "penalty_repeat": (("penalty_repeat", "repetition_penalty"), False),
    "mirostat": (("mirostat",), True),
    "mirostat_tau": (("mirostat_tau",), False),
    "mirostat_eta": (("mirostat_eta",), False),
}


@dataclass(frozen=True)
class NameParts:
    """What a model's name says; each part None if it says nothing of it."""

    organization: str | None = None
    name: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


def general_metadata(
    architecture: str,
    name: str,
    card: Mapping[str, Any],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    parameters: int,
    label: str = "",
) -> list[Entry]:
    """The keys `general.*` but for file type and quantization version. `name`: of the directory or repository.

    `label`: the size of the model where neither its card nor its name gives one; without it, that of `parameters`.
    """
    found = _fields(name, card, config, parameters)
    found.setdefault("size_label", label or size_label(parameters))
    entries = [string("general.architecture", architecture), string("general.type", "model"), *_sampling(generation)]
    entries += [string(f"general.{key}", found[key]) for key in _WRITTEN_ORDER if key in found]
    entries += _references("base_model", card, ("base_model", "base_models", "base_model_sources"), parameters)
    entries += _references("dataset", card, ("datasets", "dataset", "dataset_sources"), parameters)
    tags = _list(card, "tags") + _list(card, "pipeline_tag")
    languages = _list(card, "languages") + _list(card, "language")
    if tags:
        entries.append(strings("general.tags", tags))
    if languages:
        entries.append(strings("general.languages", languages))
    return entries


def model_name(directory: Path) -> str:
    """The model's name by its directory, or by the repository that a directory of the Hub's cache belongs to."""
    path = directory.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.split("--")[-1]
    return path.name


def read_model_card(text: str | None) -> dict[str, Any]:
    """The YAML block at the head of a README.md; empty if there is none."""
    if text is None or len(text) > _MAX_CARD_BYTES:
        return {}
    lines = text.splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    block = "\n".join(lines[1 : lines.index("---", 1)]) + "\n"
    block = block.replace("- no\n", '- "no"\n').replace("\t", "  ")  # Norwegian is not false
    try:
        card = yaml.safe_load(block)
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        raise CheckpointError(
            "README.md begins with a block that is not valid YAML; correct it or take the file away."
        ) from exc
    return card if isinstance(card, dict) else {}


def size_label(parameters: int) -> str:
    """A count of parameters with two significant digits and its thousands' letter: 3.8B, 15M."""
    scale, letter = next(
        ((s, letter) for s, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if parameters > s), (1e3, "K")
    )
    value = parameters / scale
    digits = max(2 - len(str(round(value)).lstrip("0")), 0)
    return f"{value:.{digits}f}{letter}"


def parse_name(identifier: str, parameters: int = 0) -> NameParts:
    """Take a name such as "microsoft/Phi-3.5-mini-instruct" apart. `parameters` tells a size from a context length."""
    if " " in identifier:
        return NameParts(name=identifier)
    organization, slash, full = identifier.partition("/")
    if not slash:
        organization, full = "", identifier
    parts = [_Part(text) for text in full.split("-") if text]
    for index, part in enumerate(parts):
        part.classify(index, parameters)
    _drop_words_beside_numbers(parts)
    _find_basename(parts)
    basename = "-".join(p.text for p in parts if "basename" in p.kinds) or None
    size = "-".join(dict.fromkeys(p.text for p in parts if "size_label" in p.kinds)) or None
    finetune = "-".join(p.text for p in parts if "finetune" in p.kinds) or None
    version = "-".join(p.text for p in parts if "version" in p.kinds and "basename" not in p.kinds) or None
    if size is None and finetune is None and version is None:
        basename = None  # one word alone says nothing
    return NameParts(
        organization if organization and organization[0] != "." else None, full, basename, finetune, version, size
    )


class _Part:
    """A hyphen-separated part of a name, and what it may be."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.kinds: set[str] = set()

    def classify(self, index: int, parameters: int) -> None:
        text = self.text
        if re.fullmatch(r"(v|iter)?\d+([.]\d+)*", text, re.IGNORECASE):
            self.kinds.add("version")
        elif re.fullmatch(r"i?q\d(_\w)*|b?fp?(16|32)", text, re.IGNORECASE):
            self.kinds.add("type")
            self.text = text.upper()
        elif index > 0 and re.fullmatch(
            r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", text, re.IGNORECASE
        ):
            self._classify_size(parameters)
        elif index > 0 and text.lower() in ("chat", "instruct", "vision", "lora"):
            self.kinds.add("finetune")

    def _classify_size(self, parameters: int) -> None:
        text = self.text.replace("_", ".")
        if text[-1].isdecimal():  # 7b1 is 7.1b
            text = text[:-2] + "." + text[-1] + text[-2]
        if len(text) > 1 and text[-2].isdecimal() and text[-1] in "kmbt":
            text = text[:-1] + text[-1].upper()
        number = re.fullmatch(r"\d+(?:\.\d+)?", text[:-1])
        if parameters and number and text[-1] in "KMBT":
            claimed = float(number[0]) * 1000.0 ** " KMBT".index(text[-1])
            if (
                abs(claimed - parameters) > 7 * parameters // 8
            ):  # far from the model's size: a context length, as in 128k
                self.kinds.add("finetune")
                text = text[:-1] + text[-1].lower()
        if not self.kinds:
            self.kinds.add("size_label")
        self.text = text


def _drop_words_beside_numbers(parts: list[_Part]) -> None:
    """A size in words (mini) gives way to one in numbers (3.8B)."""
    sizes = [part for part in parts if "size_label" in part.kinds]
    if any(c.isdecimal() for part in sizes for c in part.text):
        for part in sizes:
            if part.text.isalpha():
                part.kinds.remove("size_label")


def _find_basename(parts: list[_Part]) -> None:
    """Leading words and versions are the basename but for a version at its end, unknown words after it the finetune."""
    leading = True
    for part in parts:
        if leading and ((not part.kinds and part.text[0].isalpha()) or "version" in part.kinds):
            part.kinds.add("basename")
            continue
        leading = False
        if not part.kinds:
            part.kinds.add("finetune")
    for part in reversed(parts):
        if "basename" not in part.kinds or len(part.kinds) < 2:
            break
        part.kinds.remove("basename")


def _fields(name: str, card: Mapping[str, Any], config: Mapping[str, Any], parameters: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for field, keys in _CARD_FIELDS.items():
        value = next((card[key] for key in keys if card.get(key) is not None), None)
        items = value if isinstance(value, list) else [value]
        texts = [text for text in map(_plain, items) if text is not None]
        if texts:
            found[field] = ",".join(texts)
    identifiers = [name]
    origin = config.get("_name_or_path")
    if isinstance(origin, str) and origin and origin.count("/") <= 1:  # more slashes are somebody's directories
        identifiers.insert(0, origin)
    for identifier in identifiers:
        parts = parse_name(identifier, parameters)
        for field in ("name", "basename", "finetune", "version", "size_label"):
            value = getattr(parts, field)
            if value:
                found.setdefault(field, value)
        if parts.organization:
            found.setdefault("organization", _title(parts.organization))
    found.setdefault("name", name)
    return found


def _sampling(generation: Mapping[str, Any]) -> list[Entry]:
    entries = []
    for key, (sources, whole) in _SAMPLING.items():
        value: Any = next((generation[source] for source in sources if generation.get(source) is not None), None)
        if value is None:
            continue
        kind = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not -(2**31) < value < 2**31:
            raise CheckpointError(
                f"generation_config.json: {sources[0]} is {value!r}, not a {'whole ' if whole else ''}number."
            )
        make = int32 if whole else float32
        entries.append(make(f"general.sampling.{key}", value))
    return entries


def _references(kind: str, card: Mapping[str, Any], keys: tuple[str, ...], parameters: int) -> list[Entry]:
    """`general.base_model.*` or `general.dataset.*` from a card's list of repository ids, addresses or objects."""
    value = next((card[key] for key in keys if key in card), None)
    items = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    described = [_reference(item, parameters) for item in items]
    if value is None:
        return []
    entries = [uint32(f"general.{kind}.count", len(described))]
    order = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
    for index, fields in enumerate(described):
        entries += [string(f"general.{kind}.{index}.{key}", text) for key in order if (text := _plain(fields.get(key)))]
    return entries


def _reference(item: object, parameters: int) -> dict[str, Any]:
    if isinstance(item, dict):
        return item
    if not isinstance(item, str):
        raise CheckpointError(f"README.md names {item!r} as a base model or data set; that is no repository id.")
    found: dict[str, Any] = {}
    identifier = item
    if item.startswith(("http://", "https://", "ssh://")):
        found["repo_url"] = item
        on_hub = re.fullmatch(r"https?://huggingface\.co/([^/]+/[^/]+)", item)
        if on_hub is None:
            return found
        identifier = on_hub[1]
    parts = parse_name(identifier, parameters)
    if parts.name:
        found["name"] = _title(parts.name)
    if parts.organization:
        found["organization"] = _title(parts.organization)
    if parts.version:
        found["version"] = parts.version
    if parts.organization and parts.name:
        found.setdefault("repo_url", f"https://huggingface.co/{parts.organization}/{parts.name}")
    return found


def _plain(value: object) -> str | None:
    """A string or number of a card as text, else None: aliases in YAML make lists of any size from a few bytes."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and abs(value) < 2**63 else None


def _title(text: str) -> str:
    """Hyphens become spaces, words in lower case get a capital, versions stay."""
    words = text.strip().replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not re.match(r"(v\d+(?:\.\d+)*|\d.*)$", w) else w for w in words)


def _list(card: Mapping[str, Any], key: str) -> list[str]:
    value = card.get(key)
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value if isinstance(item, str)] if isinstance(value, list) else []
