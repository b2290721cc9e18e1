"""Chat templates, from any of the four places where a checkpoint may keep them.

The first place that has one wins: `chat_template` of tokenizer_config.json (a string, or a list of named templates),
chat_template.jinja (with additional_chat_templates/*.jinja beside it), chat_template.json. This is llama.cpp's order.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phiquant.convert.checkpoint import read_json, read_text
from phiquant.convert.entries import Entry, string, strings
from phiquant.errors import CheckpointError
from phiquant.gguf import keys

__all__ = ["chat_templates", "template_keys"]


def chat_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> template; the unnamed one is "default". Empty if the checkpoint has none."""
    inline = tokenizer_config.get("chat_template")
    if inline is not None:
        return _named(inline, "tokenizer_config.json")
    text = read_text(directory / "chat_template.jinja")
    if text is not None:
        found = {"default": text}
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = read_text(path) or ""
        return found
    separate = read_json(directory / "chat_template.json")
    if separate is not None and separate.get("chat_template") is not None:
        return _named(separate["chat_template"], "chat_template.json")
    return {}


def template_keys(templates: Mapping[str, str]) -> list[Entry]:
    """`tokenizer.chat_template` for the default; a key for each other, their names in `tokenizer.chat_templates`."""
    entries: list[Entry] = []
    names: list[str] = []
    for name, template in templates.items():
        safe = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
        if name == "default" or not safe or safe in names:
            continue
        names.append(safe)
        entries.append(string(keys.chat_template(safe), template))
    if names:
        entries.append(strings(keys.CHAT_TEMPLATES, names))
    if "default" in templates:
        entries.append(string(keys.CHAT_TEMPLATE, templates["default"]))
    return entries


def _named(value: object, source: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):  # name -> template
        value = [{"name": name, "template": template} for name, template in value.items()]
    if not isinstance(value, list):
        raise CheckpointError(f"{source}: chat_template is neither a template nor a list of named ones.")
    found: dict[str, str] = {}
    for item in value:
        name, template = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError(f"{source}: chat_template lists an entry without a name and a template.")
        found[name] = template
    return found
