"""What `convert` and `quantize` show: a bar while they work, a line when they are done, a table for a dry run."""

import sys
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from phiquant.cli.bars import byte_bar
from phiquant.cli.quality import quality_sentence
from phiquant.convert import Plan, Report

__all__ = ["ConversionBar", "print_parts", "print_plan", "print_report"]

_UNSEEN_WIDTH = 160  # columns when the output goes to a file or a pipe


class ConversionBar:
    """A bar on stderr with the tensor at hand, the bytes of the source done, their rate and the time left.

    A context manager; silent if `quiet`, and without the bar if stderr is no terminal.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = byte_bar(quiet=quiet)
        self._console = self._bar.console
        self._task: TaskID | None = None

    def planned(self, plan: Plan) -> None:
        """Say what is to come, and what the user should know of it."""
        if not self._quiet:
            for note in plan.notes:
                self._console.print(f"note: {note}", markup=False, soft_wrap=True)
        self._task = self._bar.add_task(plan.path.name, total=plan.source_bytes)

    def advanced(self, source_bytes: int, tensor: str) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bar.update(self._task, advance=source_bytes, description=tensor)

    def preparing(self, what: str, share: float) -> None:
        """Say it in the place of the tensor."""
        if self._task is not None:
            self._bar.update(self._task, description=f"{what} {share:.0%}")

    def resumed(self, source_bytes: int) -> None:
        """Rate and time left count from here: what was done earlier took no time now."""
        if self._task is not None:
            self._bar.reset(self._task, completed=source_bytes)

    def stop(self) -> None:
        """Take the bar away: what is shown next is another's."""
        self._bar.stop()

    def __enter__(self) -> "ConversionBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def print_report(report: Report) -> None:
    """One line on stdout: the file, its size, bits per weight, seconds."""
    plan = report.plan
    if len(plan.part_sizes) > 1:
        print_parts(plan)
    print(f"{plan.path}: {_size(plan.size)}, {_described(plan)}, {report.seconds:.1f} s")
    if report.quality is not None:
        print(quality_sentence(report.quality))


def print_parts(plan: Plan) -> None:
    """A line on stdout for each file: its name, tensors, exact bytes."""
    for part in plan.parts:
        print(f"{part.path}: {len(part.tensors)} tensors, {part.size:,} bytes")


def print_plan(plan: Plan) -> None:
    """The dry run: every tensor with its type now and then, notes, the exact size of the file."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("from")
    table.add_column("to")
    table.add_column("bytes", justify="right")
    for tensor in plan.tensors:
        shape = " x ".join(str(extent) for extent in reversed(tensor.shape))
        table.add_row(tensor.name, shape, tensor.source.name, tensor.type.name, f"{tensor.nbytes:,}")
    width = None if sys.stdout.isatty() else _UNSEEN_WIDTH
    Console(highlight=False, width=width).print(table)
    for note in plan.notes:
        print(f"note: {note}")
    if plan.part_sizes:
        print_parts(plan)
    print(f"{plan.path} would have {plan.size:,} bytes ({_size(plan.size)}), {_described(plan)}")


def _described(plan: Plan) -> str:
    inventory = " + ".join(f"{count} {kind.name}" for kind, count in plan.inventory.items())
    return f"{plan.bits_per_weight:.2f} bits per weight, {inventory}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
