"""Tools: how they are shown to a model, what its calls look like, and how calls are read from its words as they come.

Three ways, by the model's template:

    marked   Phi-4-mini's (`repairs.py`): <|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>
    tagged   templates with a variable `tools` that write <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    plain    all others: {"tool_calls": [{"name": ..., "arguments": {...}}]}; where the template has no place for tools,
             an instruction in the system message describes them and this form

The reader understands all of them whatever the template, since models mix them up: also a bare call or a list of them,
in a fence or not, what follows the word `functools`, OpenAI's {"type": "function", "function": {...}}, `parameters` for
`arguments`, and arguments that are JSON in a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal

from phiquant.errors import PhiquantError, RequestError
from phiquant.text import repairs
from phiquant.text.grammar import Grammar
from phiquant.text.template import ChatTemplate, Message
from phiquant.text.tool_grammar import Form, calls_only, words_or_calls
from phiquant.text.tool_reader import TAGGED, ToolReader

__all__ = ["Tool", "Toolbox", "arranged"]

Mode = Literal["auto", "none", "required"]

_MOST_TOOLS: Final = 128
_PROBE: Final = "probe-of-the-system-message"


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for.

    Attributes:
        name, description: as the model sees them.
        parameters: JSON schema of its arguments, an object.
        strict: whether arguments obey the schema also where the model may answer in words instead of calling.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    @property
    def shown(self) -> dict[str, Any]:
        """As templates want it: OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """Of its arguments, with what every schema of an object has."""
        return {"type": "object", "properties": {}, **self.parameters}


class Toolbox:
    """The tools of one request.

    Args:
        tools: with names that differ.
        template: of the model; None for a model without.
        mode: "auto" lets the model decide, "required" makes it call, "none" hides the tools.
        name: it must call this one; only with "required".
        parallel: whether several calls may come at once.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        template: ChatTemplate | None,
        *,
        mode: Mode = "auto",
        name: str | None = None,
        parallel: bool = True,
    ) -> None:
        """Raises RequestError for a name that is there twice, or not at all."""
        names = [tool.name for tool in tools]
        if len(names) > _MOST_TOOLS:
            raise RequestError(f"there are {len(names)} tools; {_MOST_TOOLS} are the most")
        twice = next((known for known in names if names.count(known) > 1), None)
        if twice is not None:
            raise RequestError(f"two tools are called {twice!r}; names must differ")
        if name is not None and name not in names:
            raise RequestError(f"tool_choice names {name[:100]!r}, which is none of the tools")
        if mode == "required" and not tools:
            raise RequestError("tool_choice asks for a call, and there are no tools")
        self.tools = (
            [tool for tool in tools if name is None or tool.name == name] if mode == "required" else list(tools)
        )
        self.mode: Mode = mode if tools else "none"
        self.parallel = parallel and name is None
        self.form = form_of(template)
        self._template, self._all = template, tools

    @property
    def active(self) -> bool:
        """Whether calls may come."""
        return self.mode != "none"

    def reader(self) -> ToolReader:
        """For one choice."""
        return ToolReader((tool.name for tool in self._all), parallel=self.parallel)

    def arranged(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, Any]]:
        """The conversation as the template takes it, tools included, and the template's variables."""
        found = arranged(messages, self._template)
        if not self.active:
            return found, {}
        if self._template is not None and self._template.takes_tools:
            return found, {"tools": [tool.shown for tool in self._all]}
        return _instructed(found, self._instruction(), self._template), {}

    def grammar(self, answer: Grammar | None = None) -> Grammar | None:
        """What the output is held to: calls if one is required; else `answer`, or calls instead of it.

        Without an `answer`, words come as they like, and calls obey the schemas of tools that are strict.
        """
        if self.mode == "required":
            return self._calls(None)
        if not self.active:
            return answer
        if answer is not None:
            return self._calls(answer)
        if not any(tool.strict for tool in self.tools):
            return None
        anything = {"type": "object"}
        functions = [(tool.name, tool.schema if tool.strict else anything) for tool in self.tools]
        return words_or_calls(functions, self.parallel)

    def _calls(self, answer: Grammar | None) -> Grammar:
        if answer is not None and answer.kind != "json_schema":
            raise RequestError("tools and a grammar of one's own exclude one another; use a JSON schema")
        functions = [(tool.name, tool.schema) for tool in self.tools]
        return calls_only(functions, self.form, self.parallel, answer)

    def _instruction(self) -> str:
        shown = json.dumps([tool.shown["function"] for tool in self._all], ensure_ascii=False)
        lines = [
            f"These functions can be called; each has a name and the JSON schema of its arguments:\n{shown}",
            "To call functions, answer with JSON of this form and nothing else:\n"
            '{"tool_calls": [{"name": "the function\'s name", "arguments": {"an argument": "its value"}}]}',
        ]
        if self.mode == "auto":
            lines.append("Call a function only where the answer needs it; otherwise answer in plain words.")
        elif len(self.tools) == 1:
            lines.append(f"Your next answer must call {self.tools[0].name}.")
        else:
            lines.append("Your next answer must call a function.")
        if not self.parallel:
            lines.append("Make one call at a time.")
        return "\n\n".join(lines)


