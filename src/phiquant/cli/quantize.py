"""`phiquant quantize IN [OUT] TYPE [NTHREADS]`: a GGUF file, checkpoint or repository to GGUF of another type."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phiquant.cli.conversion import ConversionBar, print_plan, print_report
from phiquant.cli.models import fetched, source_of
from phiquant.convert import Importance, Options, Target, TypePattern, parse_file_type, parse_tensor_type
from phiquant.convert.overrides import parse_override
from phiquant.convert.parts import WHOLE, Division, in_parts, keep_parts
from phiquant.convert.plan import Plan, plan_quantize
from phiquant.convert.prune import parse_layers
from phiquant.convert.run import Maker, execute
from phiquant.convert.source import Source, open_source
from phiquant.convert.weighing import Calibrated
from phiquant.errors import RequestError, TypeNameError
from phiquant.gguf import GGMLType
from phiquant.gguf.output import check_space

__all__ = ["DEFAULT_TOKENS", "METHODS", "Arguments", "QuantizeOptions", "parse_arguments", "quantize"]

METHODS: Final = ("feedback", "imatrix", "plain")
DEFAULT_TOKENS: Final = 16_384
"""Tokens of a text that error feedback reads, if it has as many."""


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
    tensor_type_file: Path | None = None
    imatrix: Path | None = None
    calibrate: Path | None = None
    method: str | None = None
    calibration_tokens: int | None = None
    statistics: Path | None = None
    include_weights: Sequence[str] = ()
    exclude_weights: Sequence[str] = ()
    prune_layers: str | None = None
    leave_output_tensor: bool = False
    allow_requantize: bool = False
    override_kv: Sequence[str] = ()
    keep_nan: bool = False
    division: Division = WHOLE
    keep_split: bool = False
    resume: bool = False
    max_memory: int | None = None
    dry_run: bool = False
    quiet: bool = False


def quantize(arguments: Sequence[str], options: QuantizeOptions | None = None, *, repository: str | None = None) -> int:
    """Quantize, or show what would be done. `arguments`: IN [OUT] TYPE [NTHREADS], without IN if a `repository` is."""
    parsed = parse_arguments(arguments if repository is None else [repository, *arguments])
    options = options or QuantizeOptions()
    patterns = [*options.tensor_type, *_listed_types(options.tensor_type_file)]
    chosen = Options(
        pure=options.pure,
        output_tensor_type=_tensor_type(options.output_tensor_type),
        token_embedding_type=_tensor_type(options.token_embedding_type),
        tensor_types=tuple(TypePattern.parse(text) for text in patterns),
        leave_output_tensor=options.leave_output_tensor,
    )
    overrides = [parse_override(text) for text in options.override_kv]
    method = _method(options)
    prune = parse_layers(options.prune_layers) if options.prune_layers is not None else ()
    if repository is None:
        model: str | Path = source_of(parsed.model, quiet=options.quiet)
    else:
        model = fetched(repository, quiet=options.quiet)
    with open_source(model, quiet=options.quiet) as source, ExitStack() as stack:

        def planned(importance: Importance | None, calibrated: Calibrated | None = None) -> Plan:
            plan = plan_quantize(
                source,
                parsed.target,
                parsed.outfile,
                chosen,
                overrides=overrides,
                allow_requantize=options.allow_requantize,
                importance=importance,
                calibrated=calibrated,
                prune=prune,
                dry_run=options.dry_run,
            )
            return keep_parts(plan, options.division) if options.keep_split else in_parts(plan, options.division)

        maker: Maker | None = None
        if method == "feedback":
            plan, maker = _fed_back(source, options, parsed.threads, planned, stack)
        elif method == "imatrix" and options.calibrate is not None:
            plan = _calibrated(source, options.calibrate, options, parsed.threads, planned)
        else:
            plan = planned(None if options.imatrix is None else _opened(options.imatrix, options))
        if options.dry_run:
            print_plan(plan)
            return 0
        with ConversionBar(quiet=options.quiet) as bar:
            report = execute(
                plan,
                threads=parsed.threads,
                keep_nan=options.keep_nan,
                resume=options.resume,
                max_memory=options.max_memory,
                progress=bar,
                maker=maker,
            )
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
    return True


def _method(options: QuantizeOptions) -> str:
    """How weights are rounded, once what the options say of it makes sense; nothing has been read yet."""
    text, reads = options.calibrate, options.calibrate is not None or options.statistics is not None
    method = options.method or ("feedback" if reads else "imatrix" if options.imatrix is not None else "plain")
    if method not in METHODS:
        raise RequestError(f"--method is {', '.join(METHODS[:-1])} or {METHODS[-1]}, not {method!r}.")
    if options.imatrix is not None and reads:
        raise RequestError("--imatrix and --calibrate both give an importance matrix; choose one of them.")
    if options.statistics is not None and method != "feedback":
        raise RequestError(f"--statistics is for --method feedback, not {method}; leave it out.")
    if method == "feedback" and not reads:
        raise RequestError("--method feedback needs a text that the model reads; give one with --calibrate TEXT.")
    if method == "imatrix" and text is None and options.imatrix is None:
        raise RequestError("--method imatrix needs --imatrix FILE, or --calibrate TEXT to make one of.")
    if options.calibration_tokens is not None and (text is None or method == "plain"):
        raise RequestError("--calibration-tokens counts tokens of a text; give one with --calibrate TEXT.")
    if method == "plain" or not (reads or options.imatrix):
        for name, given in (("include", options.include_weights), ("exclude", options.exclude_weights)):
            if given:
                raise RequestError(
                    f"--{name}-weights chooses entries of an importance matrix; pass one with --imatrix."
                )
    if method == "plain" and options.imatrix is not None:
        raise RequestError("--method plain uses no importance matrix; leave out --imatrix or choose another method.")
    return method


def _opened(path: Path, options: QuantizeOptions) -> Importance:
    return Importance.open(path, options.include_weights, options.exclude_weights)


def _calibrated(
    source: Source, text: Path, options: QuantizeOptions, threads: int, planned: Callable[[Importance | None], Plan]
) -> Plan:
    """The plan with importance collected from a text; whatever would be refused after that is refused before."""
    from phiquant.cli import calibration  # loads the engine, which quantizing does without

    include, exclude = options.include_weights, options.exclude_weights
    plan = planned(calibration.assumed_importance(source, text, include=include, exclude=exclude))
    if options.dry_run:
        return plan
    if all(tensor.importance is None for tensor in plan.tensors):
        raise RequestError(
            f"--calibrate {text}: no type of {plan.path.name} depends on importance; leave the option out."
        )
    check_space(plan.path, plan.size)
    return planned(
        calibration.calibrated_importance(
            source,
            text,
            include=include,
            exclude=exclude,
            folder=plan.path.absolute().parent,
            threads=threads,
            tokens=options.calibration_tokens,
            quiet=options.quiet,
        )
    )


def _fed_back(
    source: Source,
    options: QuantizeOptions,
    threads: int,
    planned: Callable[[Importance | None, Calibrated | None], Plan],
    stack: ExitStack,
) -> tuple[Plan, Maker | None]:
    """The plan with error feedback, and what makes its weights; whatever would be refused late is refused before."""
    from phiquant.cli import calibration

    text, include, exclude = options.calibrate, options.include_weights, options.exclude_weights
    plan = planned(None, calibration.assumed_calibration(text, options.statistics, include=include, exclude=exclude))
    if options.dry_run:
        return plan, None
    check_space(plan.path, plan.size)
    calibrated, maker = stack.enter_context(
        calibration.feedback(
            source,
            text,
            tokens=DEFAULT_TOKENS if options.calibration_tokens is None else options.calibration_tokens,
            statistics=options.statistics,
            include=include,
            exclude=exclude,
            folder=plan.path.absolute().parent,
            threads=threads,
            quiet=options.quiet,
        )
    )
    return planned(None, calibrated), maker


def _listed_types(path: Path | None) -> list[str]:
    """PATTERN=TYPE, separated by spaces or newlines."""
    if path is None:
        return []
    try:
        return path.read_text("utf-8").split()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text"
        raise RequestError(f"--tensor-type-file {path} cannot be read: {reason}.") from error


def _tensor_type(text: str | None) -> GGMLType | None:
    return None if text is None else parse_tensor_type(text)
