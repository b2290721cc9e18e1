"""What `quantize --distill` does with a finished file: tunes it, and puts the result in its place if it pays."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from phiquant.calibrate.chunks import Chunks
from phiquant.calibrate.distill import DEFAULT_EPOCHS, DEFAULT_TOKENS, Distillation, Distilled, learnt_chunks
from phiquant.calibrate.scale_fields import scale_fields
from phiquant.cli.conversion import ConversionBar
from phiquant.cli.notices import Notices
from phiquant.cli.reading import ReadingBar, text_of
from phiquant.convert.entries import Entry
from phiquant.convert.plan import Plan
from phiquant.convert.run import Report, execute
from phiquant.convert.source import GGUFSource
from phiquant.errors import RequestError
from phiquant.gguf import open_model
from phiquant.gguf.quality import Quality
from phiquant.text import Tokenizer

__all__ = ["check", "distilled", "expected_entries", "sentence"]


def expected_entries() -> list[Entry]:
    """For a dry run: as many bytes as the output will have of them."""
    return Distilled(0, 0, 0, 0).entries


def check(plan: Plan, original: Path, text: Path, *, tokens: int | None = None, most: int | None = None) -> None:
    """Whatever would be refused after rounding is refused before; the arguments are those of `distilled`."""
    if not any(scale_fields(tensor.type) for tensor in plan.tensors):
        raise RequestError(f"{plan.path} will have no scales that could be tuned; leave out --distill.")
    with open_model(original) as opened:
        tokenizer = Tokenizer.from_gguf(opened)
    learnt_chunks(Chunks.of(text_of(text), tokenizer, str(text), tokens=_fewest(tokens, most)))


def _fewest(tokens: int | None, most: int | None) -> int:
    return min(n for n in (tokens or DEFAULT_TOKENS, most) if n is not None)


def distilled(
    report: Report,
    original: Path,
    text: Path,
    *,
    tokens: int | None = None,
    most: int | None = None,
    epochs: int | None = None,
    threads: int = 0,
    unknown: Quality | None = None,
    measure: Callable[[Path], Quality] | None = None,
    quiet: bool = False,
) -> tuple[Report, Distilled]:
    """Tune the file of a report for the predictions of the original on a text. Errors as for `Distillation`.

    The file stays as it is if nothing is gained, or if this ends early.

    Args:
        report: what was done so far.
        original: what the file was made of.
        text: what both read.
        tokens: how many of it at most; None for the usual number.
        most: how many of it may be read, the rest being measured on; None for all.
        epochs: how often; None for the usual number.
        threads: native threads; 0 for as many as the process may use.
        unknown: the place for what is measured; None if nothing is.
        measure: as for `execute`.
        quiet: show nothing.
    """
    path, notices = report.plan.path, Notices(quiet=quiet)
    try:
        with Distillation(
            original,
            path,
            text_of(text),
            dataset=str(text),
            tokens=_fewest(tokens, most),
            epochs=epochs or DEFAULT_EPOCHS,
            threads=threads,
            tell=notices.progress,
        ) as made:
            notices.clear()
            with ReadingBar("distilling", 1, quiet=quiet) as bar:
                found = made.run(bar.advanced)
            if not found.pays:
                return report, found
            with GGUFSource(path) as source, ConversionBar(quiet=quiet) as progress:

                def measured(file: Path) -> Quality:
                    assert measure is not None
                    progress.stop()
                    return measure(file)

                again = execute(
                    made.plan(source, found, unknown),
                    threads=threads,
                    measure=None if measure is None else measured,
                    progress=progress,
                    maker=made,
                )
    except KeyboardInterrupt:
        notices.line(f"phiquant: {path} is whole, as it was rounded; it is not distilled")
        raise
    plan = replace(report.plan, entries=again.plan.entries, quality=again.plan.quality)
    return Report(plan, report.seconds + again.seconds, again.quality), found


def sentence(found: Distilled) -> str:
    """What became of it, in a line."""
    figures = f"KL divergence on held-out text {found.before:.6f}"
    if not found.pays:
        return (
            f"not distilled: {figures}, and {found.after:.6f} at best after tuning, which is too little for others "
            "to gain by, so the file stays as it was rounded"
        )
    epochs = "1 epoch" if found.epochs == 1 else f"{found.epochs} epochs"
    less = 1 - found.after / found.before
    return f"distilled: {figures} before, {found.after:.6f} after {epochs} ({less:.1%} less)"
