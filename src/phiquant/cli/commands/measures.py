"""Models measured on a text: `imatrix`, `perplexity`, `measure`, `report`, `certify`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .options import CacheType, Checkpoint, HfRepo, Json, Quiet, TextFile, Threads

__all__ = ["certify", "imatrix", "measure", "perplexity", "report"]


def imatrix(
    model: Annotated[
        Path | None, Option("--model", "-m", metavar="FILE", help="The GGUF file, best F16 or larger.")
    ] = None,
    hf_repo: HfRepo = None,
    file: TextFile = None,
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
    from .. import imatrix as body
    from ..models import given

    options = body.ImatrixOptions(
        model=given(model, hf_repo),
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


def perplexity(
    model: Annotated[Path | None, Option("--model", "-m", metavar="FILE", help="The GGUF file.")] = None,
    hf_repo: HfRepo = None,
    file: TextFile = None,
    ctx_size: Annotated[int, Option("--ctx-size", "-c", metavar="N", min=3, help="Tokens of a window.")] = 512,
    batch_size: Annotated[
        int,
        Option("--batch-size", "-b", metavar="N", min=1, help="Most tokens of a step; several windows if they fit."),
    ] = 2048,
    chunks: Annotated[int, Option("--chunks", metavar="N", help="Read at most N windows; -1: all.")] = -1,
    ppl_stride: Annotated[
        int,
        Option(
            "--ppl-stride",
            metavar="N",
            min=0,
            help="Begin a window every N tokens and score its last N; 0: windows side by side, half of each scored.",
        ),
    ] = 0,
    ppl_output_type: Annotated[
        int,
        Option(
            "--ppl-output-type",
            metavar="0|1",
            min=0,
            max=1,
            help="1: a line for each window: first token, perplexity so far, its logarithm and error.",
        ),
    ] = 0,
    kl_divergence: Annotated[
        bool, Option("--kl-divergence", help="Compare with a base: --base, or --kl-divergence-base.")
    ] = False,
    kl_divergence_base: Annotated[
        Path | None,
        Option(
            "--kl-divergence-base",
            "--save-all-logits",
            metavar="FILE",
            help="Saved logits: written by the base model, read with --kl-divergence; llama-perplexity's file.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        Option("--base", metavar="FILE", help="The base as a GGUF file, best F16 or larger; nothing is rounded."),
    ] = None,
    cache_type: CacheType = "f16",
    output: Annotated[str, Option("--output", "-o", metavar="FORM", help="text or json.")] = "text",
    threads: Threads = 0,
    quiet: Quiet = False,
) -> int:
    """Measure how well a model predicts a text, as llama-perplexity does, alone or beside a base."""
    from .. import perplexity as body
    from ..models import chosen

    return body.perplexity(
        body.PerplexityOptions(
            model=chosen(model, hf_repo, "phiquant perplexity -m MODEL.gguf -f TEXT"),
            file=file,
            ctx_size=ctx_size,
            batch_size=batch_size,
            chunks=chunks,
            ppl_stride=ppl_stride,
            ppl_output_type=ppl_output_type,
            kl_divergence=kl_divergence,
            kl_divergence_base=kl_divergence_base,
            base=base,
            cache_type=cache_type,
            output=output,
            threads=threads,
            quiet=quiet,
        )
    )


def measure(
    path: Annotated[Path | None, Argument(metavar="[FILE]", help="The GGUF file, whoever made it.")] = None,
    hf_repo: HfRepo = None,
    against: Annotated[
        Path | None,
        Option("--against", "--reference", metavar="FILE", help="The model it was made from, best F16 or larger."),
    ] = None,
    file: TextFile = None,
    write: Annotated[
        bool,
        Option("--write", help="Record the figures in the file, which is written again and takes its own place."),
    ] = False,
    outfile: Annotated[
        Path | None,
        Option("--outfile", "-o", metavar="FILE", help="Record them in a copy instead, which is written here."),
    ] = None,
    ctx_size: Annotated[int, Option("--ctx-size", "-c", metavar="N", min=3, help="Tokens of a window.")] = 512,
    chunks: Annotated[int, Option("--chunks", metavar="N", help="Read at most N windows; -1: all.")] = -1,
    chunk: Annotated[
        int, Option("--chunk", "--from-chunk", metavar="N", min=0, help="Leave out the first N windows.")
    ] = 0,
    cache_type: CacheType = "f16",
    as_json: Json = False,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> int:
    """Measure how far a file is from the model that it was made from, and record that in the file."""
    from .. import measure as body
    from ..models import chosen

    return body.measure(
        body.MeasureOptions(
            model=chosen(path, hf_repo, "phiquant measure MODEL.gguf --against MODEL-F16.gguf -f TEXT"),
            against=against,
            file=file,
            write=write,
            outfile=outfile,
            ctx_size=ctx_size,
            chunks=chunks,
            chunk=chunk,
            cache_type=cache_type,
            as_json=as_json,
            threads=threads,
            quiet=quiet,
        )
    )


def report(
    files: Annotated[list[Path], Argument(metavar="FILES", help="GGUF files of one model, whoever made them.")],
    reference: Annotated[
        Path | None,
        Option("--reference", "--against", metavar="FILE", help="The model they were made from, best F16 or larger."),
    ] = None,
    file: TextFile = None,
    output: Annotated[
        list[Path] | None,
        Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the report is written, .html, or .png with the extra `plot`; may be repeated. Default: "
            "report.html.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        Option("--imatrix", metavar="FILE", help="Weigh errors of weights by this importance matrix, GGUF or .dat."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What all models continue; may be repeated. Default: the beginning of the text.",
        ),
    ] = None,
    chat: Annotated[bool, Option("--chat/--raw", help="Prompts are messages of a chat.")] = False,
    n_predict: Annotated[
        int, Option("--n-predict", "--predict", "-n", metavar="N", help="Tokens of a continuation, at most.")
    ] = 64,
    ctx_size: Annotated[int, Option("--ctx-size", "-c", metavar="N", min=3, help="Tokens of a window.")] = 512,
    chunks: Annotated[int, Option("--chunks", metavar="N", help="Read at most N windows; -1: all.")] = -1,
    cache_type: CacheType = "f16",
    threads: Threads = 0,
    quiet: Quiet = False,
) -> int:
    """Show files of one model on a page: size against quality, errors by layer and position, types, continuations."""
    from .. import report as body

    return body.report(
        body.ReportOptions(
            files=files,
            reference=reference,
            file=file,
            output=output or [Path("report.html")],
            imatrix=imatrix,
            prompts=prompt or (),
            chat=chat,
            n_predict=n_predict,
            ctx_size=ctx_size,
            chunks=chunks,
            cache_type=cache_type,
            threads=threads,
            quiet=quiet,
        )
    )


def certify(
    checkpoint: Checkpoint,
    gguf: Annotated[
        Path | None, Argument(metavar="[GGUF]", help="A file made from it; by default one is made for the time being.")
    ] = None,
    hf_repo: HfRepo = None,
    file: Annotated[
        Path | None, Option("--file", "-f", metavar="FILE", help="The text that is read; by default one of phiquant's.")
    ] = None,
    ctx_size: Annotated[
        int,
        Option("--ctx-size", "-c", metavar="N", min=0, help="Tokens of the longest sequence; 0: beyond every border."),
    ] = 0,
    outtype: Annotated[
        str, Option("--outtype", metavar="TYPE", help="Type of the file that is made; any type of quantize.")
    ] = "f32",
    cache_type: CacheType = "f32",
    python: Annotated[
        Path | None,
        Option("--python", metavar="FILE", help="A Python that has torch and transformers; by default phiquant's own."),
    ] = None,
    report: Annotated[
        list[Path] | None,
        Option("--output", "-o", metavar="FILE", help="Write a report, .md or .json by its name; may be repeated."),
    ] = None,
    fail_above: Annotated[
        float | None,
        Option("--fail-above", metavar="KL", min=0, help="Exit with 1 if the mean divergence is larger than this."),
    ] = None,
    as_json: Json = False,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> int:
    """Compare a file's predictions with those of transformers on the checkpoint that it was made from."""
    from .. import certify as body
    from ..models import given

    return body.certify_checkpoint(
        body.CertifyOptions(
            checkpoint=checkpoint,
            gguf=given(gguf, hf_repo),
            file=file,
            ctx_size=ctx_size,
            outtype=outtype,
            cache_type=cache_type,
            python=python,
            report=report or (),
            as_json=as_json,
            fail_above=fail_above,
            threads=threads,
            quiet=quiet,
        )
    )
