"""The interactive chat of `phiquant run`: messages, commands, and two ways of reading lines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import PhiquantError, RequestError
from .failures import os_sentence
from .notices import Notices

if TYPE_CHECKING:
    from ..llm import LLM, Completion, Options
    from ..text import Message
    from .run import Printer

__all__ = ["Chat", "PlainReader", "Reader", "history_file", "interactive", "reader"]

HELP = """\
/help         this list
/reset        forget the conversation; the system message stays
/system TEXT  set the system message; without TEXT take it away
/save FILE    write the conversation to a file, as JSON
/load FILE    go on with a conversation that was saved
/regen        answer the last message again
/exit         leave; so do Ctrl-D, and Ctrl-C twice

Enter sends. Alt-Enter, or a backslash at the end of a line, begins another line. Ctrl-C stops an answer."""


class Reader(Protocol):
    """Where messages come from."""

    def read(self, status: str) -> str:
        """The next message; EOFError at the end, KeyboardInterrupt at Ctrl-C."""
        ...


class Chat:
    """A conversation with a model.

    Attributes:
        messages: what was said, without the system message.
        system: the system message, or None.
    """

    def __init__(
        self, llm: LLM, sampling: Options, printer: Printer, notices: Notices, *, system: str | None = None
    ) -> None:
        self.messages: list[Message] = []
        self.system = system
        self._llm, self._sampling, self._printer, self._notices = llm, sampling, printer, notices
        self._used = 0

    @property
    def status(self) -> str:
        """How full the context is."""
        return f"{self._used} of {self._llm.context} tokens used"

    def ids(self, text: str) -> list[int]:
        """Token ids of the conversation with one more message of the user's."""
        from ..text import chat

        return chat.encode(self._llm.tokenizer, self._with({"role": "user", "content": text}))

    def say(self, text: str, *, again: bool = False) -> Completion | None:
        """Says something to the model and prints its answer as it comes.

        The answer becomes part of the conversation, also as far as it came when Ctrl-C stopped it (the result is None
        then). On an error the conversation is what it was before. `again` does not repeat a fixed seed.
        """
        question: Message = {"role": "user", "content": text}
        options = self._sampling.copy()
        if again:
            options["seed"] = None
        pieces: list[str] = []
        completion = None
        stream = self._llm.chat(self._with(question), stream=True, **options)
        with contextlib.suppress(KeyboardInterrupt), _ctrl_c() as pressed, closing(stream):  # type: ignore[type-var]
            for chunk in stream:
                pieces.append(chunk.text)
                self._printer.write(chunk.text)
                completion = chunk.completion or completion
                if pressed:
                    break
        self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]
        if completion is not None:
            self._used = completion.usage.total_tokens
        return completion

    def answer(self, text: str, *, again: bool = False) -> None:
        """`say`, with a line about the tokens; errors are told and the chat goes on."""
        try:
            completion = self.say(text, again=again)
        except PhiquantError as error:
            self._printer.finish_line()
            self._notices.note(f"{error}; /reset begins anew")
            return
        self._printer.finish_line()
        if completion is None:
            self._notices.line("[stopped]")
            return
        usage, timings = completion.usage, completion.timings
        speed = f", {timings.decode_per_second:.1f} tokens/s" if usage.completion_tokens > 1 else ""
        self._notices.line(f"[{usage.completion_tokens} tokens{speed}; {self.status}]")

    def command(self, line: str) -> bool:
        """Carries out a line that begins with a slash; False ends the chat."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        actions: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._printer.write(HELP + "\n"),
            "/reset": self._reset,
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
            "/regen": self._regenerate,
        }
        if name in ("/exit", "/quit"):
            return False
        if name not in actions:
            self._notices.line(f"there is no {name}; /help lists the commands")
            return True
        try:
            actions[name](rest)
        except PhiquantError as error:
            self._notices.line(str(error))
        except OSError as error:
            self._notices.line(os_sentence(error))
        return True

    def _with(self, question: Message) -> list[Message]:
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages, question]

    def _reset(self, _: str) -> None:
        self.messages.clear()
        self._used = 0
        self._notices.line("[a new conversation]")

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._notices.line("[system message set]" if text else "[no system message]")

    def _save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs the name of a file")
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = json.dumps([*system, *self.messages], ensure_ascii=False, indent=2) + "\n"
        Path(name).expanduser().write_text(text, encoding="utf-8")
        self._notices.line(f"[saved to {name}]")

    def _load(self, name: str) -> None:
        if not name:
            raise RequestError("/load needs the name of a file")
        try:
            found = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(_is_message(item) for item in found):
            raise RequestError(f"{name} holds no conversation as /save writes it")
        system = [item["content"] for item in found if item["role"] == "system"]
        self.system = system[0] if system else None
        self.messages = cast("list[Message]", [item for item in found if item["role"] != "system"])
        self._used = 0
        self._notices.line(f"[{len(self.messages)} messages]")

    def _regenerate(self, _: str) -> None:
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise RequestError("there is no answer to give again")
        *before, question, _answer = self.messages
        kept, self.messages = self.messages, before
        self.answer(str(question["content"]), again=True)
        if self.messages == before:  # it failed: the old answer is better than none
            self.messages = kept


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """While inside, Ctrl-C raises KeyboardInterrupt and leaves a mark in the list.

    The line editor's event loop has handlers of its own, which must not be in force here; and an exception that is
    raised in the middle of somebody's finalizer is lost, where a mark is not.
    """
    pressed: list[int] = []
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous in (None, signal.SIG_IGN):
        yield pressed
        return

    def handler(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _is_message(item: object) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == {"role", "content"}
        and item["role"] in ("system", "user", "assistant")
        and isinstance(item["content"], str)
    )


def interactive(chat: Chat, source: Reader, *, first: str | None = None, single: bool = False) -> int:
    """Reads messages and answers them until the reader ends or /exit; returns the exit status."""
    if first is not None:
        chat.answer(first)
        if single:
            return 0
    warned = False
    while True:
        try:
            line = source.read(chat.status)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if warned:
                return 0
            warned = True
            print("(Ctrl-C again, or Ctrl-D, leaves)", file=sys.stderr)
            continue
        warned = False
        if not line.strip():
            continue
        if line.startswith("/") and not line.startswith("//"):
            if not chat.command(line.strip()):
                return 0
            continue
        chat.answer(line[1:] if line.startswith("//") else line)
        if single:
            return 0


def reader(chat: Chat) -> Reader:
    """prompt_toolkit's line editor if both ends are a terminal, else plain lines."""
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb":
        from .editor import EditorReader

        return EditorReader(history_file())
    return PlainReader()


class PlainReader:
    """Lines of stdin; a backslash at the end of one joins the next."""

    def read(self, status: str) -> str:
        """See Reader."""
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        lines: list[str] = []
        while True:
            line = sys.stdin.readline()
            if not line and not lines:
                raise EOFError
            lines.append(line.removesuffix("\n").removesuffix("\\"))
            if not line.endswith("\\\n"):
                return "\n".join(lines)


def history_file() -> Path | None:
    """Where messages are remembered: the user's own file, mode 0600; None if there can be none."""
    import platformdirs

    with contextlib.suppress(OSError):
        directory = Path(platformdirs.user_state_dir("phiquant", appauthor=False))
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / "chat_history"
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            if os.name == "posix":
                os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        return path
    return None
