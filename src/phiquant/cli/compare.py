"""`phiquant compare A B -p PROMPT`: what two models make of a prompt, side by side, and where they part."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phiquant.cli.failures import WrongUsage
from phiquant.cli.inspect import printable
from phiquant.cli.models import path_of
from phiquant.cli.notices import Notices
from phiquant.cli.reading import ReadingBar
from phiquant.cli.run import unescaped
from phiquant.errors import RequestError
from phiquant.gguf import open_model
from phiquant.text import Tokenizer

if TYPE_CHECKING:
    from phiquant.completion import Options
    from phiquant.eval.continuations import Continuation, Parting
    from phiquant.hub import Reference

__all__ = ["CompareOptions", "compare", "prompt_ids"]

MARK = ">>"
"""Before the first token that differs, where colour does not say it."""

_UNSEEN_WIDTH = 100  # columns when the output goes to a file or a pipe
_FORMS = ("text", "json")


@dataclass(frozen=True)
class CompareOptions:
    """As they were given; `commands.compare` says what they mean."""

    models: tuple[Path | Reference, Path | Reference]
    prompt: str | None = None
    n_predict: int = 64
    conversation: bool | None = None
    system_prompt: str | None = None
    escape: bool = True
    temperature: float = 0.0
    seed: int = 0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    ctx_size: int = 4096
    cache_type: str = "f16"
    output: str = "text"
    threads: int = 0
    quiet: bool = False


@dataclass(frozen=True)
class _Found:
    """Both texts, and why they are compared as texts alone, if they are."""

    paths: tuple[Path, Path]
    chat: bool
    left: Continuation
    right: Continuation
    texts_only: str | None

    @property
    def parting(self) -> Parting | None:
        from phiquant.eval.continuations import parting

        return None if self.texts_only else parting(self.left, self.right)

    @property
    def characters(self) -> int | None:
        """The length of what both have in common; None if that is all."""
        from phiquant.eval.continuations import text_parting

        parting = self.parting
        if parting is not None:
            return len("".join(self.left.pieces[: parting.tokens]))
        return text_parting(self.left.text, self.right.text) if self.texts_only else None


def compare(options: CompareOptions) -> int:
    """Run both models, one after the other, and show what they say."""
    if options.output not in _FORMS:
        raise WrongUsage(f"the output is {' or '.join(_FORMS)}, not {options.output!r}")
    if options.prompt is None:
        raise WrongUsage("give both models something to continue with -p")
    if options.n_predict < 1:
        raise WrongUsage("at least one token must be generated; give -n 1 or more")
    prompt = unescaped(options.prompt) if options.escape else options.prompt
    paths = [path_of(model, quiet=options.quiet) for model in options.models]
    tokenizers = []
    for path in paths:
        with open_model(path) as opened:
            tokenizers.append(Tokenizer.from_gguf(opened))
    templates = [tokenizer.chat_template is not None for tokenizer in tokenizers]
    chat = all(templates) if options.conversation is None else options.conversation
    if options.system_prompt is not None and not chat:
        raise RequestError("a system prompt needs a chat, and this is a plain continuation; leave out -sys or --raw")
    notices = Notices(quiet=options.quiet)
    left, right = (_continued(path, prompt, chat, options, notices) for path in paths)
    texts_only = None
    if list(tokenizers[0].vocabulary.tokens) != list(tokenizers[1].vocabulary.tokens):
        texts_only = "The models have different vocabularies, so that only their texts are compared."
    elif left.prompt != right.prompt:
        texts_only = "The models' chat templates differ, so that only their texts are compared."
    found = _Found((paths[0], paths[1]), chat, left, right, texts_only)
    if options.output == "json":
        print(json.dumps(_document(found, prompt), ensure_ascii=False, indent=2))
    else:
        _print(found, options)
    return 0


def prompt_ids(llm: Any, prompt: str, *, chat: bool, system: str | None = None) -> list[int]:
    """Token ids of a prompt, as a message of a chat or as it is."""
    if not chat:
        return list(llm.tokenize(prompt))
    messages = [] if system is None else [{"role": "system", "content": system}]
    return list(llm.requests.chat_ids([*messages, {"role": "user", "content": prompt}]))


def _continued(path: Path, prompt: str, chat: bool, options: CompareOptions, notices: Notices) -> Continuation:
    from phiquant.eval.continuations import continued
    from phiquant.llm import LLM

    sampling: Options = {
        "max_tokens": options.n_predict,
        "temperature": options.temperature,
        "seed": options.seed,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
    }
    with LLM.load(
        path,
        context=options.ctx_size,
        cache_type=options.cache_type,
        threads=options.threads,
        progress=notices.progress,
    ) as llm:
        notices.clear()
        ids = prompt_ids(llm, prompt, chat=chat, system=options.system_prompt)
        with ReadingBar(printable(path.name), 1, quiet=options.quiet) as bar:
            return continued(llm, ids, lambda count: bar.advanced(count, options.n_predict), sampling)


def _document(found: _Found, prompt: str) -> dict[str, Any]:
    parting = found.parting
    return {
        "prompt": prompt,
        "chat": found.chat,
        "texts_only": found.texts_only,
        "models": [
            {
                "path": str(path),
                "text": one.text,
                "ids": list(one.ids),
                "pieces": list(one.pieces),
                "finish_reason": one.finish_reason,
            }
            for path, one in zip(found.paths, (found.left, found.right), strict=True)
        ],
        "common_characters": found.characters,
        "parting": None if parting is None else dataclasses.asdict(parting),
    }


def _print(found: _Found, options: CompareOptions) -> None:
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False, width=None if terminal else _UNSEEN_WIDTH)
    names = [printable(path.name) for path in found.paths]
    if names[0] == names[1]:
        names = [printable(str(path)) for path in found.paths]
    if terminal:
        headings = [f"{letter}: {name}" for letter, name in zip("AB", names, strict=True)]
        table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        table.columns[0].ratio = table.columns[1].ratio = 1
        table.add_row(*(_marked(one.text, found.characters) for one in (found.left, found.right)))
        console.print(table)
    else:
        for letter, name, one in zip("AB", names, (found.left, found.right), strict=True):
            print(f"{letter}: {name}\n{_marked(one.text, found.characters).plain}\n")
    for line in _sentences(found):
        console.print(line, soft_wrap=True)
    parting = found.parting
    if parting is not None:
        console.print(_candidates(parting))


def _marked(text: str, common: int | None) -> Text:
    """A text whose part that both have is plain, and whose rest stands out, after a mark."""
    if common is None:
        return Text(printable(text, "\n"))
    rest = printable(text[common:], "\n")
    return Text.assemble(
        printable(text[:common], "\n"), (f"{MARK}", "bold reverse"), (rest or " (the end)", "bold yellow")
    )


def _sentences(found: _Found) -> list[str]:
    lines = [] if found.texts_only is None else [found.texts_only]
    parting = found.parting
    if parting is not None:
        left, right = (
            "ends" if token is None else f"has {_quoted(one.names[token])}"
            for token, one in ((parting.left, found.left), (parting.right, found.right))
        )
        lines.append(f"The first {parting.tokens} tokens are the same; then A {left} and B {right}.")
    elif found.characters is not None:
        lines.append(f"The first {found.characters} characters are the same.")
    else:
        lines.append(f"Both say the same, for {len(found.left.ids)} tokens.")
    return lines


def _candidates(parting: Parting) -> Table:
    """How likely both find the tokens that could come where they part."""
    table = Table("token there", "A", "B", "", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for one in parting.candidates:
        taken = [letter for letter, token in (("A", parting.left), ("B", parting.right)) if token == one.token]
        table.add_row(
            _quoted(one.text), _share(one.left), _share(one.right), f"taken by {' and '.join(taken)}" if taken else ""
        )
    return table


def _share(probability: float | None) -> str:
    return "rare" if probability is None else f"{100 * probability:.2f} %"


def _quoted(text: str) -> str:
    return json.dumps(printable(text), ensure_ascii=False)
