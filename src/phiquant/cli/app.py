"""Finding the verb, parsing its arguments, and turning whatever it raises into a sentence and an exit status.

Only the module of the verb that is used is imported, so that `phiquant run` does not pay for the converter.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .failures import OutputClosed, is_usage_error, report, silence_output, usage_sentence

__all__ = ["PROGRAM", "VERBS", "command", "run"]

PROGRAM = "phiquant"

VERBS = {
    "convert": "Convert a Hugging Face checkpoint to GGUF.",
    "quantize": "Quantize a GGUF file or a checkpoint, in one step.",
    "imatrix": "Collect an importance matrix: which weights matter to a model on a text.",
    "split": "Divide a GGUF file into parts.",
    "merge": "Join the parts of a split model in one file.",
    "pull": "Fetch a model of the Hugging Face Hub.",
    "list": "List the models in the cache of the Hugging Face Hub.",
    "rm": "Remove models from that cache.",
    "run": "Generate text, or chat, with a GGUF model.",
    "compare": "Show what two models make of a prompt, side by side, and where they part.",
    "serve": "Serve models over HTTP to clients of OpenAI, Anthropic, llama.cpp and Ollama.",
    "perplexity": "Measure how well a model predicts a text, alone or beside a base.",
    "measure": "Measure how far a file is from the model that it was made from, and record it.",
    "report": "Show files of one model on a page: size, quality, errors, types, continuations.",
    "certify": "Compare a file's predictions with those of transformers on its checkpoint.",
    "bench": "Measure the speed of models, beside the machine's limits and llama-bench.",
    "verify": "Check a GGUF file: structure, weights, checksum.",
    "inspect": "Show what a GGUF file holds.",
    "doctor": "Show what this machine offers and what phiquant makes of it.",
}
"""Name and summary of every verb; `commands` has a function of the same name."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit status; nothing but KeyboardInterrupt and SystemExit leaves it."""
    arguments = list(arguments)
    debug = bool(os.environ.get("PHIQUANT_DEBUG"))
    if "--debug" in arguments[: arguments.index("--") if "--" in arguments else None]:
        arguments.remove("--debug")
        debug = True
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except (BrokenPipeError, OutputClosed):
        silence_output()
        return 141
    except Exception as error:
        return report(error, debug=debug)


def command(verb: str) -> Any:
    """The parsed form of a verb: typer's command object, with `params`, `help` and `main`."""
    import typer

    from . import commands

    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    function: Callable[..., Any] = getattr(commands, verb)

    @functools.wraps(function)
    def body(**arguments: Any) -> Any:
        try:
            return function(**arguments)
        except BrokenPipeError:
            raise OutputClosed from None  # typer would end the process with status 1
        except SystemExit as error:
            if isinstance(error.__context__, BrokenPipeError):  # as rich ends it
                raise OutputClosed from None
            raise

    app.command(name=verb, help=function.__doc__, context_settings={"help_option_names": ["-h", "--help"]})(body)
    return typer.main.get_command(app)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1 and arguments[0] == "help" and arguments[1] in VERBS:
            return _dispatch([arguments[1], "--help"])
        print(overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        from .. import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _unknown(verb)
    try:
        status = command(verb).main(
            args=hyphenated(rest), prog_name=f"{PROGRAM} {verb}", standalone_mode=False, windows_expand_args=False
        )
    except Exception as error:
        if not is_usage_error(error):
            raise
        print(f"{PROGRAM}: error: {usage_sentence(error)} (see {PROGRAM} {verb} --help)", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def overview() -> str:
    """What `phiquant --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"usage: {PROGRAM} VERB [OPTIONS] ...", "", "Convert, quantize and run Microsoft Phi models as GGUF.", ""]
    lines += [f"  {name:<{width}}  {summary}" for name, summary in VERBS.items()]
    lines += [
        "",
        f"`{PROGRAM} VERB --help` lists a verb's options; `{PROGRAM} --version` prints the version.",
        "`--debug` (or PHIQUANT_DEBUG=1) adds the traceback to an error.",
    ]
    return "\n".join(lines)


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Long options with hyphens for underscores (`--ctx_size`), as llama.cpp accepts them; values stay as they are."""
    result: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[i:]]
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name[2:].replace("_", "").replace("-", "").isalnum():
            argument = name.replace("_", "-") + equals + value
        result.append(argument)
    return result


def _unknown(verb: str) -> int:
    kind = "option" if verb.startswith("-") else "verb"
    near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
    print(f"{PROGRAM}: error: no {kind} {verb!r}; {hint}", file=sys.stderr)
    return 2
