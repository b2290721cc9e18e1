"""`phiquant run`: continues a prompt, or chats; text goes to stdout as it comes, everything else to stderr."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import RequestError
from .failures import WrongUsage
from .memory import peak_bytes, sized
from .notices import Notices
from .sampling import SamplingOptions

if TYPE_CHECKING:
    from ..completion import Options
    from ..llm import LLM, Completion, CompletionChunk

__all__ = ["Printer", "RunOptions", "chosen_model", "run", "unescaped"]


@dataclass(frozen=True)
class RunOptions(SamplingOptions):
    """The options of `phiquant run`, as they were given; `commands.run` says what they mean."""

    model: Path
    prompt: str | None = None
    file: Path | None = None
    system_prompt: str | None = None
    ctx_size: int = 4096
    cache_type: str = "f16"
    threads: int = 0
    gpu_layers: str = "auto"
    speculate: bool = True
    draft_model: Path | None = None
    pack: bool = True
    bf16_dot: bool = False
    conversation: bool | None = None
    single_turn: bool = False
    escape: bool = True
    display_prompt: bool = True
    verbose_prompt: bool = False
    quiet: bool = False


def chosen_model(path: str | None, model: str | None) -> Path:
    """The file to run. Errors: WrongUsage if none or two are named, RequestError if it is a checkpoint, not a file."""
    if path is not None and model is not None:
        raise WrongUsage(f"two models are named, {path} and {model}")
    name = path if model is None else model
    if name is None:
        raise WrongUsage("no model is named: phiquant run MODEL.gguf")
    file = Path(name)
    if file.is_dir() or (not file.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".gguf")):
        raise RequestError(
            f"{name} is not a GGUF file; if it is a checkpoint, make one of it first: phiquant quantize {name} Q4_K_M"
        )
    return file


def run(options: RunOptions) -> int:
    """Runs the model; returns the exit status."""
    layers = _gpu_layers(options.gpu_layers)
    if options.draft_model is not None and not options.speculate:
        raise WrongUsage("--draft-model guesses, and --no-speculate forbids it; give one")
    notices = Notices(quiet=options.quiet)
    prompt, complete = _prompt(options)
    sampling = options.sampling()
    from ..llm import LLM

    with LLM.load(
        options.model,
        context=options.ctx_size,
        cache_type=options.cache_type,
        threads=max(options.threads, 0),
        gpu_layers=layers,
        speculate=options.speculate,
        draft_model=options.draft_model,
        pack=options.pack,
        bf16_dot=options.bf16_dot,
        progress=notices.progress,
    ) as llm:
        notices.clear()
        for note in llm.notes:
            notices.note(note)
        printer = Printer(sys.stdout)
        has_template = llm.tokenizer.chat_template is not None
        if options.conversation is None and not has_template and prompt is None:
            raise RequestError("the model has no chat template; give it a text to continue: --prompt or --file")
        if has_template if options.conversation is None else options.conversation:
            return _chat(llm, options, sampling, prompt, complete, printer, notices)
        return _continue(llm, options, sampling, prompt, printer, notices)


def _gpu_layers(text: str) -> int:
    if text in ("auto", "-1"):
        return 0
    if text == "all":
        return 1 << 16
    if not text.isdecimal():
        raise WrongUsage(f"--gpu-layers takes a number, auto or all, not {text!r}")
    return int(text)


def _prompt(options: RunOptions) -> tuple[str | None, bool]:
    """The prompt, and whether it is all there is to say (nobody is at the keyboard)."""
    if options.prompt is not None and options.file is not None:
        raise WrongUsage("--prompt and --file are two prompts; give one")
    alone = options.single_turn or not (sys.stdin and sys.stdin.isatty())
    if options.prompt is None and options.file is None:
        if options.conversation or not sys.stdin or sys.stdin.isatty():
            return None, options.single_turn
        return _text(sys.stdin.buffer.read(), "the standard input"), True
    text = options.prompt if options.file is None else _text(options.file.read_bytes(), str(options.file))
    assert text is not None
    # With --conversation said in so many words, further messages come from stdin even if it is not a terminal.
    return unescaped(text) if options.escape else text, alone and (options.single_turn or not options.conversation)


def _text(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{source} is not UTF-8 text (byte {error.start}); convert it first") from None
    return text.removesuffix("\n")


_ESCAPE = re.compile(rb"""\\([nrt'"\\]|x[0-9a-fA-F]{2})""")
_PLAIN = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}


def unescaped(text: str) -> str:
    r"""A prompt with \n \r \t \' \" \\ and \xNN (a byte) replaced; other backslashes stay, as with llama-cli."""

    def replace(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code[1:], 16)]) if code[:1] == b"x" else _PLAIN[code]

    try:
        return _ESCAPE.sub(replace, text.encode("utf-8", "surrogateescape")).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(
            r"the prompt's \x escapes do not form UTF-8 text; --no-escape takes them as they are"
        ) from None


