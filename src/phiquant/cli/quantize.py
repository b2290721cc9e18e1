"""`phiquant quantize IN [OUT] TYPE [NTHREADS]`: a GGUF file, checkpoint or repository to GGUF of another type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phiquant.cli.conversion import ConversionBar, print_plan, print_report
from phiquant.cli.models import fetched, source_of
from phiquant.cli.notices import Notices
from phiquant.cli.original import Original
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
from phiquant.gguf.quality import Quality

if TYPE_CHECKING:
    from phiquant.cli.measuring import MeasureText

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
    measure: bool = True
    measure_text: Path | None = None
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
        text = _measure_text(source, options)

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
            plan = replace(plan, quality=None if text is None else text.unknown(source.name))
            return keep_parts(plan, options.division) if options.keep_split else in_parts(plan, options.division)

        plan = _assumed(source, options, method, planned)
        if options.dry_run:
            print_plan(plan)
            return 0
        _check(plan, options, method)
        original = Original(source, plan.path.absolute().parent, threads=parsed.threads, quiet=options.quiet)
        stack.enter_context(original)
        tokens = None if text is None else text.check(original.path())
        maker: Maker | None = None
        if method == "feedback":
            plan, maker = _fed_back(original, options, parsed.threads, tokens, planned, stack)
        elif method == "imatrix" and options.calibrate is not None:
            plan = _calibrated(original, options.calibrate, options, parsed.threads, tokens, planned)
        with ConversionBar(quiet=options.quiet) as bar:

            def measure(file: Path) -> Quality:
                from phiquant.cli.measuring import measured  # loads the engine, which quantizing does without

                assert text is not None
                bar.stop()
                return measured(
                    file, original.path(), text, called=source.name, threads=parsed.threads, quiet=options.quiet
                )

            report = execute(
                plan,
                threads=parsed.threads,
                keep_nan=options.keep_nan,
                resume=options.resume,
                max_memory=options.max_memory,
                measure=None if text is None else measure,
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


def _measure_text(source: Source, options: QuantizeOptions) -> MeasureText | None:
    """What the output is to be measured on; None if it is not to be measured."""
    if options.measure_text is not None and not options.measure:
        raise RequestError("--measure-text and --no-measure contradict each other; give one.")
    path = options.measure_text or options.calibrate
    if path is None or not options.measure:
        return None
    notices = Notices(quiet=options.quiet)
    quantized = next((tensor for tensor in source.tensors if tensor.type.is_quantized), None)
    if quantized is not None:
        sentence = f"{source.files[0]} is quantized already ({quantized.name} is {quantized.type.name})"
        if options.measure_text is not None:
            raise RequestError(f"{sentence}, and nothing is measured beside it; leave out --measure-text.")
        notices.note(f"{sentence}, so the result is not measured beside it")
        return None
    if options.measure_text is None and options.statistics is not None and options.statistics.exists():
        notices.note(
            f"{options.statistics} does not say which end of {path} it was not collected on, so the result is not "
            "measured; --measure-text does that"
        )
        return None
    from phiquant.cli.measuring import MeasureText  # loads the engine, which quantizing does without

    return MeasureText.read(path, held_out=options.measure_text is None)


def _assumed(
    source: Source,
    options: QuantizeOptions,
    method: str,
    planned: Callable[[Importance | None, Calibrated | None], Plan],
) -> Plan:
    """The plan; where something is yet to be collected, with what is only assumed of it: the sizes are right."""
    include, exclude = options.include_weights, options.exclude_weights
    if method == "feedback":
        from phiquant.cli import calibration  # loads the engine, which quantizing does without

        return planned(
            None,
            calibration.assumed_calibration(options.calibrate, options.statistics, include=include, exclude=exclude),
        )
    if method == "imatrix" and options.calibrate is not None:
        from phiquant.cli import calibration

        return planned(
            calibration.assumed_importance(source, options.calibrate, include=include, exclude=exclude), None
        )
    return planned(None if options.imatrix is None else _opened(options.imatrix, options), None)


def _check(plan: Plan, options: QuantizeOptions, method: str) -> None:
    """Whatever would be refused after a calibration is refused before."""
    if (
        method == "imatrix"
        and options.calibrate is not None
        and not any(t.importance is not None for t in plan.tensors)
    ):
        raise RequestError(
            f"--calibrate {options.calibrate}: no type of {plan.path.name} depends on importance; leave the option out."
        )
    if method == "feedback" or options.calibrate is not None or plan.quality is not None:
        check_space(plan.path, plan.size)


def _calibrated(
    original: Original,
    text: Path,
    options: QuantizeOptions,
    threads: int,
    most: int | None,
    planned: Callable[[Importance | None], Plan],
) -> Plan:
    """The plan with importance collected from a text, of its first `most` tokens if that is a number."""
    from phiquant.cli import calibration

    return planned(
        calibration.calibrated_importance(
            original,
            text,
            include=options.include_weights,
            exclude=options.exclude_weights,
            tokens=_fewest(options.calibration_tokens, most),
            threads=threads,
            quiet=options.quiet,
        )
    )


def _fed_back(
    original: Original,
    options: QuantizeOptions,
    threads: int,
    most: int | None,
    planned: Callable[[Importance | None, Calibrated | None], Plan],
    stack: ExitStack,
) -> tuple[Plan, Maker | None]:
    """The plan with error feedback, and what makes its weights; `most` as for `_calibrated`."""
    from phiquant.cli import calibration

    tokens = _fewest(DEFAULT_TOKENS if options.calibration_tokens is None else options.calibration_tokens, most)
    assert tokens is not None
    calibrated, maker = stack.enter_context(
        calibration.feedback(
            original,
            options.calibrate,
            tokens=tokens,
            statistics=options.statistics,
            include=options.include_weights,
            exclude=options.exclude_weights,
            threads=threads,
            quiet=options.quiet,
        )
    )
    return planned(None, calibrated), maker


def _fewest(*counts: int | None) -> int | None:
    """The smallest of the numbers; None if there is none."""
    return min((count for count in counts if count is not None), default=None)


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
