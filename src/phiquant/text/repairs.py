"""Conversations rearranged for chat templates that are known to be broken; the templates themselves stay as they are.

Phi-4-mini's templates, and those of its reasoning variants, read tools from a key `tools` of the system message, as a
string of JSON, and know neither the variable `tools` that everybody passes, nor the tool calls of an assistant's
message, nor the vocabulary's own mark for a tool's result:

- The variable becomes that key: a list of functions without OpenAI's wrapper, as on the model's card; where there is no
  system message, one with the card's sentence comes first.
- Tool calls follow the assistant's words between `<|tool_call|>` and `<|/tool_call|>`, as the model itself writes them.
- The role `tool`, for a result, becomes `tool_response`, so that the template opens it with `<|tool_response|>` and not
  with `<|tool|>`, which begins a list of tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from phiquant.errors import RequestError
from phiquant.text.tool_reader import MARKED

SYSTEM = "You are a helpful assistant with some tools."

_KEY = r"""(['"])tools\1\s+in\s+message\b|\bmessage\s*\[\s*(['"])tools\2\s*\]|\bmessage\.tools\b"""
_ANY = r"\btools\b"
_LONGEST = 1 << 16  # characters; no template of this family is that long

NOTE = (
    "the chat template reads tools from the system message alone and does not know tool calls; tools, calls and "
    "results are put where the model was trained to see them"
)


def reads_tools_from_system(source: str) -> bool:
    """Whether a template is of Phi-4-mini's kind."""
    if len(source) > _LONGEST or "<|tool|>" not in source:
        return False
    without = re.sub(_KEY, "", source)
    return without != source and not re.search(_ANY, without)


def mentions_tools(source: str) -> bool:
    """Whether a template can show tools at all."""
    return re.search(_ANY, source) is not None


def read_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its tool calls as names and arguments; arguments that are JSON in a string, as OpenAI's, are read.

    Raises RequestError for calls that are none.
    """
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call(call) for call in _listed(calls)]} if calls else dict(message)


def rearrange(messages: Sequence[Mapping[str, Any]], tools: object) -> list[dict[str, Any]]:
    """The conversation as a template of Phi-4-mini's kind reads it.

    messages: with calls as `read_calls` leaves them. tools: as in OpenAI's requests, or nothing.
    """
    found = [_message(message) for message in messages]
    if not tools:
        return found
    text = json.dumps([_function(tool) for tool in _listed(tools)], ensure_ascii=False)
    first = next((message for message in found if message["role"] == "system"), None)
    if first is None:
        return [{"role": "system", "content": SYSTEM, "tools": text}, *found]
    if first.get("tools") is not None:
        raise RequestError("tools are given twice, in the system message and beside the messages; leave one out")
    first["tools"] = text
    return found


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {**message, "role": "tool_response"}
    if not message.get("tool_calls"):
        return dict(message)
    text = json.dumps(message["tool_calls"], ensure_ascii=False)
    return {**message, "content": f"{message.get('content') or ''}{MARKED[0]}{text}{MARKED[1]}"}


def _listed(value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise RequestError(f"tools and tool calls must be lists, not {type(value).__name__}")
    return list(value)


def _function(tool: object) -> object:
    """A tool without {"type": "function", "function": …} around it."""
    return tool["function"] if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping) else tool


def _call(call: object) -> dict[str, Any]:
    function = _function(call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError("a tool call needs a function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the arguments of a call to {function['name']!r} are not JSON: {error}") from error
    return {"name": function["name"], "arguments": arguments}
