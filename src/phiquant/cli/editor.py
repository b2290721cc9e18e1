"""The line editor of the interactive chat, by prompt_toolkit; imported only when a person is at the keyboard."""

from __future__ import annotations

from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

__all__ = ["EditorReader"]

COMMANDS = ["/help", "/reset", "/system", "/save", "/load", "/regen", "/exit"]


class EditorReader:
    """Messages of several lines, edited, with history, the commands completed by Tab and the context's use shown."""

    def __init__(self, history: Path | None) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            history=FileHistory(str(history)) if history else InMemoryHistory(),
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation="  ",
            completer=WordCompleter(COMMANDS, sentence=True),
            complete_while_typing=False,
        )

    def read(self, status: str) -> str:
        """See `chat.Reader`."""
        return self._session.prompt(bottom_toolbar=f" {status}    /help lists the commands ")


def _bindings() -> KeyBindings:
    """Enter sends unless a backslash ends the line; Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
