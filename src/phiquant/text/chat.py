"""A conversation as token ids: special tokens of the template are parsed, those that somebody typed are not.

Texts of special tokens inside messages are replaced by private-use characters, one for one, before the template sees
them; what is then found in the rendered text was written by the template. The characters are put back before fragments
are encoded, as ordinary text. Without such texts in the messages the ids are those of the whole rendered text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from phiquant.errors import TemplateError
from phiquant.text.added import WHITESPACE
from phiquant.text.template import Message
from phiquant.text.tokenizer import Tokenizer

_PRIVATE = range(0xE000, 0xF900)


def encode(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: Any
) -> list[int]:
    """Ids of a conversation, by the tokenizer's own template.

    As with transformers the template says everything: no bos is added to what it writes.
    Raises TemplateError when there is no template, and what `ChatTemplate.render` and `Tokenizer.encode` raise.
    """
    template = tokenizer.chat_template
    if template is None:
        raise TemplateError("the model has no chat template; give it a plain prompt instead")
    read = template.read(messages)
    mask = Mask((token.content for token in tokenizer.marks), [template.source, *_strings([read, extra])])
    rendered = template.render_read(
        [{key: value if key == "role" else mask.hide_all(value) for key, value in message.items()} for message in read],
        add_generation_prompt,
        **{name: mask.hide_all(value) for name, value in extra.items()},
    )
    return tokenizer.encode_marked(mask.reveal(rendered), tokenizer.special_spans(rendered))


class Mask:
    """Replaces the texts of special tokens by private-use characters that occur nowhere else, and back.

    specials: texts to hide. used: all texts that go into a rendering.
    """

    def __init__(self, specials: Iterable[str], used: Iterable[str]) -> None:
        self._specials = sorted(set(specials), key=len, reverse=True)
        taken = set().union(*map(set, used))
        free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        alphabet = sorted(set().union(*map(set, self._specials)))
        pairs = list(zip(alphabet, free, strict=False))
        if len(pairs) < len(alphabet):
            raise TemplateError("the messages use too many different private-use characters (U+E000 to U+F8FF)")
        self._hide = str.maketrans(dict(pairs))
        self._reveal = str.maketrans({private: character for character, private in pairs})

    def hide(self, text: str) -> str:
        """`text` with whole special texts masked, and what a neighbouring text could complete to one.

        That is the ends of `text`, looked for behind whitespace too, since templates trim, or all of it.
        """
        covered: set[int] = set()
        for special in self._specials:
            at = text.find(special)
            while at >= 0:
                covered.update(range(at, at + len(special)))
                at = text.find(special, at + 1)
        trimmed = text.strip(WHITESPACE)
        first = len(text) - len(text.lstrip(WHITESPACE))
        if any(trimmed in special for special in self._specials):
            covered.update(range(first, first + len(trimmed)))
        for special in self._specials:
            for size in range(1, len(special)):
                if trimmed.startswith(special[size:]):
                    covered.update(range(first, first + len(special) - size))
                if trimmed.endswith(special[:size]):
                    covered.update(range(first + len(trimmed) - size, first + len(trimmed)))
        if not covered:
            return text
        return "".join(c.translate(self._hide) if at in covered else c for at, c in enumerate(text))

    def hide_all(self, value: Any) -> Any:
        """The same for every text in a value made of lists and dictionaries."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list | tuple):
            return [self.hide_all(item) for item in value]
        if isinstance(value, Mapping):
            return {self.hide_all(key): self.hide_all(item) for key, item in value.items()}
        return value

    def reveal(self, text: str) -> str:
        """What was hidden, put back; lengths and positions stay the same."""
        return text.translate(self._reveal)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
