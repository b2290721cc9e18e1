"""What the user reads when something goes wrong: one sentence, never a traceback unless asked for."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from ..errors import PhiquantError

__all__ = ["OutputClosed", "WrongUsage", "is_usage_error", "os_sentence", "report", "silence_output", "usage_sentence"]


class WrongUsage(Exception):  # noqa: N818 - named as the user sees it
    """Arguments that contradict each other or leave out what is needed; exit status 2."""

    exit_code = 2

    def format_message(self) -> str:
        """As the option parser's own errors have it."""
        return str(self)


class OutputClosed(Exception):  # noqa: N818 - nothing went wrong here
    """The reader of stdout went away (`| head`)."""


_REMEDIES = {
    errno.ENOENT: "does not exist; check the path",
    errno.EACCES: "cannot be opened: permission denied",
    errno.EPERM: "cannot be opened: the operation is not permitted",
    errno.EISDIR: "is a directory where a file is needed",
    errno.ENOTDIR: "lies below something that is not a directory",
    errno.ENAMETOOLONG: "is too long a name",
    errno.EROFS: "cannot be written: the file system is read-only",
    errno.EMFILE: "cannot be opened: too many files are open; raise the limit with ulimit -n",
}


def report(error: Exception, *, debug: bool) -> int:
    """Prints an error as `phiquant: error: <sentence>` and returns the exit status, 1."""
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, PhiquantError):
        sentence = str(error)
    elif isinstance(error, OSError):
        sentence = os_sentence(error)
    elif isinstance(error, MemoryError):
        sentence = "the machine has not enough memory for this; use a smaller model, type or --ctx-size"
    else:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        sentence = f"this is a defect of phiquant ({what}); run again with --debug and report what it prints"
    with contextlib.suppress(OSError):
        print(f"phiquant: error: {sentence}", file=sys.stderr)
    return 1


def os_sentence(error: OSError) -> str:
    """A sentence that names the path and says what to do."""
    path = error.filename2 or error.filename
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {path}" if path else ""
        return f"the disk is full{where}; free some space or write elsewhere"
    if path is None:
        return f"the system reports: {error.strerror or error}"
    return f"{path} {_REMEDIES.get(error.errno or 0) or f'cannot be used: {error.strerror or error}'}"


def is_usage_error(error: Exception) -> bool:
    """Whether an exception is the option parser's: recognised by its members, since typer moved the classes."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def usage_sentence(error: Exception) -> str:
    """The parser's message as one sentence, with the nearest option if the option is unknown."""
    name = getattr(error, "option_name", None)
    possibilities = getattr(error, "possibilities", None)
    if possibilities is not None and name:
        import difflib

        near = difflib.get_close_matches(name, possibilities, n=1, cutoff=0.0)
        return f"no option {name}" + (f"; did you mean {near[0]}?" if near else "")
    if possibilities is None and type(error).__name__ == "NoSuchOption":
        return f"no option {name}"
    message = str(error.format_message()).strip()  # type: ignore[attr-defined]
    message = message.replace("Input should be a valid integer, unable to parse string as an integer", "not an integer")
    message = message.replace("Input should be a valid number, unable to parse string as a number", "not a number")
    return message[:1].lower() + message[1:].rstrip(".")


def silence_output() -> None:
    """Points stdout nowhere, so that the interpreter's own flush at exit cannot fail on a closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
