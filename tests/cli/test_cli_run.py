"""`phiquant run`: llama-cli's names and manners, on a model that echoes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

import phiquant.llm
from phiquant.cli import app, run
from phiquant.engine import Sampling
from phiquant.errors import RequestError


class Stdin:
    def __init__(self, data: bytes = b"", *, terminal: bool = False) -> None:
        self.buffer = io.BytesIO(data)
        self._lines = io.StringIO(data.decode("utf-8", "replace"))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def readline(self) -> str:
        return self._lines.readline()


@pytest.fixture
def loaded(llm: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces LLM.load; the arguments it was given appear in the result."""
    given: dict[str, Any] = {}

    def load(path: Path, **options: Any) -> Any:
        given.update(options, path=path)
        return llm

    monkeypatch.setattr(phiquant.llm.LLM, "load", load)
    monkeypatch.setattr("sys.stdin", Stdin(terminal=True))
    return given


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> run.RunOptions:
    caught: list[run.RunOptions] = []
    monkeypatch.setattr(run, "run", lambda options: caught.append(options) or 0)
    assert app.run(["run", *arguments]) == 0
    return caught[0]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["-m", "x.gguf"], "model", Path("x.gguf")),
        (["--model", "x.gguf"], "model", Path("x.gguf")),
        (["x.gguf"], "model", Path("x.gguf")),
        (["x.gguf", "-p", "hi"], "prompt", "hi"),
        (["x.gguf", "--prompt", "-- hi"], "prompt", "-- hi"),
        (["x.gguf", "-f", "p.txt"], "file", Path("p.txt")),
        (["x.gguf", "-sys", "be brief"], "system_prompt", "be brief"),
        (["x.gguf", "--system-prompt", "be brief"], "system_prompt", "be brief"),
        (["x.gguf", "-n", "-1"], "n_predict", -1),
        (["x.gguf", "--predict", "3"], "n_predict", 3),
        (["x.gguf", "--n-predict", "3"], "n_predict", 3),
        (["x.gguf", "--n_predict", "3"], "n_predict", 3),
        (["x.gguf", "-c", "0"], "ctx_size", 0),
        (["x.gguf", "--ctx-size", "512"], "ctx_size", 512),
        (["x.gguf", "--cache-type", "q8_0"], "cache_type", "q8_0"),
        (["x.gguf", "--kv-type", "q4_0"], "cache_type", "q4_0"),
        (["x.gguf", "--cache-type-k", "f32"], "cache_type", "f32"),
        (["x.gguf", "-ctk", "q8_0"], "cache_type", "q8_0"),
        (["x.gguf", "-t", "3"], "threads", 3),
        (["x.gguf", "--bf16-dot"], "bf16_dot", True),
        (["x.gguf", "-ngl", "99"], "gpu_layers", "99"),
        (["x.gguf", "--gpu-layers", "all"], "gpu_layers", "all"),
        (["x.gguf", "--n-gpu-layers", "-1"], "gpu_layers", "-1"),
        (["x.gguf", "--temp", "0"], "temperature", 0),
        (["x.gguf", "--temperature", "0.5"], "temperature", 0.5),
        (["x.gguf", "--top-k", "1"], "top_k", 1),
        (["x.gguf", "--top-p", "0.5"], "top_p", 0.5),
        (["x.gguf", "--min-p", "0.1"], "min_p", 0.1),
        (["x.gguf", "--repeat-penalty", "1.1"], "repeat_penalty", 1.1),
        (["x.gguf", "--samplers", "top_k;temperature"], "samplers", "top_k;temperature"),
        (["x.gguf", "--typical", "0.9"], "typical", 0.9),
        (["x.gguf", "--typical-p", "0.9"], "typical", 0.9),
        (["x.gguf", "--top-n-sigma", "1.5"], "top_n_sigma", 1.5),
        (["x.gguf", "--xtc-probability", "0.5"], "xtc_probability", 0.5),
        (["x.gguf", "--xtc-threshold", "0.2"], "xtc_threshold", 0.2),
        (["x.gguf", "--dynatemp-range", "0.5"], "dynatemp_range", 0.5),
        (["x.gguf", "--dynatemp-exp", "2"], "dynatemp_exp", 2),
        (["x.gguf", "--presence-penalty", "0.5"], "presence_penalty", 0.5),
        (["x.gguf", "--frequency-penalty", "-0.5"], "frequency_penalty", -0.5),
        (["x.gguf", "--repeat-last-n", "-1"], "repeat_last_n", -1),
        (["x.gguf", "--dry-multiplier", "0.8"], "dry_multiplier", 0.8),
        (["x.gguf", "--dry-base", "2"], "dry_base", 2),
        (["x.gguf", "--dry-allowed-length", "3"], "dry_allowed_length", 3),
        (["x.gguf", "--dry-penalty-last-n", "100"], "dry_penalty_last_n", 100),
        (
            ["x.gguf", "--dry-sequence-breaker", ":", "--dry-sequence-breaker", "*"],
            "dry_sequence_breaker",
            (":", "*"),
        ),
        (["x.gguf", "--mirostat", "2"], "mirostat", 2),
        (["x.gguf", "--mirostat-lr", "0.2"], "mirostat_lr", 0.2),
        (["x.gguf", "--mirostat-ent", "3"], "mirostat_ent", 3),
        (["x.gguf", "-l", "5+1", "--logit-bias", "7-inf"], "logit_bias", ("5+1", "7-inf")),
        (["x.gguf", "--ignore-eos"], "ignore_eos", True),
        (["x.gguf", "--grammar", 'root ::= "x"'], "grammar", 'root ::= "x"'),
        (["x.gguf", "--grammar-file", "g.gbnf"], "grammar_file", Path("g.gbnf")),
        (["x.gguf", "-j", "{}"], "json_schema", "{}"),
        (["x.gguf", "--json-schema", "{}"], "json_schema", "{}"),
        (["x.gguf", "-jf", "s.json"], "json_schema_file", Path("s.json")),
        (["x.gguf", "--json-schema-file", "s.json"], "json_schema_file", Path("s.json")),
        (["x.gguf", "-s", "7"], "seed", 7),
        (["x.gguf", "--seed", "7"], "seed", 7),
        (["x.gguf", "-no-cnv"], "conversation", False),
        (["x.gguf", "--no-conversation"], "conversation", False),
        (["x.gguf", "-cnv"], "conversation", True),
        (["x.gguf", "-st"], "single_turn", True),
        (["x.gguf", "--single-turn"], "single_turn", True),
        (["x.gguf", "-e"], "escape", True),
        (["x.gguf", "--no-escape"], "escape", False),
        (["x.gguf", "--no-escapes"], "escape", False),
        (["x.gguf", "--no-display-prompt"], "display_prompt", False),
        (["x.gguf", "--verbose-prompt"], "verbose_prompt", True),
        (["x.gguf", "--quiet"], "quiet", True),
    ],
)
def test_names_of_llama_cli(arguments: list[str], name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(parsed(monkeypatch, *arguments), name) == value


def test_defaults_of_llama_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch, "x.gguf") == run.RunOptions(Path("x.gguf"))
    assert run.RunOptions(Path("x.gguf")).sampling() == {
        "max_tokens": None,
        "ignore_eos": False,
        "seed": None,
        "temperature": 0.8,
        "dynatemp_range": 0.0,
        "dynatemp_exponent": 1.0,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "xtc_probability": 0.0,
        "xtc_threshold": 0.1,
        "mirostat": 0,
        "mirostat_eta": 0.1,
        "mirostat_tau": 5.0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repeat_last_n": 64,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": -1,
        "logit_bias": {},
        "grammar": None,
    }
    defaults = Sampling()
    for name, value in run.RunOptions(Path("x.gguf")).sampling().items():
        if hasattr(defaults, name) and name not in ("seed", "logit_bias"):
            assert value == getattr(defaults, name), name


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"a\nb", "a\nb"),
        (r"\t\r\'\"\\", "\t\r'\"\\"),
        (r"\\n", r"\n"),
        (r"\xC3\xa9", "é"),
        (r"\x4", r"\x4"),
        (r"\xZZ \q \u1234", r"\xZZ \q \u1234"),
        ("ends in \\", "ends in \\"),
        ("déjà \\n", "déjà \n"),
    ],
)
def test_escapes(written: str, meant: str) -> None:
    assert run.unescaped(written) == meant


