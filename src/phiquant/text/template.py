"""Chat templates: a conversation as the text that a model was trained on.

The template of a GGUF file is a Jinja program of its author. Templates known by heart (`templates/*.json`, what
Microsoft published) are rendered in this process: their output is bounded by their messages. All others go to a process
with limits (`sandbox.py`). For templates that are known to be broken the conversation is rearranged (`repairs.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from phiquant.errors import RequestError, TemplateError
from phiquant.text import repairs
from phiquant.text.template_worker import environment, explain

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
LEAVES_SYSTEM_OUT = ("Phi-3-mini-instruct, first release", "Phi-3-medium-instruct")  # among the known ones
LONGEST_SOURCE = 1 << 20  # characters


class ChatTemplate:
    """A Jinja chat template; immutable, cheap to make, safe to share between threads.

    source: the template. bos_token, eos_token: texts that templates may write, empty when the vocabulary has none.
    Nothing is compiled before the first render, so that a model whose template is broken can still complete prompts.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        if len(source) > LONGEST_SOURCE:
            raise TemplateError(
                f"the chat template has {len(source)} characters; {LONGEST_SOURCE} are the most allowed"
            )
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token

    @property
    def is_known(self) -> bool:
        """Whether the template is a published one, rendered in this process."""
        return self._known_name is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is known to be wrong with the template and how it is repaired, one sentence each."""
        notes = [repairs.NOTE] if self._reads_tools_from_system else []
        if self._known_name in LEAVES_SYSTEM_OUT:
            notes.append("the chat template leaves out system messages, as it was published")
        return tuple(notes)

    @property
    def takes_tools(self) -> bool:
        """Whether the template can show tools to the model."""
        return repairs.mentions_tools(self.source)

    @cached_property
    def _reads_tools_from_system(self) -> bool:
        return repairs.reads_tools_from_system(self.source)

    @cached_property
    def _known_name(self) -> str | None:
        # Some files spell newlines in string literals as \n, others as they are.
        source = self.source.replace("\\n", "\n")
        return next((name for name, known in known_templates().items() if known == source), None)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The text of a conversation.

        messages: each with a role (one of `ROLES`) and a content (text; None beside tool calls); other keys pass on.
        add_generation_prompt: end with the beginning of the assistant's turn.
        extra: further variables of the template, such as `tools`; values that JSON can express.
        Raises RequestError for malformed messages, and for tools that the template would leave out; TemplateError when
        the template fails, refuses the conversation, or takes more than 2 seconds or 64 MiB.
        """
        return self.render_read(self.read(messages), add_generation_prompt, **extra)

    def read(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages, checked; what a repair has to read, such as the JSON in tool calls, is read.

        The first half of `render`. What is hidden from a template (`chat.Mask`) must be hidden between the two: reading
        JSON can bring out texts that its escapes kept from sight.
        """
        checked = [_checked(message, at) for at, message in enumerate(messages)]
        _refuse_what_is_not_json(checked)
        return [repairs.read_calls(message) for message in checked] if self._reads_tools_from_system else checked

    def render_read(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The second half of `render`, for what `read` gives."""
        if extra.get("tools") and not self.takes_tools:
            raise RequestError("the model's chat template has no place for tools; describe them in a message instead")
        _refuse_what_is_not_json(extra)
        if self._reads_tools_from_system:
            messages = repairs.rearrange(messages, extra.pop("tools", None))
        context = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **extra,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        if not self.is_known:
            from phiquant.text.sandbox import shared

            return shared.render(self.source, context)
        try:
            return _compiled(self.source).render(**context)
        except Exception as error:  # an expression can raise anything: TypeError for a content of None
            raise TemplateError(f"the chat template failed: {explain(error)}") from error


def _refuse_what_is_not_json(value: object) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages and template variables must be what JSON can express: {error}") from error


def _checked(message: Message, at: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"message {at} must be an object with role and content, not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"message {at} has role {role!r}; the roles are {', '.join(ROLES)}")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise RequestError(f"message {at} needs a content that is text, not {type(content).__name__}")
    return dict(message)


@cache
def known_templates() -> dict[str, str]:
    """Published templates by model name."""
    templates: dict[str, str] = {}
    for name in ("phi3.json", "phi4.json"):
        templates |= json.loads(files("phiquant.text").joinpath("templates", name).read_text("utf-8"))
    return templates


@cache
def _compiled(source: str) -> Template:
    """Only for known templates, of which there are few."""
    return environment().from_string(source)
