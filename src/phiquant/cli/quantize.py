"""`phiquant quantize IN [OUT] TYPE [NTHREADS]`: a GGUF file, checkpoint or repository to GGUF of another type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from phiquant.cli.conversion import ConversionBar, print_plan, print_report
from phiquant.cli.mixes import Choice, MixOptions
from phiquant.cli.models import fetched, source_of
from phiquant.cli.notices import Notices
from phiquant.cli.original import Original
from phiquant.cli.quantize_options import (
    QuantizeOptions,
    check_distill,
    check_mix,
    method_of,
    parse_arguments,
)
from phiquant.convert import Importance, Options, Target, TypePattern, parse_tensor_type
from phiquant.convert.entries import Entry
from phiquant.convert.overrides import parse_override
from phiquant.convert.parts import in_parts, keep_parts
from phiquant.convert.plan import Plan, output_folder, plan_quantize
from phiquant.convert.prune import parse_layers
from phiquant.convert.run import Maker, execute
from phiquant.convert.source import Source, open_source
from phiquant.convert.weighing import Calibrated
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType
from phiquant.gguf.output import check_space
from phiquant.gguf.quality import Quality

if TYPE_CHECKING:
    from phiquant.cli.measuring import MeasureText

__all__ = ["quantize"]


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
    method = method_of(options)
    check_mix(options, method)
    check_distill(options)
    prune = parse_layers(options.prune_layers) if options.prune_layers is not None else ()
    if repository is None:
        model: str | Path = source_of(parsed.model, quiet=options.quiet)
    else:
        model = fetched(repository, quiet=options.quiet)
    with open_source(model, quiet=options.quiet) as source, ExitStack() as stack:
        text = _measure_text(source, options)
        folder = output_folder(source, parsed.outfile).absolute()
        original = Original(source, folder, threads=parsed.threads, quiet=options.quiet)
        stack.enter_context(original)

        def plan_of(choice: Choice, statistics: Statistics, of: Source = source) -> Plan:
            plan = plan_quantize(
                of,
                choice.target,
                parsed.outfile,
                choice.recipe,
                overrides=[*overrides, *choice.entries, *_added(options)],
                allow_requantize=options.allow_requantize,
                importance=statistics.importance,
                calibrated=statistics.calibrated,
                prune=prune,
                dry_run=options.dry_run,
            )
            path = _mix_path(plan, parsed.outfile, options.mix) if options.mix.wanted else plan.path
            plan = replace(plan, path=path, quality=None if text is None else text.unknown(source.name))
            return keep_parts(plan, options.division) if options.keep_split else in_parts(plan, options.division)

        @cache
        def tokens() -> int | None:
            """So many of the text are not for measuring; None for all. Refuses a text that is too short for both."""
            return None if text is None else text.check(original.path())

        assumed = _assumed(source, options, method)
        if options.mix.wanted:
            found = _mix(original, options, chosen, assumed, plan_of, tokens, parsed.threads)
            if found is None:
                return 0
            choice, assumed = found
        else:
            assert parsed.target is not None
            choice = Choice(parsed.target, chosen)
        plan = plan_of(choice, assumed)
        if options.dry_run:
            print_plan(plan)
            return 0
        _check(plan, options, method)
        if options.distill:
            from phiquant.cli import distilling

            assert options.calibrate is not None
            distilling.check(plan, original.path(), options.calibrate, tokens=options.distill_tokens, most=tokens())
        statistics, maker = _collected(original, options, method, assumed, parsed.threads, tokens(), stack)
        plan = plan_of(choice, statistics)
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
        said = None
        if options.distill:
            from phiquant.cli import distilling

            assert options.calibrate is not None
            report, tuned = distilling.distilled(
                report,
                original.path(),
                options.calibrate,
                tokens=options.distill_tokens,
                most=tokens(),
                epochs=options.distill_epochs,
                threads=parsed.threads,
                unknown=plan.quality,
                measure=None if text is None else measure,
                quiet=options.quiet,
            )
            said = distilling.sentence(tuned)
    if not options.quiet:
        print_report(report)
        if said is not None:
            print(said)
    return 0


def _added(options: QuantizeOptions) -> list[Entry]:
    """Of a dry run, the metadata that comes when the file is made."""
    if not (options.distill and options.dry_run):
        return []
    from phiquant.cli import distilling

    return distilling.expected_entries()


def _mix_path(plan: Plan, outfile: Path | None, mix: MixOptions) -> Path:
    """Where a mix goes: NAME-SIZE.gguf, if no file is given."""
    if outfile is not None and not outfile.is_dir():
        return plan.path
    from phiquant.calibrate.limit import Limit

    label = Limit.parse(mix.budget).label if mix.budget is not None else mix.plan.stem if mix.plan is not None else ""
    return plan.path.with_name(f"{plan.path.stem.removesuffix(plan.target.name)}{label}.gguf")


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


@dataclass(frozen=True)
class Statistics:
    """What is known of the weights' inputs: importance, or that there is error feedback, or neither."""

    importance: Importance | None = None
    calibrated: Calibrated | None = None