def test_escapes_that_are_no_text() -> None:
    with pytest.raises(RequestError, match="UTF-8"):
        run.unescaped(r"\xff")


def test_a_checkpoint_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"phiquant quantize {tmp_path} Q4_K_M"):
        run.chosen_model(str(tmp_path), None)
    with pytest.raises(RequestError, match="phiquant quantize microsoft/Phi-3"):
        run.chosen_model("microsoft/Phi-3.5-mini-instruct", None)
    assert run.chosen_model("folder/model.gguf", None) == Path("folder/model.gguf")


def test_continuation_repeats_the_prompt(llm: Any, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["run", "x.gguf", "-no-cnv", "-p", r"one\ntwo", "-n", "4", "-t", "-1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "one\ntwoecho one\ntwo\n"
    assert llm.asked == ["one\ntwo"]
    assert llm.options[0]["max_tokens"] == 4
    assert loaded["threads"] == 0
    assert loaded["context"] == 4096
    assert "prompt 5 tokens (2 of them known), 10.0 tokens/s; generated 2 tokens, 20.0 tokens/s" in captured.err


def test_quiet_and_no_display_prompt(llm: Any, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    llm.notes.append("no GPU backend")
    assert app.run(["run", "x.gguf", "-no-cnv", "-p", r"a\nb", "--no-display-prompt", "--no-escape", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "echo a\\nb\n"
    assert captured.err == ""


def test_what_is_not_done_is_told_in_one_line(
    llm: Any, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    llm.notes.append("no GPU backend is installed")
    assert app.run(["run", "x.gguf", "-no-cnv", "-p", "a", "-ngl", "99"]) == 0
    assert loaded["gpu_layers"] == 99
    assert capsys.readouterr().err.splitlines()[0] == "phiquant: note: no GPU backend is installed"


def test_a_full_context_is_told(llm: Any, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    llm.finish_reason = "length"
    assert app.run(["run", "x.gguf", "-no-cnv", "-p", "a"]) == 0
    assert "the context of 100 tokens is full" in capsys.readouterr().err
    assert app.run(["run", "x.gguf", "-no-cnv", "-p", "a", "-n", "2"]) == 0
    assert "is full" not in capsys.readouterr().err, "two tokens were asked for, and two came"


def test_a_chat_is_the_default_and_st_ends_it(
    llm: Any, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["run", "x.gguf", "-p", "hello", "-st", "-sys", "be brief", "-s", "3"]) == 0
    assert capsys.readouterr().out == "echo hello\n"
    assert llm.asked == [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]]
    assert llm.options[0]["seed"] == 3


def test_without_a_template_it_continues(llm: Any, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    llm.tokenizer.chat_template = None
    assert app.run(["run", "x.gguf", "-p", "once"]) == 0
    assert capsys.readouterr().out == "onceecho once\n"
    assert app.run(["run", "x.gguf"]) == 1
    assert "no chat template" in capsys.readouterr().err
    assert app.run(["run", "x.gguf", "-p", "once", "-sys", "x"]) == 1
    assert "system prompt" in capsys.readouterr().err


def test_a_continuation_needs_a_text(loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["run", "x.gguf", "-no-cnv"]) == 1
    assert "no text to continue" in capsys.readouterr().err


def test_prompt_from_a_file_and_from_stdin(
    llm: Any,
    loaded: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from\\ta file\n\n", encoding="utf-8")
    assert app.run(["run", "x.gguf", "-no-cnv", "-f", str(file)]) == 0
    assert llm.asked[-1] == "from\ta file\n"
    monkeypatch.setattr("sys.stdin", Stdin("from \\t stdin é\n".encode()))
    assert app.run(["run", "x.gguf", "-no-cnv"]) == 0
    assert llm.asked[-1] == "from \\t stdin é"
    monkeypatch.setattr("sys.stdin", Stdin(b"one message\nof two lines\n"))
    assert app.run(["run", "x.gguf"]) == 0
    assert llm.asked[-1] == [{"role": "user", "content": "one message\nof two lines"}]
    monkeypatch.setattr("sys.stdin", Stdin(b"\xff"))
    assert app.run(["run", "x.gguf"]) == 1
    assert "the standard input is not UTF-8 text (byte 0)" in capsys.readouterr().err
    assert app.run(["run", "x.gguf", "-f", str(tmp_path / "none")]) == 1
    assert "none does not exist" in capsys.readouterr().err


def test_with_cnv_every_line_of_stdin_is_a_message(
    llm: Any, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(b"one\ntwo \\\nlines\n\n/exit\nnever\n"))
    assert app.run(["run", "x.gguf", "-cnv", "-p", "zero"]) == 0
    assert [asked[-1]["content"] for asked in llm.asked] == ["zero", "one", "two \nlines"]
    assert capsys.readouterr().out == "echo zero\necho one\necho two \nlines\n"


def test_ctrl_c_in_a_continuation(llm: Any, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    llm.interrupt_after = 1
    assert app.run(["run", "x.gguf", "-no-cnv", "-p", "a b c"]) == 130
    assert app.run(["run", "x.gguf", "-p", "a b c", "-st"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_tokens_of_the_prompt(llm: Any, loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["run", "x.gguf", "-no-cnv", "-p", "hi", "--verbose-prompt"]) == 0
    assert capsys.readouterr().err.startswith("   104  'h'\n   105  'i'\n")


def test_a_terminal_is_not_steered(terminal: Any) -> None:
    printer = run.Printer(terminal)
    printer.write("a\x1b[2Jb\tc\n\x9b\x07é\r")
    assert terminal.getvalue() == "a[2Jb\tc\né"
    file = io.StringIO()
    run.Printer(file).write("a\x1b[2J")
    assert file.getvalue() == "a\x1b[2J"
