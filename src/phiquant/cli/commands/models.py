"""Models run: `run`, `compare`, `bench`, and `doctor`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .options import CACHE_TYPES, BFloatDot, CacheType, HfRepo, HfRepos, Json, Quiet, Threads

__all__ = ["bench", "compare", "doctor", "run"]


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
    cache_type: CacheType = "f16",
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
    samplers: Annotated[
        str | None,
        Option(
            "--samplers",
            metavar="A;B;...",
            help="The steps of choosing a token, in order; by default penalties;dry;top_n_sigma;top_k;typ_p;top_p;"
            "min_p;xtc;temperature.",
        ),
    ] = None,
    temp: Annotated[
        float, Option("--temp", "--temperature", metavar="T", min=0, help="Randomness; 0: always the likeliest token.")
    ] = 0.8,
    dynatemp_range: Annotated[
        float, Option("--dynatemp-range", metavar="R", min=0, help="Let the temperature go from T - R to T + R.")
    ] = 0.0,
    dynatemp_exp: Annotated[
        float, Option("--dynatemp-exp", metavar="X", min=0, help="Of the entropy by which the temperature goes.")
    ] = 1.0,
    top_k: Annotated[int, Option("--top-k", metavar="N", help="Keep the N likeliest tokens; 0: all.")] = 40,
    top_p: Annotated[
        float, Option("--top-p", metavar="P", min=0, max=1, help="Keep the likeliest with this share; 1: all.")
    ] = 0.95,
    min_p: Annotated[
        float, Option("--min-p", metavar="P", min=0, max=1, help="Drop what is rarer than P times the likeliest.")
    ] = 0.05,
    typical: Annotated[
        float,
        Option("--typical", "--typical-p", metavar="P", min=0, max=1, help="Keep the most typical share; 1: all."),
    ] = 1.0,
    top_n_sigma: Annotated[
        float,
        Option(
            "--top-n-sigma",
            "--top-nsigma",
            metavar="N",
            help="Keep scores within N standard deviations of the best; -1: all.",
        ),
    ] = -1.0,
    xtc_probability: Annotated[
        float,
        Option(
            "--xtc-probability",
            metavar="P",
            min=0,
            max=1,
            help="How often the likeliest are left out, but for the last.",
        ),
    ] = 0.0,
    xtc_threshold: Annotated[
        float, Option("--xtc-threshold", metavar="P", min=0, max=1, help="... of those at least so likely.")
    ] = 0.1,
    mirostat: Annotated[
        int, Option("--mirostat", metavar="N", min=0, max=2, help="1 or 2: keep the surprise of the text level.")
    ] = 0,
    mirostat_lr: Annotated[float, Option("--mirostat-lr", metavar="X", help="How fast mirostat corrects.")] = 0.1,
    mirostat_ent: Annotated[float, Option("--mirostat-ent", metavar="X", help="Mirostat's aim, in bits.")] = 5.0,
    repeat_penalty: Annotated[
        float, Option("--repeat-penalty", metavar="X", help="Divide the score of recent tokens; 1: do not.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, Option("--presence-penalty", metavar="X", help="Take X from the score of recent tokens.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, Option("--frequency-penalty", metavar="X", help="The same for each time that they came.")
    ] = 0.0,
    repeat_last_n: Annotated[
        int, Option("--repeat-last-n", metavar="N", min=-1, help="How many tokens are recent; -1: all.")
    ] = 64,
    dry_multiplier: Annotated[
        float,
        Option("--dry-multiplier", metavar="X", min=0, help="Make what continues a repetition less likely; 0: do not."),
    ] = 0.0,
    dry_base: Annotated[
        float, Option("--dry-base", metavar="X", min=0, help="... the more so for each token that the repetition has.")
    ] = 1.75,
    dry_allowed_length: Annotated[
        int, Option("--dry-allowed-length", metavar="N", min=0, help="Repetitions of fewer tokens are free.")
    ] = 2,
    dry_penalty_last_n: Annotated[
        int, Option("--dry-penalty-last-n", metavar="N", min=-1, help="Look at the last N tokens; -1: all.")
    ] = -1,
    dry_sequence_breaker: Annotated[
        list[str] | None,
        Option(
            "--dry-sequence-breaker",
            metavar="TEXT",
            help="Repetitions end here, instead of at line ends, colons, double quotes and asterisks; none: nowhere. "
            "May be given several times.",
        ),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        Option(
            "--logit-bias",
            "-l",
            metavar="TOKEN+BIAS",
            help="Add to the score of a token: 15043+1, 15043-1, 2-inf; may be given several times.",
        ),
    ] = None,
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Never end by a token that ends the text.")] = False,
    grammar: Annotated[
        str | None, Option("--grammar", metavar="GBNF", help="What the text must look like, in llama.cpp's notation.")
    ] = None,
    grammar_file: Annotated[Path | None, Option("--grammar-file", metavar="FILE", help="The same from a file.")] = None,
    json_schema: Annotated[
        str | None,
        Option("--json-schema", "-j", metavar="SCHEMA", help="The text is JSON that fits this schema; {}: any JSON."),
    ] = None,
    json_schema_file: Annotated[
        Path | None, Option("--json-schema-file", "-jf", metavar="FILE", help="The same from a file.")
    ] = None,
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
        samplers=samplers,
        temperature=temp,
        dynatemp_range=dynatemp_range,
        dynatemp_exp=dynatemp_exp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical=typical,
        top_n_sigma=top_n_sigma,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        mirostat=mirostat,
        mirostat_lr=mirostat_lr,
        mirostat_ent=mirostat_ent,
        repeat_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repeat_last_n=repeat_last_n,
        dry_multiplier=dry_multiplier,
        dry_base=dry_base,
        dry_allowed_length=dry_allowed_length,
        dry_penalty_last_n=dry_penalty_last_n,
        dry_sequence_breaker=tuple(dry_sequence_breaker) if dry_sequence_breaker else None,
        logit_bias=tuple(logit_bias or ()),
        ignore_eos=ignore_eos,
        grammar=grammar,
        grammar_file=grammar_file,
        json_schema=json_schema,
        json_schema_file=json_schema_file,
        seed=seed,
        conversation=conversation,
        single_turn=single_turn,
        escape=escape,
        display_prompt=display_prompt,
        verbose_prompt=verbose_prompt,
        quiet=quiet,
    )
    return body.run(options)


def compare(
    first: Annotated[Path, Argument(metavar="A", help="A GGUF file.")],
    second: Annotated[Path, Argument(metavar="B", help="Another, such as the same model in another type.")],
    prompt: Annotated[
        str | None,
        Option("--prompt", "-p", metavar="TEXT", help="The message that both answer, or the text that both continue."),
    ] = None,
    n_predict: Annotated[
        int, Option("--n-predict", "--predict", "-n", metavar="N", help="Tokens to generate at most.")
    ] = 64,
    conversation: Annotated[
        bool | None,
        Option(
            "--conversation/--no-conversation",
            "--chat/--raw",
            "-cnv/-no-cnv",
            help="Chat, or continue the prompt as it is; by default a chat if both models have a chat template.",
        ),
    ] = None,
    system_prompt: Annotated[
        str | None, Option("--system-prompt", "-sys", metavar="TEXT", help="The system message of the chat.")
    ] = None,
    escape: Annotated[
        bool, Option("--escape/--no-escape", "-e", help=r"Replace \n, \t, \xC3 ... in the prompt.")
    ] = True,
    temp: Annotated[
        float, Option("--temp", "--temperature", metavar="T", min=0, help="Randomness; 0: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, Option("--seed", "-s", metavar="N", min=0, help="Of chance, the same for both.")] = 0,
    top_k: Annotated[int, Option("--top-k", metavar="N", min=0, help="Keep the N likeliest tokens; 0: all.")] = 40,
    top_p: Annotated[
        float, Option("--top-p", metavar="P", min=0, max=1, help="Keep the likeliest with this share; 1: all.")
    ] = 0.95,
    min_p: Annotated[
        float, Option("--min-p", metavar="P", min=0, max=1, help="Drop what is rarer than P times the likeliest.")
    ] = 0.05,
    ctx_size: Annotated[
        int, Option("--ctx-size", "-c", metavar="N", min=0, help="Tokens kept in mind; 0: all that the model can.")
    ] = 4096,
    cache_type: CacheType = "f16",
    output: Annotated[str, Option("--output", "-o", metavar="FORM", help="text or json.")] = "text",
    threads: Threads = 0,
    quiet: Quiet = False,
) -> int:
    """Show what two models make of a prompt, side by side, where they part, and how sure they were there."""
    from .. import compare as body

    return body.compare(
        body.CompareOptions(
            models=(first, second),
            prompt=prompt,
            n_predict=n_predict,
            conversation=conversation,
            system_prompt=system_prompt,
            escape=escape,
            temperature=temp,
            seed=seed,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            ctx_size=ctx_size,
            cache_type=cache_type,
            output=output,
            threads=threads,
            quiet=quiet,
        )
    )


def bench(
    model: Annotated[
        list[Path] | None, Option("--model", "-m", metavar="FILE", help="A GGUF file; may be given several times.")
    ] = None,
    hf_repo: HfRepos = None,
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
