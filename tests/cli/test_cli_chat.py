"""The interactive chat on a model that echoes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phiquant.cli.chat import Chat, history_file, interactive
from phiquant.cli.notices import Notices
from phiquant.cli.run import Printer
from phiquant.llm import CompletionChunk

Typed = str | type[BaseException]


class Script:
    """A reader that types what it was given, then ends."""

    def __init__(self, *typed: Typed) -> None:
        self.typed = list(typed)
        self.statuses: list[str] = []

    def read(self, status: str) -> str:
        self.statuses.append(status)
        if not self.typed:
            raise EOFError
        line = self.typed.pop(0)
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def talk(llm: Any, out: io.StringIO) -> Callable[..., Chat]:
    def run(*typed: Typed, **options: Any) -> Chat:
        chat = Chat(llm, {"temperature": 0.5, "seed": 9}, Printer(out), Notices(quiet=False), system="be brief")
        assert interactive(chat, Script(*typed), **options) == 0
        return chat

    return run


def test_a_conversation_is_remembered(llm: Any, talk: Callable[..., Chat], out: io.StringIO) -> None:
    chat = talk("one", "  ", "two")
    assert out.getvalue() == "echo one\necho two\n"
    assert llm.asked[1] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "echo one"},
        {"role": "user", "content": "two"},
    ]
    assert llm.options[0] == {"temperature": 0.5, "seed": 9}
    assert chat.status == "7 of 100 tokens used"


def test_first_message_and_single_turn(llm: Any, talk: Callable[..., Chat]) -> None:
    talk("never read", first="hello", single=True)
    talk("hello", "never read", single=True)
    assert [asked[-1]["content"] for asked in llm.asked] == ["hello", "hello"]


def test_commands_change_the_conversation(
    llm: Any, talk: Callable[..., Chat], capsys: pytest.CaptureFixture[str]
) -> None:
    talk("one", "/reset", "/system speak French", "two", "/system", "three", "//slash", "/exit", "never")
    assert [[m["content"] for m in asked] for asked in llm.asked] == [
        ["be brief", "one"],
        ["speak French", "two"],
        ["two", "echo two", "three"],
        ["two", "echo two", "three", "echo three", "/slash"],
    ]
    assert "[2 tokens, 20.0 tokens/s; 7 of 100 tokens used]" in capsys.readouterr().err


def test_help_and_unknown_commands(
    talk: Callable[..., Chat], out: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    talk("/help", "/hepl", "/regen", "/save", "/load")
    for command in ("/reset", "/system", "/save", "/load", "/regen", "/exit"):
        assert command in out.getvalue()
    errors = capsys.readouterr().err
    assert "there is no /hepl" in errors
    assert "there is no answer to give again" in errors
    assert "/save needs the name" in errors
    assert "/load needs the name" in errors


def test_regen_replaces_the_answer_with_a_new_seed(llm: Any, talk: Callable[..., Chat]) -> None:
    chat = talk("one", "/regen")
    assert llm.asked[0] == llm.asked[1]
    assert [options["seed"] for options in llm.options] == [9, None]
    assert [m["content"] for m in chat.messages] == ["one", "echo one"]


def test_save_and_load(llm: Any, talk: Callable[..., Chat], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chat.json"
    saved = talk("óne", f"/save {file}")
    assert json.loads(file.read_text(encoding="utf-8"))[1] == {"role": "user", "content": "óne"}
    loaded = talk("/system", f"/load {file}", "two")
    assert loaded.system == saved.system == "be brief"
    assert loaded.messages[:2] == saved.messages
    file.write_text('[{"role": "king", "content": "x"}]', encoding="utf-8")
    talk(f"/load {file}", f"/load {tmp_path / 'none'}", f"/save {tmp_path / 'no' / 'folder'}")
    errors = capsys.readouterr().err
    assert "holds no conversation" in errors
    assert errors.count("does not exist") == 2


def test_ctrl_c_keeps_the_part_of_the_answer(
    llm: Any, talk: Callable[..., Chat], out: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.interrupt_after = 2
    chat = talk("a long question")
    assert out.getvalue() == "echo a\n"
    assert chat.messages == [
        {"role": "user", "content": "a long question"},
        {"role": "assistant", "content": "echo a"},
    ]
    assert "[stopped]" in capsys.readouterr().err


def test_ctrl_c_counts_even_if_its_exception_is_lost(llm: Any, talk: Callable[..., Chat], out: io.StringIO) -> None:
    before = signal.getsignal(signal.SIGINT)

    def stream(*_: Any, **__: Any) -> Iterator[CompletionChunk]:
        yield CompletionChunk("one", (1,))
        with contextlib.suppress(KeyboardInterrupt):  # as Python does when it comes in a finalizer
            signal.raise_signal(signal.SIGINT)
        yield CompletionChunk(" two", (2,))
        yield CompletionChunk(" three", (3,))

    llm.chat = stream
    assert talk("go").messages[-1] == {"role": "assistant", "content": "one two"}
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_leaves_the_second_time(llm: Any, talk: Callable[..., Chat]) -> None:
    talk(KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "never")
    assert [asked[-1]["content"] for asked in llm.asked] == ["one"]


def test_an_error_leaves_the_conversation_as_it_was(
    llm: Any, talk: Callable[..., Chat], capsys: pytest.CaptureFixture[str]
) -> None:
    llm.overflow = True
    assert talk("one").messages == []
    assert "the conversation does not fit; /reset begins anew" in capsys.readouterr().err


def test_regen_that_fails_keeps_the_old_answer(llm: Any, out: io.StringIO) -> None:
    chat = Chat(llm, {}, Printer(out), Notices(quiet=True))
    chat.answer("one")
    llm.overflow = True
    chat.command("/regen")
    assert [m["content"] for m in chat.messages] == ["one", "echo one"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_the_history_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = history_file()
    assert path is not None
    assert path.is_relative_to(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert history_file() == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert history_file() is None, "what a link points to is not ours to write"
    assert not (tmp_path / "elsewhere").exists()
