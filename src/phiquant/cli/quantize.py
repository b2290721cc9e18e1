"""`phiquant quantize IN [OUT] TYPE [NTHREADS]`: a GGUF file, checkpoint or repository to GGUF of another type."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phiquant.cli.conversion import ConversionBar, print_plan, print_report
from phiquant.convert import Options, Target, TypePattern, parse_file_type, parse_tensor_type
from phiquant.convert.overrides import parse_override
from phiquant.convert.plan import plan_quantize
from phiquant.convert.run import execute
from phiquant.convert.source import open_source
from phiquant.errors import RequestError, TypeNameError, UnsupportedError
from phiquant.gguf import GGMLType

__all__ = ["Arguments", "QuantizeOptions", "parse_arguments", "quantize"]


@dataclass(frozen=True)
class Arguments:
    """The arguments without a name."""

    model: str
    outfile: Path | None
    target: Target
    threads: int  # 0: one for each core


@dataclass(frozen=True)
class QuantizeOptions:
    """llama-quantize's options as they are written."""

    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_type: Sequence[str] = ()
    leave_output_tensor: bool = False
    allow_requantize: bool = False
    override_kv: Sequence[str] = ()
    keep_nan: bool = False
    dry_run: bool = False
    quiet: bool = False


def quantize(arguments: Sequence[str], options: QuantizeOptions | None = None) -> int:
    """Quantize, or show what would be done. `arguments`: IN [OUT] TYPE [NTHREADS]."""
    parsed = parse_arguments(arguments)
    options = options or QuantizeOptions()
    chosen = Options(
        pure=options.pure,
        output_tensor_type=_tensor_type(options.output_tensor_type),
        token_embedding_type=_tensor_type(options.token_embedding_type),
        tensor_types=tuple(TypePattern.parse(text) for text in options.tensor_type),
        leave_output_tensor=options.leave_output_tensor,
    )
    overrides = [parse_override(text) for text in options.override_kv]
    with open_source(parsed.model, quiet=options.quiet) as source:
        plan = plan_quantize(
            source,
            parsed.target,
            parsed.outfile,
            chosen,
            overrides=overrides,
            allow_requantize=options.allow_requantize,
        )
        if options.dry_run:
            print_plan(plan)
            return 0
        with ConversionBar(quiet=options.quiet) as bar:
            report = execute(plan, threads=parsed.threads, keep_nan=options.keep_nan, progress=bar)
    if not options.quiet:
        print_report(report)
    return 0


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Tell OUT from TYPE as llama-quantize does: the second argument is the type if it is the name or number of one."""
    if not 2 <= len(arguments) <= 4:
        raise RequestError("quantize takes IN [OUT] TYPE [NTHREADS], such as: quantize model-F16.gguf Q4_K_M")
    model, *rest = arguments
    outfile: Path | None = None
    if len(rest) > 1 and not _names_a_type(rest[0]):
        outfile = Path(rest.pop(0))
    target = parse_file_type(rest[0])
    threads = rest[1] if len(rest) > 1 else "0"
    if len(rest) > 2 or not (threads.isascii() and threads.isdecimal()):
        raise RequestError(f"{rest[-1]!r} is not a number of threads; quantize takes IN [OUT] TYPE [NTHREADS].")
    return Arguments(model, outfile, target, int(threads))


def _names_a_type(text: str) -> bool:
    try:
        parse_file_type(text)
    except TypeNameError:
        return False
    except UnsupportedError:
        return True
    return True


def _tensor_type(text: str | None) -> GGMLType | None:
    return None if text is None else parse_tensor_type(text)
