"""`phiquant quantize IN [OUT] TYPE [NTHREADS]`: a GGUF file, checkpoint or repository to GGUF of another type."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from phiquant.cli.conversion import ConversionBar, print_plan, print_report
from phiquant.cli.mixes import MixOptions
from phiquant.cli.models import fetched, source_of
from phiquant.convert import Importance, Options, Target, TypePattern, parse_file_type, parse_tensor_type
from phiquant.convert.entries import Entry
from phiquant.convert.overrides import parse_override
from phiquant.convert.parts import WHOLE, Division, in_parts, keep_parts
from phiquant.convert.plan import Plan, plan_quantize
from phiquant.convert.prune import parse_layers
from phiquant.convert.run import execute
from phiquant.convert.source import Source, open_source
from phiquant.errors import RequestError, TypeNameError
from phiquant.gguf import GGMLType
from phiquant.gguf.output import check_space

__all__ = ["Arguments", "QuantizeOptions", "parse_arguments", "quantize"]


@dataclass(frozen=True)
class Arguments:
    """The arguments without a name."""

    model: str
    outfile: Path | None
    target: Target | None  # None for a mix, which has no name
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
    mix: MixOptions = field(default_factory=MixOptions)


def quantize(arguments: Sequence[str], options: QuantizeOptions | None = None, *, repository: str | None = None) -> int:
    """Quantize, or show what would be done. `arguments`: IN [OUT] TYPE [NTHREADS], without IN if a `repository` is."""
    options = options or QuantizeOptions()
    parsed = parse_arguments(arguments if repository is None else [repository, *arguments], mix=options.mix.wanted)
    patterns = [*options.tensor_type, *_listed_types(options.tensor_type_file)]
    chosen = Options(
        pure=options.pure,
        output_tensor_type=_tensor_type(options.output_tensor_type),
        token_embedding_type=_tensor_type(options.token_embedding_type),
        tensor_types=tuple(TypePattern.parse(text) for text in patterns),
        leave_output_tensor=options.leave_output_tensor,
    )
    overrides = [parse_override(text) for text in options.override_kv]
    _check_importance(options)
    _check_mix(options)
    prune = parse_layers(options.prune_layers) if options.prune_layers is not None else ()
    if repository is None:
        model: str | Path = source_of(parsed.model, quiet=options.quiet)
    else:
        model = fetched(repository, quiet=options.quiet)
    with open_source(model, quiet=options.quiet) as source:

        def planned(
            importance: Importance | None,
            target: Target | None = parsed.target,
            recipe: Options = chosen,
            entries: Sequence[Entry] = (),
            of: Source = source,
        ) -> Plan:
            assert target is not None
            plan = plan_quantize(
                of,
                target,
                parsed.outfile,
                recipe,
                overrides=[*overrides, *entries],
                allow_requantize=options.allow_requantize,
                importance=importance,
                prune=prune,
                dry_run=options.dry_run,
            )
            if options.mix.wanted:
                plan = replace(plan, path=_mix_path(plan, parsed.outfile, options.mix))
            return keep_parts(plan, options.division) if options.keep_split else in_parts(plan, options.division)

        def planner(of: Source, importance: Importance | None) -> Callable[[Target, Options, Sequence[Entry]], Plan]:
            return lambda target, recipe, entries: planned(importance, target, recipe, entries, of)

        given = None if options.imatrix is None else _opened(options.imatrix, options)
        if options.mix.budget is not None:
            from phiquant.cli import mixing  # loads the engine, which quantizing does without

            assert options.calibrate is not None
            found = mixing.budgeted(
                source,
                options.calibrate,
                given,
                options.mix,
                chosen,
                planner,
                include=options.include_weights,
                exclude=options.exclude_weights,
                threads=parsed.threads,
                quiet=options.quiet,
            )
            if found is None:
                return 0
            plan = found
        elif options.mix.plan is not None:
            plan = _from_plan(source, options.mix.plan, options, chosen, planner, given, parsed.threads)
        elif options.calibrate is not None:
            plan = _calibrated(source, options.calibrate, options, parsed.threads, planned)
        else:
            plan = planned(given)
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
            )
    if not options.quiet:
        print_report(report)
    return 0


def parse_arguments(arguments: Sequence[str], *, mix: bool = False) -> Arguments:
    """Tell OUT from TYPE as llama-quantize does: the second argument is the type if it is the name or number of one.

    For a `mix` there is no TYPE.
    """
    if mix:
        return _parse_mix(arguments)
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


def _parse_mix(arguments: Sequence[str]) -> Arguments:
    if not 1 <= len(arguments) <= 3:
        raise RequestError("with --budget or --plan, quantize takes IN [OUT [NTHREADS]]")
    model, *rest = arguments
    for text in rest[:1] if len(rest) < 2 or not _names_a_type(rest[1]) else rest[1:]:
        if _names_a_type(text) and (len(rest) < 2 or not text.isdecimal()):
            raise RequestError(f"--budget and --plan choose the types themselves; leave {text} out.")
    threads = rest[1] if len(rest) > 1 else "0"
    if not (threads.isascii() and threads.isdecimal()):
        raise RequestError(f"{threads!r} is not a number of threads; quantize takes IN [OUT [NTHREADS]] here.")
    return Arguments(model, Path(rest[0]) if rest else None, None, int(threads))


def _names_a_type(text: str) -> bool:
    try:
        parse_file_type(text)
    except TypeNameError:
        return False
    return True


def _check_importance(options: QuantizeOptions) -> None:
    """Before anything is read: what the options say of importance makes sense."""
    if options.imatrix is not None and options.calibrate is not None and options.mix.budget is None:
        raise RequestError("--imatrix and --calibrate both give an importance matrix; choose one of them.")
    if options.imatrix is None and options.calibrate is None:
        for name, given in (("include", options.include_weights), ("exclude", options.exclude_weights)):
            if given:
                raise RequestError(
                    f"--{name}-weights chooses entries of an importance matrix; pass one with --imatrix."
                )


def _check_mix(options: QuantizeOptions) -> None:
    """Before anything is read: what the options say of a mix makes sense."""
    mix = options.mix
    mix.check()
    if not mix.wanted:
        return
    given = "--budget" if mix.budget is not None else "--plan"
    for name, used in (("--pure", options.pure), ("--prune-layers", options.prune_layers is not None)):
        if used:
            raise RequestError(f"{name} and {given} cannot be used together; leave one of them out.")
    if mix.budget is not None:
        if options.calibrate is None:
            raise RequestError("--budget measures what each weight costs; pass a text for it with --calibrate TEXT.")
        if options.dry_run:
            raise RequestError("--dry-run measures nothing, and --budget has to; use --plan-only to see the mix.")


def _mix_path(plan: Plan, outfile: Path | None, mix: MixOptions) -> Path:
    """Where a mix goes: NAME-SIZE.gguf, if no file is given."""
    if outfile is not None and not outfile.is_dir():
        return plan.path
    from phiquant.calibrate.limit import Limit

    label = Limit.parse(mix.budget).label if mix.budget is not None else mix.plan.stem if mix.plan is not None else ""
    return plan.path.with_name(f"{plan.path.stem.removesuffix(plan.target.name)}{label}.gguf")


def _from_plan(
    source: Source,
    path: Path,
    options: QuantizeOptions,
    chosen: Options,
    planner: Callable[[Source, Importance | None], Callable[[Target, Options, Sequence[Entry]], Plan]],
    given: Importance | None,
    threads: int,
) -> Plan:
    """The plan of a mix in a file, with importance from a text if there is one."""
    from phiquant.cli import mixing  # loads the engine

    def planned(importance: Importance | None) -> Plan:
        return mixing.from_file(source, path, chosen, planner(source, importance))

    return (
        planned(given)
        if options.calibrate is None
        else _calibrated(source, options.calibrate, options, threads, planned)
    )


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
            quiet=options.quiet,
        )
    )


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