def form_of(template: ChatTemplate | None) -> Form:
    """What calls of a model with this template look like."""
    if template is None or not template.takes_tools:
        return "plain"
    if repairs.reads_tools_from_system(template.source):
        return "marked"
    return "tagged" if TAGGED[0] in template.source else "plain"


def arranged(messages: Sequence[Message], template: ChatTemplate | None) -> list[Message]:
    """A conversation in which calls and their results are where the template can show them.

    A template that has no place for tools gets the calls as the assistant's words and the results as the user's.
    """
    if template is not None and template.takes_tools:
        return [_with_objects(message) for message in messages]
    names: dict[str, str] = {}
    found: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls")
        if message.get("role") in ("tool", "function"):
            name = message.get("name") or names.get(str(message.get("tool_call_id")), "the function")
            found.append({"role": "user", "content": f"The call of {name} returned:\n{message.get('content') or ''}"})
        elif calls:
            read = repairs.read_calls(message)["tool_calls"]
            for call, plain in zip(calls, read, strict=True):
                names[str(call.get("id"))] = plain["name"]
            words = message.get("content")
            text = json.dumps({"tool_calls": read}, ensure_ascii=False)
            found.append({"role": "assistant", "content": f"{words}\n{text}" if words else text})
        else:
            found.append(message)
    return found


def _with_objects(message: Message) -> Message:
    """Arguments of calls as objects, which templates write as JSON themselves."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    read = repairs.read_calls(message)["tool_calls"]
    whole = [{**call, "type": "function", "function": plain} for call, plain in zip(calls, read, strict=True)]
    return {**message, "content": message.get("content") or "", "tool_calls": whole}


def _instructed(messages: Sequence[Message], instruction: str, template: ChatTemplate | None) -> list[Message]:
    """The conversation with an instruction where the model sees it: in the system message, or the user's first."""
    role = "system" if template is None or _shows_system(template) else "user"
    at = next((at for at, message in enumerate(messages) if message.get("role") == role), None)
    if at is None:
        return [{"role": role, "content": instruction}, *messages]
    message = {**messages[at], "content": f"{instruction}\n\n{messages[at].get('content') or ''}"}
    if role == "system":
        message["content"] = f"{messages[at].get('content') or ''}\n\n{instruction}"
    return [*messages[:at], message, *messages[at + 1 :]]


@lru_cache(maxsize=64)
def _shows_system(template: ChatTemplate) -> bool:
    """Whether a template writes what a system message says; some were published that leave it out."""
    try:
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
        return _PROBE in template.render(probe)
    except PhiquantError:
        return False