class Printer:
    """Writes text as it comes; on a terminal without the control characters that a text could steer it with."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._last = "\n"
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")

    def write(self, text: str) -> None:
        """Write and flush."""
        if self._terminal:
            text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
        if text:
            self._stream.write(text)
            self._stream.flush()
            self._last = text[-1]

    def finish_line(self) -> None:
        """A line end, unless the text had one."""
        if self._last != "\n":
            self.write("\n")


def show(chunks: Iterable[CompletionChunk], printer: Printer) -> Completion:
    """Prints a stream to its end and returns the whole."""
    for chunk in chunks:
        printer.write(chunk.text)
        if chunk.completion is not None:
            return chunk.completion
    raise AssertionError("a stream ends with the whole completion")


def summary(completion: Completion) -> str:
    """Speeds and memory in a line."""
    usage, timings = completion.usage, completion.timings
    cached = f" ({usage.cached_tokens} of them known)" if usage.cached_tokens else ""
    parts = [f"prompt {usage.prompt_tokens} tokens{cached}, {timings.prompt_per_second:.1f} tokens/s"]
    parts.append(f"generated {usage.completion_tokens} tokens")
    if usage.completion_tokens > 1:
        parts[-1] += f", {timings.decode_per_second:.1f} tokens/s"
    if timings.accepted:
        parts.append(f"{timings.accepted} of {timings.drafted} guesses right")
    peak = peak_bytes()
    if peak is not None:
        parts.append(f"peak memory {sized(peak)}")
    return "; ".join(parts)


def _continue(
    llm: LLM, options: RunOptions, sampling: Options, prompt: str | None, printer: Printer, notices: Notices
) -> int:
    if options.system_prompt is not None:
        raise RequestError("a system prompt needs a chat, and this is a plain continuation; leave out -sys or -no-cnv")
    if prompt is None:
        raise RequestError("there is no text to continue; give it with --prompt or --file")
    if options.verbose_prompt:
        list_tokens(llm, llm.tokenize(prompt))
    with closing(llm.generate(prompt, stream=True, **sampling)) as chunks:  # type: ignore[type-var]
        if options.display_prompt:  # not before the prompt has been accepted
            printer.write(prompt)
        completion = show(chunks, printer)
    printer.finish_line()
    finish(llm, options, completion, notices)
    return 0


def finish(llm: LLM, options: RunOptions, completion: Completion, notices: Notices) -> None:
    """What is said on stderr after a text."""
    if completion.finish_reason == "length" and not 0 <= options.n_predict <= completion.usage.completion_tokens:
        notices.note(f"the context of {llm.context} tokens is full; --ctx-size asks for a larger one")
    notices.line(summary(completion))


def list_tokens(llm: LLM, ids: list[int]) -> None:
    """A prompt's tokens, one a line, on stderr."""
    for token in ids:
        print(f"{token:6d}  {llm.tokenizer.token_bytes(token).decode('utf-8', 'replace')!r}", file=sys.stderr)


def _chat(
    llm: LLM,
    options: RunOptions,
    sampling: Options,
    prompt: str | None,
    complete: bool,
    printer: Printer,
    notices: Notices,
) -> int:
    from .chat import Chat, interactive, reader

    chat = Chat(llm, sampling, printer, notices, system=options.system_prompt)
    if options.verbose_prompt and prompt is not None:
        list_tokens(llm, chat.ids(prompt))
    if complete and prompt is not None:
        completion = chat.say(prompt)
        printer.finish_line()
        if completion is None:
            return 130
        finish(llm, options, completion, notices)
        return 0
    return interactive(chat, reader(chat), first=prompt, single=options.single_turn)
