"""The command line as a process of its own, on the bundled model: streams, signals, a terminal."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu

MODEL = Path(__file__).resolve().parents[2] / "models" / "phi3-tiny"
RUN = [sys.executable, "-m", "phiquant"]
BEGINNING = "Once upon a time there was a little girl"
CONTINUED = " who had been a little girl, and she was so pleased that she was so pleased with her,"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "tiny-F16.gguf"
    done = subprocess.run(
        [*RUN, "convert", str(MODEL), "--outfile", str(file), "--outtype", "f16"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return file


def run(*arguments: str | Path, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)],
        input=text,
        stdin=None if text is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_a_greedy_continuation(model: Path) -> None:
    done = run("run", model, "-no-cnv", "-p", BEGINNING, "-n", "20", "--temp", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == BEGINNING + CONTINUED + "\n"
    assert "prompt 9 tokens" in done.stderr
    assert "generated 20 tokens" in done.stderr
    assert "peak memory" in done.stderr


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_printed(model: Path) -> None:
    done = run("run", model, "-no-cnv", "-p", "a word " * 100, "-c", "32")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "does not fit the context of 32" in done.stderr


def test_a_seed_gives_the_same_text_again(model: Path) -> None:
    arguments = ("run", model, "-no-cnv", "-n", "12", "--quiet", "-s")
    first, again, other = (run(*arguments, seed, text=BEGINNING) for seed in ("5", "5", "6"))
    assert first.stdout == again.stdout != other.stdout
    assert first.stderr == ""


def test_constraints_and_samplers(model: Path, tmp_path: Path) -> None:
    (tmp_path / "yes.gbnf").write_text('root ::= "yes" | "no"\n')
    quiet = ("run", model, "-no-cnv", "-p", "Well: ", "--no-display-prompt", "-q", "-s", "3")
    assert run(*quiet, "--grammar-file", tmp_path / "yes.gbnf").stdout in ("yes\n", "no\n")
    schema = '{"type": "array", "items": {"enum": ["a", "é"]}, "minItems": 2, "maxItems": 3}'
    found = json.loads(run(*quiet, "-j", schema).stdout)
    assert 2 <= len(found) <= 3
    assert set(found) <= {"a", "é"}
    first, again, other = (
        run(*quiet, "-n", "12", "--samplers", chain, "--top-k", "1").stdout
        for chain in ("top_k;temperature", "top-k;temp", "temperature")
    )
    assert first == again != other
    for arguments, told in (
        (("--samplers", "magic"), "there is no sampler 'magic'"),
        (("--grammar", "root := x"), "the grammar cannot be used"),
        (("-j", "{"), "the JSON schema is not valid JSON"),
        (("-l", "5*2"), "--logit-bias takes TOKEN+BIAS"),
        (("-l", "99999+2"), "logit_bias names 99999, which is no token id below 32064"),
    ):
        done = run(*quiet, *arguments)
        assert done.returncode in (1, 2)
        assert done.stdout == ""
        assert told in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_reference_backend_is_not_what_runs(model: Path) -> None:
    done = run("run", model, "-no-cnv", "-p", BEGINNING, "-n", "1", PHIQUANT_LOWERING="nonsense")
    assert done.returncode == 1
    assert "PHIQUANT_LOWERING" in done.stderr


def test_gpu_layers_are_accepted_and_explained_in_one_line(model: Path) -> None:
    done = run("run", model, "-no-cnv", "-p", BEGINNING, "-n", "1", "-ngl", "99")
    assert done.returncode == 0
    notes = [line for line in done.stderr.splitlines() if "GPU" in line]
    assert len(notes) == 1
    assert "CPU" in notes[0]


def test_special_tokens_are_parsed_in_a_prompt_but_not_in_a_message(model: Path) -> None:
    raw = run("run", model, "-no-cnv", "-p", "a<|end|>b", "-n", "1", "--verbose-prompt")
    assert "32007  " in raw.stderr
    chat = run("run", model, "-p", "a<|end|>b", "-n", "1", "-st", "--verbose-prompt")
    ends = [line for line in chat.stderr.splitlines() if line.strip().startswith("32007 ")]
    assert len(ends) == 1, "the template's own, at the end of the message"


def test_the_first_start_is_announced_and_the_second_is_not(model: Path, tmp_path: Path) -> None:
    line = "compiling kernels for this processor, once"
    arguments = ("run", model, "-no-cnv", "-p", BEGINNING, "-n", "1")
    first = run(*arguments, PHIQUANT_CACHE_DIR=str(tmp_path))
    second = run(*arguments, PHIQUANT_CACHE_DIR=str(tmp_path))
    assert first.returncode == second.returncode == 0
    assert first.stderr.count(line) == 1
    assert line not in second.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "none.gguf"], "none.gguf"),
        (["run", "none.gguf", "-p", "x"], "none.gguf"),
        (["convert", "none"], "none"),
        (["quantize", str(MODEL), "Q9_Z"], "Q9_Z"),
        (["quantize", str(MODEL)], "quantize takes IN [OUT] TYPE [NTHREADS]"),
        (["convert", str(MODEL), "--outfile", "no/such/folder/x.gguf"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run(*arguments)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert done.stderr.startswith("phiquant: error: ")
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    for verb in ("inspect", "run"):
        done = run(verb, file, text="")
        assert done.returncode == 1
        assert done.stderr.startswith("phiquant: error: ")
        assert "defect" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a pipe's reader goes away")
@pytest.mark.parametrize("verb", ["inspect", "run"])
def test_a_closed_pipe_is_silent(verb: str, model: Path) -> None:
    options = [] if verb == "inspect" else ["-no-cnv", "-p", BEGINNING, "-n", "500", "--quiet", "--temp", "0"]
    process = subprocess.Popen(
        [*RUN, verb, str(model), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    status = process.wait(60)
    assert errors == ""
    assert status == 141


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_ends_a_generation_without_a_traceback(model: Path) -> None:
    process = subprocess.Popen(
        [*RUN, "run", str(model), "-no-cnv", "-p", BEGINNING, "--temp", "0.8"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(len(BEGINNING) + 4)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert time.monotonic() - begun < 10


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("seconds", [0, 0.2, 0.6])
def test_ctrl_c_ends_a_first_start_without_a_traceback(model: Path, tmp_path: Path, seconds: float) -> None:
    """While kernels are compiled by several threads."""
    process = subprocess.Popen(
        [*RUN, "run", str(model), "-no-cnv", "-p", BEGINNING, "-n", "200"],
        env={**os.environ, "PHIQUANT_CACHE_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert b"compiling kernels for this processor, once" in process.stderr.readline()
    time.sleep(seconds)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert b"Exception" not in errors
    assert time.monotonic() - begun < 20


EDITING, ANSWERING = "\x1b[?2004h", "\x1b[?2004l"  # the editor takes the terminal (bracketed paste), and gives it back


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        import fcntl
        import pty
        import struct
        import termios

        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(home)}
        self.seen = ""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
            os.execve(sys.executable, [*RUN, *arguments], environment)

    def send(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Reads until a text appears; returns what came, and forgets it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                try:
                    data = os.read(self.descriptor, 65536)
                except OSError:
                    data = b""
                assert data, f"ended without {text!r}: {self.seen!r}"
                self.seen += data.decode("utf-8", "replace")
                if b"\x1b[6n" in data:  # a terminal says where its cursor is when it is asked
                    self.send("\x1b[1;1R")
        before, _, self.seen = self.seen.partition(text)
        return before

    def status(self) -> int:
        while True:  # a process whose output nobody reads may never end
            try:
                if not os.read(self.descriptor, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def chat(model: Path, tmp_path: Path) -> Iterator[Any]:
    terminal = Terminal(["run", str(model), "-n", "8", "-s", "1"], tmp_path)
    yield terminal
    os.close(terminal.descriptor)


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
@pytest.mark.filterwarnings("ignore:.*use of forkpty.*:DeprecationWarning")
def test_a_chat_at_a_terminal(chat: Any, tmp_path: Path) -> None:
    chat.wait_for("/help lists the commands")
    chat.send("a first line\x1b\rand a second\r")  # Alt-Enter between them
    chat.wait_for("[8 tokens")
    chat.wait_for("2048 tokens used")
    chat.wait_for(EDITING)
    chat.send("ends in a backslash\\\rhere\r")
    chat.wait_for("[8 tokens")
    chat.wait_for(EDITING)
    chat.send(f"/save {tmp_path / 'saved.json'}\r")
    chat.wait_for("[saved to")
    chat.send("/regen\r")
    chat.wait_for("[8 tokens")
    chat.wait_for(EDITING)
    chat.send("\x03")
    chat.wait_for("Ctrl-C again")
    chat.wait_for(EDITING)
    chat.send("\x04")
    assert chat.status() == 0
    saved = (tmp_path / "saved.json").read_text(encoding="utf-8")
    assert "a first line\\nand a second" in saved
    assert "ends in a backslash\\nhere" in saved
    history = tmp_path / "phiquant" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "a first line" in history.read_text(encoding="utf-8")


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
@pytest.mark.filterwarnings("ignore:.*use of forkpty.*:DeprecationWarning")
def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(model: Path, tmp_path: Path) -> None:
    terminal = Terminal(["run", str(model), "-s", "1", "-n", "1500", "--min-p", "0.2"], tmp_path)
    terminal.wait_for("/help lists the commands")
    terminal.send("Tell me a story.\r")
    terminal.wait_for(ANSWERING)
    time.sleep(0.5)
    terminal.send("\x03")
    terminal.wait_for("[stopped]")
    terminal.wait_for(EDITING)
    terminal.send("/exit\r")
    assert terminal.status() == 0
    os.close(terminal.descriptor)
