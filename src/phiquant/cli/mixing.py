"""`phiquant quantize --budget` and `--plan`: a type for every weight, found for a size or read from a file."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

from rich import box
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from phiquant.calibrate.budget import Menu, Planner, mix_entries, room_for
from phiquant.calibrate.candidates import READERS
from phiquant.calibrate.chunks import DRAWN
from phiquant.calibrate.limit import Limit
from phiquant.calibrate.mix import Mix, find_mix, weight_bytes
from phiquant.calibrate.planfile import PlanFile
from phiquant.calibrate.probe import Probe
from phiquant.calibrate.quantizing import Quantizer, quantized
from phiquant.cli.calibration import assumed_importance, calibrated_importance
from phiquant.cli.mixes import Choice, MixOptions
from phiquant.cli.notices import Notices
from phiquant.cli.original import Original
from phiquant.cli.reading import reading_progress, text_of
from phiquant.convert import Importance, Options, Plan
from phiquant.convert.source import Source, open_source
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType
from phiquant.gguf.output import OutputFile, check_space

__all__ = ["Sources", "budgeted", "from_file"]

_UNSEEN_WIDTH: Final = 160  # columns when the output goes to a file or a pipe

Sources = Callable[[Source], Planner]
"""What plans a file from a source."""


def budgeted(
    original: Original,
    text: Path,
    given: Importance | None,
    options: MixOptions,
    recipe: Options,
    sources: Sources,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tokens: Callable[[], int | None] = lambda: None,
    drawn: float | None = None,
    quantizer: Quantizer | None = None,
    feedback: bool = False,
    threads: int = 0,
    quiet: bool = False,
) -> tuple[Choice, Importance] | None:
    """The best mix for a budget, and the importance by which it was found; None if that was only to be shown.

    `text` is read to measure, and for importance if none is `given`, then so many of its `tokens` as are told once all
    else makes sense; None for all. `drawn`: as for `Probe`, None for the usual. `quantizer` None: the usual one;
    `feedback`: error feedback will make the file instead. Errors as for `Calibration`, `find_mix` and what `sources`
    makes.
    """
    assert options.budget is not None
    used = quantizer or partial(quantized, threads=threads)
    limit, read, allowed = Limit.parse(options.budget), text_of(text), options.types()
    source, origin = original.source, str(text).encode(errors="replace").decode()
    # Whatever can be refused is refused before the work.
    assumed = given or assumed_importance(source, text, include=include, exclude=exclude)
    plan = _checked(source, limit, origin, recipe, sources, allowed, assumed)
    if not options.plan_only:
        OutputFile(plan.path, overwrite=True, protect=source.files)
        check_space(plan.path, plan.size)
    if options.save_plan is not None:
        OutputFile(options.save_plan, overwrite=True, protect=[*source.files, text])
    most = tokens()
    with ExitStack() as stack:
        model = original.path()
        importance = given or calibrated_importance(
            original, text, include=include, exclude=exclude, tokens=most, threads=threads, quiet=quiet
        )
        stored = stack.enter_context(open_source(model)) if model != source.files[0] else source
        menu = Menu.of(stored, sources(stored), recipe, importance, allowed)
        planner = sources(source)
        factors = menu.feedback_factors if feedback else {}
        room = room_for(menu, planner, limit, origin)
        notices = Notices(quiet=quiet)
        begin = time.perf_counter()
        probe = stack.enter_context(
            Probe(
                model,
                read,
                tokens=options.sensitivity_tokens,
                drawn=DRAWN if drawn is None else drawn,
                threads=threads,
                tell=notices.progress,
            )
        )
        notices.clear()
        with _StageBar(probe.tokens, quiet=quiet) as bar:
            mix = find_mix(probe, menu.weights, menu.types, room, quantizer=used, factors=factors, told=bar.advanced)
        seconds = time.perf_counter() - begin
        found = PlanFile(mix, limit.text, origin)
        if options.save_plan is not None:
            found.write(options.save_plan, menu.weights, [*source.files, text])
        choice = Choice(*menu.chosen(mix.types), mix_entries(mix, limit, origin))
        if options.plan_only:
            _print_mix(menu, mix, sys.stdout if options.save_plan is not None else sys.stderr)
            if options.save_plan is None:
                print(found.written(menu.weights), end="")
        if not quiet:
            plan = planner(choice.target, choice.recipe, choice.entries)
            print(_described(mix, plan, limit, seconds), file=sys.stderr)
    return None if options.plan_only else (choice, importance)


def _checked(
    source: Source,
    limit: Limit,
    origin: str,
    recipe: Options,
    sources: Sources,
    allowed: frozenset[GGMLType],
    importance: Importance,
) -> Plan:
    """The smallest plan, before there is importance. Errors as `room_for`."""
    planner = sources(source)
    menu = Menu.of(source, planner, recipe, importance, allowed)
    room_for(menu, planner, limit, origin)
    return menu.plan(planner, {name: types[0] for name, types in menu.types.items()}, ())


def from_file(source: Source, path: Path, recipe: Options, planner: Planner) -> Choice:
    """The mix that a file holds. RequestError if it is not for this model; others as `planner`."""
    given = PlanFile.read(path)
    menu = Menu.of(source, planner, recipe, None, READERS["ours"])
    try:
        types = given.matching(menu.weights, menu.others)
    except RequestError as error:
        raise RequestError(f"--plan {path}: {error}.") from error
    return Choice(*menu.chosen(types))


def _print_mix(menu: Menu, mix: Mix, file: TextIO) -> None:
    """A table of every weight: type, bytes, predicted share of the divergence."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    table.add_column("type")
    for name in ("bits", "bytes", "nats", "share"):
        table.add_column(name, justify="right")
    total = sum(mix.costs.values()) or 1.0
    for weight in menu.weights:
        name = weight.tensor.name
        kind, cost = mix.types[name], mix.costs[name]
        table.add_row(
            name,
            kind.name,
            f"{kind.bits_per_weight:.2f}",
            f"{weight_bytes(weight, kind):,}",
            f"{cost:.2e}",
            f"{cost / total:.1%}",
        )
    Console(file=file, highlight=False, width=None if file.isatty() else _UNSEEN_WIDTH).print(table)


def _described(mix: Mix, plan: Plan, limit: Limit, seconds: float) -> str:
    budget = limit.file_bytes(plan)
    first = f" (of the first mix {mix.first[0]:.3g} and {mix.first[1]:.3g})" if mix.first else ""
    return (
        f"phiquant: {plan.size:,} of {budget:,} bytes, {plan.bits_per_weight:.2f} bits per weight; divergence in nats: "
        f"predicted {mix.predicted:.3g}, measured {mix.measured:.3g}{first}; {seconds:.0f} s"
    )


class _StageBar:
    """A bar on stderr: what is going on, how far it is, tokens per second, the time left. A context manager."""

    def __init__(self, tokens: int, *, quiet: bool) -> None:
        self._tokens = tokens
        self._bar = reading_progress(quiet=quiet)
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def advanced(self, what: str, done: int, total: int) -> None:
        """Move the bar of a stage."""
        now = time.perf_counter()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, rate=""), now
        task, begin = self._tasks[what]
        measured = what.startswith("measuring") and done
        rate = f"{done * self._tokens / (now - begin):.0f} tokens/s" if measured and now > begin else ""
        self._bar.update(task, completed=done, total=total, rate=rate)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
