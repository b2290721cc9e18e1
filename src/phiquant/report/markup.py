"""HTML and SVG as strings that cannot be confused with text: whatever is not `Markup` is escaped.

What is written is well-formed XML too (all attributes quoted, all elements closed but HTML's void ones).
"""

from html import escape
from typing import Final

__all__ = ["Child", "Markup", "element", "joined", "visible"]

_VOID: Final = frozenset({"br", "meta", "link", "hr", "img", "col"})


class Markup(str):
    """Text that is markup already; only `element` and `joined` make it, and this module's constants."""

    __slots__ = ()


Child = str | Markup | int | None


def element(name: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """An element; texts are escaped, None is left out.

    Of an attribute's name a trailing underscore goes (`class_`) and other underscores become hyphens, but for `viewBox`
    there is nothing else to translate.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{_escaped(shown)}"')
    if name in _VOID and not children:
        return Markup("".join([*parts, ">"]))
    return Markup("".join([*parts, ">", joined(*children), f"</{name}>"]))


def joined(*children: Child) -> Markup:
    """Several children one after the other."""
    return Markup(
        "".join(child if isinstance(child, Markup) else _escaped(str(child)) for child in children if child is not None)
    )


def visible(text: str) -> str:
    """A text from a file or a model without what steers a reader: controls, bidirectional marks, lone surrogates."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _escaped(text: str) -> str:
    return escape(visible(text), quote=True)