def _assumed(source: Source, options: QuantizeOptions, method: str) -> Statistics:
    """What is there; where something is yet to be collected, what is assumed of it: plans have the right sizes."""
    include, exclude = options.include_weights, options.exclude_weights
    if method == "feedback":
        from phiquant.cli import calibration  # loads the engine, which quantizing does without

        return Statistics(
            calibrated=calibration.assumed_calibration(
                source,
                options.calibrate,
                options.statistics,
                calibration.Search(**options.search.given),
                include=include,
                exclude=exclude,
            )
        )
    if options.imatrix is not None:
        return Statistics(_opened(options.imatrix, options))
    if method == "imatrix":
        from phiquant.cli import calibration

        assert options.calibrate is not None
        return Statistics(calibration.assumed_importance(source, options.calibrate, include=include, exclude=exclude))
    return Statistics()


def _mix(
    original: Original,
    options: QuantizeOptions,
    recipe: Options,
    assumed: Statistics,
    plan_of: Callable[[Choice, Statistics, Source], Plan],
    most: Callable[[], int | None],
    threads: int,
) -> tuple[Choice, Statistics] | None:
    """The types of a mix, and what was assumed or is now known; None if it was only to be shown.

    `most` tells how many tokens of the text may be read, None for all.
    """
    from phiquant.cli import mixing  # loads the engine, which quantizing does without

    calibrated = None if assumed.calibrated is None else replace(assumed.calibrated, needed=False)
    tried = replace(assumed, calibrated=calibrated)

    def planner(of: Source) -> Callable[[Target, Options, Sequence[Entry]], Plan]:
        return lambda target, recipe, entries: plan_of(Choice(target, recipe, entries), tried, of)

    mix = options.mix
    if mix.plan is not None:
        return mixing.from_file(original.source, mix.plan, recipe, planner(original.source)), assumed
    assert options.calibrate is not None
    found = mixing.budgeted(
        original,
        options.calibrate,
        None if options.imatrix is None else assumed.importance,
        mix,
        recipe,
        planner,
        include=options.include_weights,
        exclude=options.exclude_weights,
        tokens=lambda: _fewest(options.calibration_tokens, most()),
        drawn=options.search.drawn_share,
        feedback=assumed.calibrated is not None,
        threads=threads,
        quiet=options.quiet,
    )
    if found is None:
        return None
    choice, importance = found
    return choice, assumed if assumed.importance is None else Statistics(importance)


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
        check_space(plan.path, plan.size * (2 if options.distill else 1))


def _collected(
    original: Original,
    options: QuantizeOptions,
    method: str,
    known: Statistics,
    threads: int,
    most: int | None,
    stack: ExitStack,
) -> tuple[Statistics, Maker | None]:
    """What is collected from a text, of its first `most` tokens if that is a number; and what makes the weights."""
    if method == "plain" or options.imatrix is not None or (method == "imatrix" and options.mix.budget is not None):
        return known, None
    from phiquant.cli import calibration  # loads the engine, which quantizing does without

    if method == "imatrix":
        assert options.calibrate is not None
        importance = calibration.calibrated_importance(
            original,
            options.calibrate,
            include=options.include_weights,
            exclude=options.exclude_weights,
            tokens=_fewest(options.calibration_tokens, most),
            threads=threads,
            quiet=options.quiet,
        )
        return Statistics(importance), None
    tokens = _fewest(
        calibration.DEFAULT_TOKENS if options.calibration_tokens is None else options.calibration_tokens, most
    )
    assert tokens is not None
    calibrated, maker = stack.enter_context(
        calibration.feedback(
            original,
            options.calibrate,
            tokens=tokens,
            search=calibration.Search(**options.search.given),
            statistics=options.statistics,
            include=options.include_weights,
            exclude=options.exclude_weights,
            threads=threads,
            quiet=options.quiet,
        )
    )
    return Statistics(calibrated=calibrated), maker


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
