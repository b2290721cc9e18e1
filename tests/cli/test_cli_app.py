"""Verbs, errors and exit statuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phiquant import __version__
from phiquant.cli import app, commands
from phiquant.cli.failures import os_sentence
from phiquant.errors import GGUFError


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def doctor() -> None:
        """Doc."""
        raise error

    monkeypatch.setattr(commands, "doctor", doctor)


def test_version_and_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"phiquant {__version__}\n"
    assert app.run(["--help"]) == 0
    overview = capsys.readouterr().out
    assert app.run([]) == 2
    assert all(verb in overview for verb in app.VERBS)


@pytest.mark.parametrize("verb", app.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([verb, "--help"]) == 0
    first = capsys.readouterr().out
    assert f"phiquant {verb}" in first
    assert app.run(["help", verb]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quantise", "a", "b"], "no verb 'quantise'; did you mean quantize?"),
        (["xyzzy"], f"no verb 'xyzzy'; the verbs are {', '.join(app.VERBS)}"),
        (["--verson"], "no option '--verson'"),
        (["run", "--tempp", "1"], "no option --tempp; did you mean --temp?"),
        (["run", "--ctx-siz", "1"], "no option --ctx-siz; did you mean --ctx-size?"),
        (["run", "-n", "many"], "not an integer"),
        (["run", "--temp", "hot"], "not a number"),
        (["run", "-m"], "requires an argument"),
        (["run"], "no model is named"),
        (["run", "a.gguf", "-m", "b.gguf"], "two models"),
        (["run", "a.gguf", "-p", "x", "-f", "y"], "give one"),
        (["run", "a.gguf", "-ngl", "some"], "--gpu-layers"),
        (["inspect"], "no model is named"),
        (["inspect", "a.gguf", "-hf", "org/name"], "two models"),
        (["perplexity", "-hf", "org/name", "-m", "b.gguf"], "two models"),
        (["split", "a.gguf"], "instead of IN and OUT"),
    ],
)
def test_wrong_usage_is_a_sentence_and_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("phiquant: error: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err


def test_errors_of_the_package_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PHIQUANT_DEBUG", raising=False)
    fail_with(monkeypatch, GGUFError("x.gguf is cut short; download it again"))
    assert app.run(["doctor"]) == 1
    assert capsys.readouterr().err == "phiquant: error: x.gguf is cut short; download it again\n"


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_adds_the_traceback(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, GGUFError("broken"))
    if how == "environment":
        monkeypatch.setenv("PHIQUANT_DEBUG", "1")
    assert app.run(["doctor", "--debug"] if how == "option" else ["doctor"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("phiquant: error: broken\n")


def test_a_defect_is_called_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))
    assert app.run(["doctor"]) == 1
    error = capsys.readouterr().err
    assert "defect of phiquant (ZeroDivisionError: division by zero)" in error
    assert "Traceback" not in error


def test_interrupts_and_closed_pipes_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert app.run(["doctor"]) == 130
    fail_with(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    monkeypatch.setattr(app, "silence_output", lambda: None)
    assert app.run(["doctor"]) == 141
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "a.gguf"), "a.gguf does not exist; check the path"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a cannot be opened: permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"d"), "d is a directory where a file is needed"),
        (OSError(errno.ENOSPC, "No space left", "out"), "the disk is full while writing out; free some space"),
        (OSError(errno.ENOSPC, "No space left"), "the disk is full; free some space"),
        (OSError(errno.EIO, "Input/output error", "f"), "f cannot be used: Input/output error"),
        (OSError("odd"), "the system reports: odd"),
    ],
)
def test_errors_of_the_system_become_sentences(error: OSError, sentence: str) -> None:
    assert os_sentence(error).startswith(sentence)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--ctx_size", "8"], ["--ctx-size", "8"]),
        (["--n_predict=3"], ["--n-predict=3"]),
        (["--override-kv", "a_b=int:1"], ["--override-kv", "a_b=int:1"]),
        (["-p", "snake_case"], ["-p", "snake_case"]),
        (["--", "--a_b"], ["--", "--a_b"]),
        (["-p", "--not an_option"], ["-p", "--not an_option"]),
    ],
)
def test_underscores_in_option_names(given: list[str], expected: list[str]) -> None:
    assert app.hyphenated(given) == expected


def test_the_module_is_the_script(tmp_path: Path) -> None:
    environment = {**os.environ, "PHIQUANT_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "phiquant", "nonsense"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.startswith("phiquant: error: no verb 'nonsense'")


def test_the_overview_imports_nothing_heavy() -> None:
    program = (
        "import sys; from phiquant.cli import app; app.run(['--help'])\n"
        "print(sorted({'numpy', 'typer', 'rich', 'llvmlite', 'prompt_toolkit'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("[]\n")
