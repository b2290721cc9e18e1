"""Calls of tools in a model's words, found while the words come; `tools.py` says what calls look like.

Words that could be the beginning of a call are held back until it is clear. A call begins as soon as its name is
known; from then on its arguments are passed on as they come, as the model writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from phiquant.text.stops import overlap

__all__ = ["MARKED", "TAGGED", "CallArguments", "CallBegun", "Content", "Found", "ToolReader"]

MARKED: Final = ("<|tool_call|>", "<|/tool_call|>")
"""Around the calls of Phi-4-mini."""
TAGGED: Final = ("<tool_call>", "</tool_call>")
"""Around a call of many others."""

_MARKS: Final = dict([MARKED, TAGGED])
_WORD: Final = "functools"
_FENCES: Final = ("```json", "```")
_ARGUMENTS: Final = ("arguments", "parameters")
_IGNORED: Final = ("id", "type", "index")
_SPACE: Final = " \t\r\n"


@dataclass(frozen=True)
class Content:
    """Words that are no call."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The call number `call`, from 0, of the tool `name`."""

    call: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments of a call: JSON."""

    call: int
    text: str


Found = Content | CallBegun | CallArguments


class ToolReader:
    """Reads the words of one choice.

    Args:
        names: of the tools. Only a call of one of these counts where no mark says that it is a call.
        parallel: whether calls after the first count.
    """

    def __init__(self, names: Iterable[str], *, parallel: bool = True) -> None:
        self._names, self._parallel = frozenset(names), parallel
        self._state = "start"  # "start", "text", "call" or "after"
        self._held = ""  # not yet decided
        self._raw = ""  # of the call that is being read, from its mark on
        self._end = ""  # the mark that ends it
        self._calls: _Calls | None = None
        self.calls = 0
        """How many calls have begun."""

    def push(self, text: str) -> list[Found]:
        """What is certain once `text` has come."""
        found: list[Found] = []
        self._held += text
        while self._held:
            before = self._state, self._held
            getattr(self, "_" + self._state)(found)
            if before == (self._state, self._held):
                break
        return _joined(found)

    def finish(self) -> list[Found]:
        """What was held back, once no more text comes."""
        found: list[Found] = []
        if self._state == "call" and self._calls is not None:
            self._take(self._calls, found)
            if not self._calls.begun:
                found.append(Content(self._raw))
        elif self._state != "after" or self._held.strip():
            found.append(Content(self._held))
        self._held = self._raw = ""
        return _joined(found)

    def _start(self, found: list[Found]) -> None:
        """Nothing but space so far: a bare call may begin."""
        seen = self._held.lstrip(_SPACE)
        for fence in _FENCES:
            if fence.startswith(seen):
                return
            if seen.startswith(fence):
                inner = seen[len(fence) :].lstrip(_SPACE)
                if not inner:
                    return
                if inner[0] in "[{":
                    self._begin(len(self._held) - len(inner), "```", marked=False)
                    return
        if seen[0] in "[{":
            self._begin(len(self._held) - len(seen), "", marked=False)
        elif seen.startswith(_WORD + "["):
            self._begin(len(self._held) - len(seen) + len(_WORD), "", marked=True)
        elif (mark := _mark_of(seen)) is not None:
            self._begin(len(self._held) - len(seen) + len(mark), _MARKS[mark], marked=True)
        elif not any(known.startswith(seen) for known in (_WORD + "[", *_MARKS)):
            self._state = "text"

    def _text(self, found: list[Found]) -> None:
        """Words; a mark may come anywhere."""
        at, mark = min(((at, mark) for mark in _MARKS if (at := self._held.find(mark)) >= 0), default=(-1, ""))
        if at >= 0:
            found.append(Content(self._held[:at]))
            self._held = self._held[at:]
            self._begin(len(mark), _MARKS[mark], marked=True)
            return
        keep = max(overlap(self._held, mark) for mark in _MARKS)
        cut = len(self._held) - keep
        if cut:
            found.append(Content(self._held[:cut]))
            self._held = self._held[cut:]

    def _begin(self, at: int, end: str, *, marked: bool) -> None:
        self._raw, self._held, self._end = self._held[:at], self._held[at:], end
        self._calls = _Calls(self.calls, None if marked else self._names, self._parallel)
        self._state = "call"

    def _call(self, found: list[Found]) -> None:
        calls = self._calls
        assert calls is not None
        at = 0
        try:
            while at < len(self._held) and not calls.done:
                calls.push(self._held[at])
                at += 1
        except _NoCall:
            self._take(calls, found)
            if not calls.begun:  # what looked like a call is words, mark included
                found.append(Content(self._raw + self._held[:at]))
            self._raw, self._held, self._calls, self._state = "", self._held[at:], None, "text"
            return
        self._raw += self._held[:at]
        self._held = self._held[at:]
        self._take(calls, found)
        if calls.done:
            if not calls.begun:
                found.append(Content(self._raw))
            self._raw, self._calls, self._state = "", None, "after" if calls.begun else "text"

    def _take(self, calls: _Calls, found: list[Found]) -> None:
        calls.flush()
        found += calls.found
        calls.found = []
        self.calls = calls.begun_calls

    def _after(self, found: list[Found]) -> None:
        """Behind a call: its closing mark, and space, are left out."""
        seen = self._held.lstrip(_SPACE)
        if self._end and seen.startswith(self._end):
            self._held, self._end = seen[len(self._end) :], ""
        elif _mark_of(seen) is not None:
            self._held, self._state = seen, "text"
        elif not any(mark.startswith(seen) for mark in (self._end, *_MARKS)):
            self._state = "text"


class _NoCall(Exception):  # noqa: N818 - a turn that the text takes
    """What is read is no call, or no JSON."""


class _Calls:
    """Follows the JSON of calls, character by character.

    names: tools that count; None for all. begun: whether one has been found. done: whether the JSON has ended.
    """

    def __init__(self, first: int, names: frozenset[str] | None, parallel: bool) -> None:
        self.begun_calls = first
        self.found: list[Found] = []
        self.done = self.begun = False
        self._names, self._parallel = names, parallel
        self._stack: list[_Frame] = []
        self._expect = "value"
        self._string: list[str] | None = None
        self._escaped = False
        self._arguments: list[str] | None = None  # the value that is being read, by characters
        self._depth = 0  # of the stack where it began
        self._passed = 0  # how many of its characters were passed on already
        self._waiting = ""  # arguments that came before the name
        self._name: str | None = None  # of the call that is being read
        self._counts = False  # whether it is passed on
        self._given = False  # whether it has had arguments

    def push(self, c: str) -> None:
        """One more character; _NoCall if it cannot be."""
        if self._string is not None:
            self._in_string(c)
        elif self._expect == "scalar" and c not in ",]}" + _SPACE:
            self._keep(c)
        elif c in _SPACE:
            if self._expect == "scalar":
                self._ended()
            self._keep(c)
        else:
            if self._expect == "scalar":
                self._ended()
            self._structure(c)

    def _structure(self, c: str) -> None:
        top = self._stack[-1] if self._stack else None
        if self._expect in ("value", "first value") and c not in "]}":
            self._value(c)
        elif c == '"' and self._expect in ("key", "first key"):
            self._keep(c)
            self._string = []
        elif c == ":" and self._expect == "colon":
            self._keep(c)
            self._expect = "value"
        elif c == "," and self._expect == "comma" and top is not None:
            self._keep(c)
            self._expect = "key" if top.kind == "{" else "value"
        elif (
            top is not None
            and c == ("}" if top.kind == "{" else "]")
            and self._expect in ("comma", "first key" if c == "}" else "first value")
        ):
            self._keep(c)
            self._stack.pop()
            if c == "}" and self._arguments is None and self._is_call(self._stack):
                self._close()
            self._ended()
        else:
            raise _NoCall

    def _value(self, c: str) -> None:
        top = self._stack[-1] if self._stack else None
        inner = self._arguments is not None
        if not inner and top is not None and top.kind == "{" and self._is_call(self._stack[:-1]):
            if top.key in _ARGUMENTS:
                self._arguments, self._depth = [], len(self._stack)
            elif top.key == "name" and c != '"':
                raise _NoCall
        self._keep(c)
        if c in "{[":
            self._stack.append(_Frame(c))
            self._expect = "first key" if c == "{" else "first value"
        elif c == '"':
            self._string = []
        elif c in "-0123456789tfn":
            if not self._stack:
                raise _NoCall
            self._expect = "scalar"
        else:
            raise _NoCall

    def _in_string(self, c: str) -> None:
        assert self._string is not None
        self._keep(c)
        if c != '"' or self._escaped:
            self._string.append(c)
            self._escaped = c == "\\" and not self._escaped
            return
        text, self._string = "".join(self._string), None
        top = self._stack[-1] if self._stack else None
        if top is not None and self._expect in ("key", "first key"):
            top.key = text
            self._expect = "colon"
            if self._arguments is None and self._is_call(self._stack[:-1]):
                self._check_key(text)
            return
        if top is not None and self._arguments is None and top.key == "name" and self._is_call(self._stack[:-1]):
            self._named(_decoded(text))
        self._ended()

    def _check_key(self, key: str) -> None:
        known = ("name", *_ARGUMENTS, *_IGNORED, "function", "tool_calls")
        if self._names is not None and key not in known:
            raise _NoCall

    def _named(self, name: str) -> None:
        if self._names is not None and name not in self._names:
            raise _NoCall
        self.begun = True
        self._name, self._counts = name, self._parallel or self.begun_calls == 0
        if self._counts:
            self.found.append(CallBegun(self.begun_calls, name))
            self.begun_calls += 1
        self._emit(self._waiting)
        self._waiting = ""

    def _ended(self) -> None:
        """A value has ended."""
        self._expect = "comma"
        if self._arguments is not None and len(self._stack) == self._depth:
            text = "".join(self._arguments)
            text = _decoded(text[1:-1]) if text.startswith('"') else text[self._passed :]
            self._arguments, self._passed = None, 0
            if self._name is None:
                self._waiting = text
            else:
                self._emit(text)
        self.done = not self._stack

    def _keep(self, c: str) -> None:
        if self._arguments is not None:
            self._arguments.append(c)

    def flush(self) -> None:
        """Pass on what has come of the arguments, unless they are a text, which is read whole."""
        if self._arguments and self._name is not None and self._arguments[0] != '"':
            text = "".join(self._arguments[self._passed :])
            self._passed += len(text)
            self._emit(text)

    def _emit(self, text: str) -> None:
        if text:
            self._given = True
            if self._counts:
                self.found.append(CallArguments(self.begun_calls - 1, text))

    def _close(self) -> None:
        """The object of a call has ended, or one around it."""
        if self._name is None and self._waiting:
            raise _NoCall
        if self._name is not None and not self._given:
            self._emit("{}")
        self._name, self._waiting, self._counts, self._given = None, "", False, False

    @staticmethod
    def _is_call(above: list[_Frame]) -> bool:
        """Whether an object below these can be a call: alone, in a list, behind tool_calls or function."""
        path = [frame.key if frame.kind == "{" else "[" for frame in above]
        if path[:1] == ["tool_calls"]:
            path = path[1:]
        if path[:1] == ["["]:
            path = path[1:]
        return path in ([], ["function"])


@dataclass
class _Frame:
    kind: str
    key: str = ""


def _decoded(text: str) -> str:
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        raise _NoCall from None


def _mark_of(text: str) -> str | None:
    """The mark that a text begins with."""
    return next((mark for mark in _MARKS if text.startswith(mark)), None)


def _joined(found: list[Found]) -> list[Found]:
    """Neighbouring pieces of the same kind as one, and no empty ones."""
    result: list[Found] = []
    for item in found:
        last = result[-1] if result else None
        if isinstance(item, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + item.text)
        elif isinstance(item, CallArguments) and isinstance(last, CallArguments) and item.call == last.call:
            result[-1] = CallArguments(item.call, last.text + item.text)
        elif isinstance(item, CallBegun) or item.text:
            result.append(item)
    return result
