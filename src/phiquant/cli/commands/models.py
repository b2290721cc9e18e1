"""Models run: `run`, `bench`, and `doctor`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .options import CACHE_TYPES, BFloatDot, HfRepo, Json, Quiet

__all__ = ["bench", "doctor", "run"]


def run(
    path: Annotated[str | None, Argument(metavar="[MODEL]", help="The GGUF file, if --model is not given.")] = None,
    model: Annotated[str | None, Option("--model", "-m", metavar="FILE", help="The GGUF file.")] = None,
    hf_repo: HfRepo = None,
    prompt: Annotated[
        str | None,
        Option("--prompt", "-p", metavar="TEXT", help="The first message of the chat, or the text to be continued."),
    ] = None,
    file: Annotated[Path | None, Option("--file", "-f", metavar="FILE", help="Read the prompt from a file.")] = None,
    system_prompt: Annotated[
        str | None, Option("--system-prompt", "-sys", metavar="TEXT", help="The system message of the chat.")
    ] = None,
    n_predict: Annotated[
        int,
        Option("--n-predict", "--predict", "-n", metavar="N", help="Tokens to generate at most; -1: until the end."),
    ] = -1,
    ctx_size: Annotated[
        int, Option("--ctx-size", "-c", metavar="N", min=0, help="Tokens kept in mind; 0: all that the model can.")
    ] = 4096,
    cache_type: Annotated[
        str,
        Option(
            "--cache-type",
            "--kv-type",
            "--cache-type-k",
            "-ctk",
            metavar="TYPE",
            help=f"Of the key-value cache: {CACHE_TYPES}.",
        ),
    ] = "f16",
    threads: Annotated[
        int, Option("--threads", "-t", metavar="N", help="Processor threads; 0 or less: all that the process may use.")
    ] = 0,
    gpu_layers: Annotated[
        str,
        Option("--gpu-layers", "--n-gpu-layers", "-ngl", metavar="N", help="Layers on the GPU, if a backend has one."),
    ] = "auto",
    speculate: Annotated[
        bool,
        Option(
            "--speculate/--no-speculate",
            help="Guess where the text repeats itself and check several tokens at once; the text stays the same.",
        ),
    ] = True,
    draft_model: Annotated[
        Path | None,
        Option("--draft-model", "-md", "--model-draft", metavar="FILE", help="A smaller model that guesses, too."),
    ] = None,
    hf_repo_draft: Annotated[
        str | None,
        Option("--hf-repo-draft", "-hfd", "-hfrd", metavar="OWNER/REPO[:QUANT]", help="The same from the Hub."),
    ] = None,
    pack: Annotated[
        bool,
        Option("--pack/--no-pack", help="Bring weights into the fastest form, or run from the mapped file itself."),
    ] = True,
    bf16_dot: BFloatDot = False,
    temp: Annotated[
        float, Option("--temp", "--temperature", metavar="T", min=0, help="Randomness; 0: always the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int, Option("--top-k", metavar="N", help="Keep the N likeliest tokens; 0: all.")] = 40,
    top_p: Annotated[
        float, Option("--top-p", metavar="P", min=0, max=1, help="Keep the likeliest with this share; 1: all.")
    ] = 0.95,
    min_p: Annotated[
        float, Option("--min-p", metavar="P", min=0, max=1, help="Drop what is rarer than P times the likeliest.")
    ] = 0.05,
    repeat_penalty: Annotated[
        float, Option("--repeat-penalty", metavar="X", help="Divide the score of recent tokens; 1: do not.")
    ] = 1.0,
    seed: Annotated[int, Option("--seed", "-s", metavar="N", help="For the same text again; -1: a random one.")] = -1,
    conversation: Annotated[
        bool | None,
        Option(
            "--conversation/--no-conversation",
            "-cnv/-no-cnv",
            help="Chat, or continue the prompt as it is; by default a chat if the model has a chat template.",
        ),
    ] = None,
    single_turn: Annotated[bool, Option("--single-turn", "-st", help="End after one reply.")] = False,
    escape: Annotated[
        bool,
        Option("--escape/--no-escape", "--escapes/--no-escapes", "-e", help=r"Replace \n, \t, \xC3 ... in the prompt."),
    ] = True,
    display_prompt: Annotated[
        bool, Option("--display-prompt/--no-display-prompt", help="Repeat the prompt before its continuation.")
    ] = True,
    verbose_prompt: Annotated[bool, Option("--verbose-prompt", help="List the prompt's tokens on stderr.")] = False,
    quiet: Quiet = False,
) -> int:
    """Generate text, or chat, with a GGUF model."""
    from .. import run as body
    from ..models import given

    options = body.RunOptions(
        model=body.chosen_model(path, model, hf_repo),
        prompt=prompt,
        file=file,
        system_prompt=system_prompt,
        n_predict=n_predict,
        ctx_size=ctx_size,
        cache_type=cache_type,
        threads=threads,
        gpu_layers=gpu_layers,
        speculate=speculate,
        draft_model=given(draft_model, hf_repo_draft),
        pack=pack,
        bf16_dot=bf16_dot,
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        conversation=conversation,
        single_turn=single_turn,
        escape=escape,
        display_prompt=display_prompt,
        verbose_prompt=verbose_prompt,
        quiet=quiet,
    )
    return body.run(options)


def bench(
    model: Annotated[
        list[Path] | None, Option("--model", "-m", metavar="FILE", help="A GGUF file; may be given several times.")
    ] = None,
    hf_repo: Annotated[
        list[str] | None,
        Option(
            "--hf-repo",
            "-hf",
            "-hfr",
            metavar="OWNER/REPO[:QUANT]",
            help="A GGUF model of the Hugging Face Hub; may be given several times.",
        ),
    ] = None,
    n_prompt: Annotated[
        list[str] | None, Option("--n-prompt", "-p", metavar="N,...", help="Tokens of a prompt; 0: no such test.")
    ] = None,
    n_gen: Annotated[
        list[str] | None, Option("--n-gen", "-n", metavar="N,...", help="Tokens to generate; 0: no such test.")
    ] = None,
    pg: Annotated[
        list[str] | None, Option("-pg", metavar="PROMPT,GENERATED", help="A test of both, one after the other.")
    ] = None,
    n_depth: Annotated[
        list[str] | None,
        Option(
            "--n-depth",
            "-d",
            metavar="N,...",
            help="Tokens that are there before, not timed. Generating across the border of LongRoPE includes that all "
            "of them are computed again there.",
        ),
    ] = None,
    batch_size: Annotated[
        list[str] | None, Option("--batch-size", "-b", metavar="N,...", help="Most tokens of a step.")
    ] = None,
    threads: Annotated[
        list[str] | None, Option("--threads", "-t", metavar="N,...", help="Threads; 0: all that the process may use.")
    ] = None,
    kv_type: Annotated[
        list[str] | None,
        Option("--kv-type", "--cache-type", "-ctk", metavar="TYPE,...", help=f"Of the key-value cache: {CACHE_TYPES}."),
    ] = None,
    bf16_dot: BFloatDot = False,
    ctx_size: Annotated[
        int, Option("--ctx-size", "-c", metavar="N", min=0, help="Context; by default what the tests need.")
    ] = 0,
    repetitions: Annotated[
        int, Option("--repetitions", "-r", metavar="N", min=1, help="Runs of each test, after one that does not count.")
    ] = 5,
    output: Annotated[str, Option("--output", "-o", metavar="FORM", help="md, json, jsonl or csv.")] = "md",
    against: Annotated[
        str | None,
        Option("--against", metavar="llama-bench=PATH", help="Run llama.cpp's llama-bench in turns, and give ratios."),
    ] = None,
    limits: Annotated[
        bool, Option("--limits/--no-limits", help="Measure what the machine can do at most, beside every run.")
    ] = True,
    quiet: Quiet = False,
) -> int:
    """Measure prompt (pp) and generation (tg) speed as llama-bench defines them; options take several values."""
    from .. import bench as body
    from ..failures import WrongUsage
    from ..models import fetched

    if not model and not hf_repo:
        raise WrongUsage("no model is named: phiquant bench -m MODEL.gguf")
    return body.bench(
        body.BenchOptions(
            models=[*(model or ()), *(fetched(name, quiet=quiet) for name in hf_repo or ())],
            n_prompt=n_prompt or (),
            n_gen=n_gen or (),
            pg=pg or (),
            n_depth=n_depth or (),
            batch_size=batch_size or (),
            threads=threads or (),
            kv_type=kv_type or (),
            bf16_dot=bf16_dot,
            ctx_size=ctx_size,
            repetitions=repetitions,
            output=output,
            against=against,
            limits=limits,
            quiet=quiet,
        )
    )


def doctor(as_json: Json = False) -> None:
    """Show what this machine offers and what phiquant makes of it: processor, kernels, threads, caches, backends."""
    from .. import doctor as body

    body.doctor(as_json)
