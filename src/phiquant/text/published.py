"""What is known of the published vocabularies that a GGUF file does not say: the attributes of their added tokens.

llama.cpp's files have no place for them, and phiquant's say them under a key of their own (`added.py`). A vocabulary is
recognised by texts at certain ids, never by the model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

_PHI3 = (
    *("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>"),
    *("<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
)


@dataclass(frozen=True)
class Published:
    """One published vocabulary.

    name: for people. marks: texts by id that no other vocabulary has there. lstrip, rstrip, visible: ids of added
    tokens that swallow the whitespace before them, after them, and that stay in decoded text. normalized: tells by the
    text which are looked for in normalized text.
    """

    name: str
    marks: dict[int, str]
    lstrip: Collection[int] = ()
    rstrip: Collection[int] = ()
    visible: Collection[int] = ()
    normalized: Callable[[str], bool] = field(default=lambda text: False)

    def fits(self, tokens: Sequence[str]) -> bool:
        """Whether `tokens` are of this vocabulary."""
        return all(index < len(tokens) and tokens[index] == text for index, text in self.marks.items())


_PHI3_MARKS = dict(enumerate(_PHI3, 32000))

# The first that fits counts.
VOCABULARIES = (
    Published(
        "Phi-3 with vision",
        {**_PHI3_MARKS, 32044: "<|image|>"},
        rstrip={2, *range(32001, 32011)} - {32006, 32007, 32010},
    ),
    Published("Phi-3", _PHI3_MARKS, rstrip={2, *range(32001, 32011)}),
    Published(
        "Phi-2",
        {50256: "<|endoftext|>", 50257: " " * 31, 50287: "\t" * 9},
        visible=range(50257, 50295),
        normalized=str.isspace,
    ),
    Published(
        "Phi-4",
        {100257: "<|endoftext|>", 100264: "<|im_start|>", 100265: "<|im_end|>", 100266: "<|im_sep|>"},
        lstrip=range(100256, 100352),
        rstrip=range(100256, 100352),
    ),
    Published(
        "Phi-4-mini",
        {199999: "<|endoftext|>", 200019: "<|assistant|>", 200020: "<|end|>", 200021: "<|user|>", 200022: "<|system|>"},
        rstrip=range(200019, 200029),
        visible=range(200023, 200028),
    ),
)


def recognize(tokens: Sequence[str]) -> Published | None:
    """The published vocabulary that `tokens` are, if it is a known one."""
    return next((known for known in VOCABULARIES if known.fits(tokens)), None)
