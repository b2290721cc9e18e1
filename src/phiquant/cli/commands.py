"""How each verb reads its arguments: names, defaults and help; the bodies are in the file named after the verb.

Names and defaults of `run` are llama-cli's, those of `quantize` llama-quantize's.
"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

__all__ = ["bench", "convert", "doctor", "imatrix", "inspect", "merge", "quantize", "run", "split", "verify"]

Threads = Annotated[
    int, Option("--threads", "-t", metavar="N", min=0, help="Processor threads; 0: all that the process may use.")
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Nothing on stderr but errors.")]
KeepNan = Annotated[bool, Option("--keep-nan", help="Accept NaN and infinity in weights instead of refusing them.")]
SplitMaxTensors = Annotated[
    int | None,
    Option("--split-max-tensors", metavar="N", help="Write parts of at most N tensors: PREFIX-00001-of-0000M.gguf."),
]
SplitMaxSize = Annotated[
    str | None,
    Option("--split-max-size", metavar="N(M|G)", help="Write parts with at most so many bytes of tensors."),
]
NoTensorFirstSplit = Annotated[bool, Option("--no-tensor-first-split", help="Put metadata only into the first part.")]
Resume = Annotated[
    bool,
    Option("--resume", help="Keep what is done if interrupted, and continue what an interrupted run with it left."),
]
MaxMemory = Annotated[
    str | None, Option("--max-memory", metavar="SIZE", help="Memory to stay within, such as 500M; 1.5G by default.")
]
_CACHE_TYPES = "f16, f32, q8_0, q4_0"  # `kernels.cache_types` is imported by verbs that run models alone
Json = Annotated[bool, Option("--json", help="Print JSON instead of text.")]


BFloatDot = Annotated[
    bool,
    Option(
        "--bf16-dot/--no-bf16-dot",
        help="Round activations that meet BF16 weights to BF16: twice as fast on processors with AVX512_BF16, at the "
        "price of a mean KL divergence of 1.2e-5 nats per token (measured on the bundled model).",
    ),
]


def run(
    path: Annotated[str | None, Argument(metavar="[MODEL]", help="The GGUF file, if --model is not given.")] = None,
    model: Annotated[str | None, Option("--model", "-m", metavar="FILE", help="The GGUF file.")] = None,
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
            help=f"Of the key-value cache: {_CACHE_TYPES}.",
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
    from . import run as body

    options = body.RunOptions(
        model=body.chosen_model(path, model),
        prompt=prompt,
        file=file,
        system_prompt=system_prompt,
        n_predict=n_predict,
        ctx_size=ctx_size,
        cache_type=cache_type,
        threads=threads,
        gpu_layers=gpu_layers,
        speculate=speculate,
        draft_model=draft_model,
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


def convert(
    model: Annotated[
        str,
        Argument(metavar="MODEL", help="A checkpoint's folder, or a repository: owner/name[@revision]."),
    ],
    outfile: Annotated[
        Path | None, Option("--outfile", "-o", metavar="FILE", help="Default: named after the model and the type.")
    ] = None,
    outtype: Annotated[
        str, Option("--outtype", metavar="TYPE", help="auto, f32, f16, bf16, q8_0, or any type of quantize.")
    ] = "auto",
    threads: Threads = 0,
    keep_nan: KeepNan = False,
    split_max_tensors: SplitMaxTensors = None,
    split_max_size: SplitMaxSize = None,
    no_tensor_first_split: NoTensorFirstSplit = False,
    resume: Resume = False,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> int:
    """Convert a Hugging Face checkpoint to GGUF."""
    from . import convert as body
    from .notices import Notices
    from .sizes import parse_size
    from .split import division_of

    with Notices(quiet=quiet).compiling():
        return body.convert(
            model,
            outfile,
            outtype,
            threads=threads,
            keep_nan=keep_nan,
            division=division_of(split_max_tensors, split_max_size, no_tensor_first_split),
            resume=resume,
            max_memory=None if max_memory is None else parse_size("--max-memory", max_memory),
            quiet=quiet,
        )


def quantize(
    arguments: Annotated[
        list[str],
        Argument(
            metavar="IN [OUT] TYPE [NTHREADS]",
            help="IN: a GGUF file, a checkpoint's folder or a repository. OUT: by default a name with the type in it. "
            "TYPE: such as Q4_K_M, or llama.cpp's number, or COPY.",
        ),
    ],
    pure: Annotated[bool, Option("--pure", help="One type for all tensors, instead of llama.cpp's mixture.")] = False,
    output_tensor_type: Annotated[
        str | None, Option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
    ] = None,
    token_embedding_type: Annotated[
        str | None, Option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        Option(
            "--tensor-type",
            metavar="PATTERN=TYPE",
            help="Type of the tensors whose name holds this regular expression; may be repeated, the first match wins.",
        ),
    ] = None,
    tensor_type_file: Annotated[
        Path | None,
        Option(
            "--tensor-type-file",
            metavar="FILE",
            help="Further PATTERN=TYPE from a file, separated by spaces or newlines; they come after --tensor-type.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        Option("--imatrix", metavar="FILE", help="Weigh errors by this importance matrix, GGUF or .dat."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        Option("--calibrate", metavar="TEXT", help="Collect an importance matrix on this text first, and weigh by it."),
    ] = None,
    include_weights: Annotated[
        list[str] | None,
        Option(
            "--include-weights", metavar="NAME", help="Use it only for weights with this in their name; repeatable."
        ),
    ] = None,
    exclude_weights: Annotated[
        list[str] | None,
        Option(
            "--exclude-weights", metavar="NAME", help="Do not use it for weights with this in their name; repeatable."
        ),
    ] = None,
    prune_layers: Annotated[
        str | None, Option("--prune-layers", metavar="L0,L1,...", help="Leave these layers out, counted from 0.")
    ] = None,
    leave_output_tensor: Annotated[bool, Option("--leave-output-tensor", help="Leave output.weight as it is.")] = False,
    allow_requantize: Annotated[
        bool, Option("--allow-requantize", help="Quantize what is quantized already, at a loss.")
    ] = False,
    override_kv: Annotated[
        list[str] | None,
        Option("--override-kv", metavar="KEY=TYPE:VALUE", help="Change or add metadata: int, float, bool or str."),
    ] = None,
    keep_nan: KeepNan = False,
    keep_split: Annotated[bool, Option("--keep-split", help="Write parts as the source has them.")] = False,
    split_max_tensors: SplitMaxTensors = None,
    split_max_size: SplitMaxSize = None,
    no_tensor_first_split: NoTensorFirstSplit = False,
    resume: Resume = False,
    max_memory: MaxMemory = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and the file's size; write nothing.")] = False,
    quiet: Quiet = False,
) -> int:
    """Quantize a GGUF file, a checkpoint or a repository, in one step."""
    from . import quantize as body
    from .notices import Notices
    from .sizes import parse_size
    from .split import division_of

    options = body.QuantizeOptions(
        pure=pure,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        tensor_type=tensor_type or [],
        tensor_type_file=tensor_type_file,
        imatrix=imatrix,
        calibrate=calibrate,
        include_weights=include_weights or [],
        exclude_weights=exclude_weights or [],
        prune_layers=prune_layers,
        leave_output_tensor=leave_output_tensor,
        allow_requantize=allow_requantize,
        override_kv=override_kv or [],
        keep_nan=keep_nan,
        division=division_of(split_max_tensors, split_max_size, no_tensor_first_split),
        keep_split=keep_split,
        resume=resume,
        max_memory=None if max_memory is None else parse_size("--max-memory", max_memory),
        dry_run=dry_run,
        quiet=quiet,
    )
    with Notices(quiet=quiet).compiling():
        return body.quantize(arguments, options)


def imatrix(
    model: Annotated[
        Path | None, Option("--model", "-m", metavar="FILE", help="The GGUF file, best F16 or larger.")
    ] = None,
    file: Annotated[Path | None, Option("--file", "-f", metavar="FILE", help="The text that the model reads.")] = None,
    output: Annotated[
        Path, Option("--output-file", "--output", "-o", metavar="FILE", help="Where the matrix is written.")
    ] = Path("imatrix.gguf"),
    output_format: Annotated[
        str | None, Option("--output-format", metavar="FORMAT", help="gguf, or dat, llama.cpp's older format.")
    ] = None,
    in_file: Annotated[
        list[Path] | None,
        Option("--in-file", metavar="FILE", help="Add this matrix, GGUF or .dat; may be repeated."),
    ] = None,
    chunks: Annotated[int, Option("--chunks", metavar="N", help="Read at most N chunks; -1: all.")] = -1,
    chunk: Annotated[
        int, Option("--chunk", "--from-chunk", metavar="N", min=0, help="Leave out the first N chunks.")
    ] = 0,
    ctx_size: Annotated[int, Option("--ctx-size", "-c", metavar="N", min=2, help="Tokens of a chunk.")] = 512,
    output_frequency: Annotated[
        int,
        Option("--output-frequency", "-ofreq", metavar="N", min=0, help="Save every N chunks; 0: only at the end."),
    ] = 10,
    save_frequency: Annotated[
        int, Option("--save-frequency", metavar="N", min=0, help="Every N chunks save a copy as FILE.at_N; 0: none.")
    ] = 0,
    process_output: Annotated[bool, Option("--process-output", help="Observe output.weight too.")] = False,
    parse_special: Annotated[
        bool, Option("--parse-special", help="Special tokens in the text are tokens, not text.")
    ] = False,
    ppl: Annotated[bool, Option("--ppl/--no-ppl", help="Measure the perplexity of the text on the way.")] = True,
    show_statistics: Annotated[
        bool, Option("--show-statistics", help="Print figures of the matrix given with --in-file, and do no more.")
    ] = False,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> int:
    """Collect an importance matrix for quantize --imatrix, combine several, or show what one holds."""
    from . import imatrix as body

    options = body.ImatrixOptions(
        model=model,
        file=file,
        output=output,
        output_format=output_format,
        in_file=in_file or [],
        chunks=chunks,
        chunk=chunk,
        ctx_size=ctx_size,
        output_frequency=output_frequency,
        save_frequency=save_frequency,
        process_output=process_output,
        parse_special=parse_special,
        ppl=ppl,
        show_statistics=show_statistics,
        threads=threads,
        quiet=quiet,
    )
    return body.imatrix(options)


def split(
    file: Annotated[Path, Argument(metavar="IN", help="A GGUF file, or the first part of a split model.")],
    prefix: Annotated[
        Path, Argument(metavar="OUT-PREFIX", help="What the names of the parts begin with: PREFIX-00001-of-0000M.gguf.")
    ],
    split_max_tensors: Annotated[
        int | None, Option("--split-max-tensors", metavar="N", help="Tensors in each part, at most; 128 by default.")
    ] = None,
    split_max_size: Annotated[
        str | None,
        Option("--split-max-size", metavar="N(M|G)", help="Bytes of tensors in each part, at most, instead."),
    ] = None,
    no_tensor_first_split: NoTensorFirstSplit = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the parts and their sizes; write nothing.")] = False,
    quiet: Quiet = False,
) -> int:
    """Divide a GGUF file into parts, as llama-gguf-split --split does."""
    from . import split as body

    division = body.division_of(split_max_tensors, split_max_size, no_tensor_first_split)
    return body.split(file, prefix, division, dry_run=dry_run, quiet=quiet)


def merge(
    first: Annotated[Path, Argument(metavar="FIRST-PART", help="The first part, NAME-00001-of-0000M.gguf.")],
    outfile: Annotated[Path, Argument(metavar="OUT", help="The file to write; it must not exist.")],
    dry_run: Annotated[bool, Option("--dry-run", help="Print the file's size; write nothing.")] = False,
    quiet: Quiet = False,
) -> int:
    """Join the parts of a split model in one file, as llama-gguf-split --merge does."""
    from . import split as body

    return body.merge(first, outfile, dry_run=dry_run, quiet=quiet)


def bench(
    model: Annotated[
        list[Path] | None, Option("--model", "-m", metavar="FILE", help="A GGUF file; may be given several times.")
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
        Option(
            "--kv-type", "--cache-type", "-ctk", metavar="TYPE,...", help=f"Of the key-value cache: {_CACHE_TYPES}."
        ),
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
    from . import bench as body
    from .failures import WrongUsage

    if not model:
        raise WrongUsage("no model is named: phiquant bench -m MODEL.gguf")
    return body.bench(
        body.BenchOptions(
            models=model,
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


def verify(
    file: Annotated[Path, Argument(metavar="FILE", help="A GGUF file, or the first part of a split model.")],
    as_json: Json = False,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> int:
    """Check a GGUF file: header, offsets and lengths, every weight and scale, and the checksum if it has one."""
    from . import verify as body

    return body.verify(file, as_json=as_json, threads=threads, quiet=quiet)


def inspect(file: Annotated[Path, Argument(metavar="FILE", help="A GGUF file.")], as_json: Json = False) -> None:
    """Show what a GGUF file holds: header, metadata, tensors, totals."""
    from . import inspect as body

    body.inspect(file, as_json)


def doctor(as_json: Json = False) -> None:
    """Show what this machine offers and what phiquant makes of it: processor, kernels, threads, caches, backends."""
    from . import doctor as body

    body.doctor(as_json)
