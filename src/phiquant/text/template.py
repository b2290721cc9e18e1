"""Chat templates: a conversation as the text that a model was trained on.

The template of a GGUF file is a Jinja program of its author. Templates known by heart (`templates/phi3.json`, what
Microsoft published for Phi-3 and Phi-3.5) are rendered in this process: their output is bounded by their messages.
All others go to a process with limits (`sandbox.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from phiquant.errors import RequestError, TemplateError
from phiquant.text.template_worker import environment, explain

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
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
        # Some files spell newlines in string literals as \n, others as they are.
        return self.source.replace("\\n", "\n") in known_templates().values()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The text of a conversation.

        messages: each with a role (one of `ROLES`) and a content (text; None beside tool calls); other keys pass on.
        add_generation_prompt: end with the beginning of the assistant's turn.
        extra: further variables of the template, such as `tools`; values that JSON can express.
        Raises RequestError for malformed messages; TemplateError when the template fails, refuses the conversation,
        or takes more than 2 seconds or 64 MiB.
        """
        context = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **extra,
            "messages": [_checked(message, at) for at, message in enumerate(messages)],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            json.dumps(context)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages and template variables must be what JSON can express: {error}") from error
        if not self.is_known:
            from phiquant.text.sandbox import shared

            return shared.render(self.source, context)
        try:
            return _compiled(self.source).render(**context)
        except Exception as error:  # an expression can raise anything: TypeError for a content of None
            raise TemplateError(f"the chat template failed: {explain(error)}") from error


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
    templates: dict[str, str] = json.loads(files("phiquant.text").joinpath("templates", "phi3.json").read_text("utf-8"))
    return templates


@cache
def _compiled(source: str) -> Template:
    """Only for known templates, of which there are few."""
    return environment().from_string(source)
