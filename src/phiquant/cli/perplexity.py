"""`phiquant perplexity`: how well a model predicts a text, alone or beside a base model or its saved logits."""

import dataclasses
import json
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phiquant.cli.failures import WrongUsage
from phiquant.cli.loaded import reading_model
from phiquant.cli.models import path_of
from phiquant.cli.notices import Notices
from phiquant.cli.reading import ReadingBar, text_of
from phiquant.errors import LogitsError, OutputError, RequestError
from phiquant.eval.measure import Base, Done, Measurement, RowsBase, stream
from phiquant.eval.quality import check_vocabularies
from phiquant.eval.saved import SavedLogits, SavedWriter
from phiquant.eval.statistics import Comparison, Estimate, Perplexity
from phiquant.eval.windows import Windows, strided_size
from phiquant.hub import Reference
from phiquant.llm import LLM

__all__ = ["PerplexityOptions", "described", "perplexity"]

FORMS = ("text", "json")


@dataclass(frozen=True)
class PerplexityOptions:
    """llama-perplexity's options as they are written, and a base that is a model."""

    model: Path | Reference
    file: Path | None = None
    ctx_size: int = 512
    batch_size: int = 2048
    chunks: int = -1
    ppl_stride: int = 0
    ppl_output_type: int = 0
    kl_divergence: bool = False
    kl_divergence_base: Path | None = None
    base: Path | None = None
    cache_type: str = "f16"
    output: str = "text"
    threads: int = 0
    quiet: bool = False


def perplexity(options: PerplexityOptions) -> int:
    """Do what the options ask for."""
    _check(options)
    path = path_of(options.model, quiet=options.quiet)
    options = dataclasses.replace(options, model=path)
    notices = Notices(quiet=options.quiet)
    with ExitStack() as stack:
        saved = None
        if options.kl_divergence and options.kl_divergence_base is not None:
            saved = stack.enter_context(SavedLogits(options.kl_divergence_base))
            if options.file is not None:
                notices.note(f"what is read is the text of {saved.path}, not {options.file}")
        size = _window_size(options, saved)
        model = stack.enter_context(_loaded(path, size, options, notices))
        windows = _windows(options, model, size, saved)
        base: Base | None = saved
        save = None
        if saved is not None and saved.vocabulary != model.config.vocab_size:
            raise LogitsError(
                f"{saved.path} was written by a model with a vocabulary of {saved.vocabulary} tokens, and "
                f"{options.model} has {model.config.vocab_size}; they cannot be compared"
            )
        if options.base is not None:
            other = stack.enter_context(_loaded(options.base, size, options, notices))
            check_vocabularies(model.tokenizer, other.tokenizer, (str(options.model), str(options.base)))
            blocks = stream(other, (windows.read(window) for window in range(len(windows))), windows)
            base = RowsBase(blocks)
        elif saved is None and options.kl_divergence_base is not None:
            writer = SavedWriter(options.kl_divergence_base, windows, model.config.vocab_size)
            save = stack.enter_context(writer)
        measured = Measurement(model, windows, base=base, save=save)
        _read(measured, windows, options)
        if save is not None:
            save.commit()
    _print(measured, windows, options)
    return 0


def described(found: Comparison) -> str:
    """All figures, laid out as llama-perplexity does, so that what reads its output reads this."""
    divergence, change = found.divergence, found.probabilities

    def plain(name: str, figure: Estimate | Perplexity) -> str:
        return f"{name:<30}: {figure.value:10.6f} ± {figure.error:10.6f}"

    correlation = "     -" if found.correlation is None else f"{100 * found.correlation:6.2f}%"
    lines = [
        "====== Perplexity statistics ======",
        plain("Mean PPL(Q)", found.perplexity),
        plain("Mean PPL(base)", found.base_perplexity),
        f"{'Cor(ln(PPL(Q)), ln(PPL(base)))':<30}: {correlation}",
        plain("Mean ln(PPL(Q)/PPL(base))", found.log_ratio),
        plain("Mean PPL(Q)/PPL(base)", found.ratio),
        plain("Mean PPL(Q)-PPL(base)", found.difference),
        "",
        "====== KL divergence statistics ======",
        f"Mean    KLD: {divergence.mean:10.6f} ± {divergence.error:10.6f}",
        f"Maximum KLD: {divergence.maximum:10.6f}",
    ]
    percentiles = [(percent, f"{percent:4.1f}%") for percent in divergence.percentiles]
    upper = [f"{name}   KLD: {divergence.percentiles[p]:10.6f}" for p, name in percentiles if p > 50]
    lower = [f"{name}   KLD: {divergence.percentiles[p]:10.6f}" for p, name in percentiles if p < 50]
    lines += [*upper, f"Median  KLD: {divergence.median:10.6f}", *lower, f"Minimum KLD: {divergence.minimum:10.6f}", ""]
    lines += [
        "====== Token probability statistics ======",
        f"Mean    Δp: {100 * change.mean.value:6.3f} ± {100 * change.mean.error:5.3f} %",
        f"Maximum Δp: {100 * change.maximum:6.3f}%",
    ]
    percentiles = [(percent, f"{percent:4.1f}%") for percent in change.percentiles]
    upper = [f"{name}   Δp: {100 * change.percentiles[p]:6.3f}%" for p, name in percentiles if p > 50]
    lower = [f"{name}   Δp: {100 * change.percentiles[p]:6.3f}%" for p, name in percentiles if p < 50]
    lines += [*upper, f"Median  Δp: {100 * change.median:6.3f}%", *lower, f"Minimum Δp: {100 * change.minimum:6.3f}%"]
    lines += [
        f"RMS Δp    : {100 * change.rms.value:6.3f} ± {100 * change.rms.error:5.3f} %",
        f"Same top p: {100 * divergence.top1:6.3f} ± {100 * divergence.top1_error:5.3f} %",
    ]
    return "\n".join(lines)


def _check(options: PerplexityOptions) -> None:
    if options.output not in FORMS:
        raise WrongUsage(f"the output is {' or '.join(FORMS)}, not {options.output!r}")
    if options.ppl_stride and (options.kl_divergence or options.kl_divergence_base is not None):
        raise WrongUsage("logits are saved and compared without --ppl-stride; leave it out")
    if options.kl_divergence:
        if (options.base is None) == (options.kl_divergence_base is None):
            raise WrongUsage("--kl-divergence takes a base: --base MODEL, or --kl-divergence-base with saved logits")
    elif options.base is not None:
        raise WrongUsage("--base is what --kl-divergence compares with; add --kl-divergence")
    if options.file is None and not (options.kl_divergence and options.kl_divergence_base is not None):
        raise WrongUsage("give a text with -f")
    target = options.kl_divergence_base
    if target is not None and not options.kl_divergence and target.exists():
        raise OutputError(f"{target} exists already; add --kl-divergence to compare with it, or name another file.")


def _window_size(options: PerplexityOptions, saved: SavedLogits | None) -> int:
    if saved is not None:
        return saved.windows.size
    return strided_size(options.ctx_size, options.ppl_stride) if options.ppl_stride else options.ctx_size


def _loaded(path: Path, size: int, options: PerplexityOptions, notices: Notices) -> AbstractContextManager[LLM]:
    return reading_model(
        path, size, notices, batch=options.batch_size, threads=options.threads, cache_type=options.cache_type
    )


def _windows(options: PerplexityOptions, model: LLM, size: int, saved: SavedLogits | None) -> Windows:
    limit = None if options.chunks < 0 else options.chunks
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    if saved is not None:
        tokens = saved.windows.tokens[:limit]
        if not len(tokens):
            raise RequestError(f"{limit} windows cannot be scored; take at least one")
        return dataclasses.replace(saved.windows, tokens=tokens, bos=bos)
    assert options.file is not None
    ids: NDArray[np.int32] = np.array(model.tokenize(text_of(options.file), special=False), np.int32)
    if options.ppl_stride:
        return Windows.strided(ids, size, options.ppl_stride, limit=limit)
    return Windows.halves(ids, size, limit=limit, bos=bos)


def _read(measured: Measurement, windows: Windows, options: PerplexityOptions) -> None:
    """Run the measurement, with the bar, and the lines that --ppl-output-type 1 asks for."""
    told = 0
    lines = options.ppl_output_type == 1 and options.output == "text"
    with ReadingBar("reading", windows.size, quiet=options.quiet or lines) as bar:
        for done in measured.run():
            bar.advanced(done.windows, len(windows), _found(done))
            while lines and told < done.windows:
                told += 1
                so_far = measured.running(told)
                log, error = float(np.log(so_far.value)), so_far.error / so_far.value
                begin = (told - 1) * (options.ppl_stride or windows.size)
                print(f"{begin:8d}  {so_far.value:.4f}  {log:4f}  {error:4f}", flush=True)


def _found(done: Done) -> str:
    beside = "" if done.divergence is None else f", KL divergence {done.divergence:.6f}"
    return f"perplexity {done.perplexity:.4f}{beside}"


def _print(measured: Measurement, windows: Windows, options: PerplexityOptions) -> None:
    found = measured.comparison if options.kl_divergence else None
    value = measured.perplexity
    if options.output == "json":
        settings: dict[str, Any] = {
            "model": str(options.model),
            "text": None if options.file is None else str(options.file),
            "base": str(options.base or options.kl_divergence_base) if options.kl_divergence else None,
            "window": windows.size,
            "windows": len(windows),
            "stride": options.ppl_stride or None,
        }
        figures = dataclasses.asdict(found) if found else {"perplexity": dataclasses.asdict(value)}
        print(json.dumps(settings | figures, ensure_ascii=False, indent=2))
        return
    if found is not None:
        print(described(found))
    else:
        print(f"Final estimate: PPL = {value.value:.4f} +/- {value.error:.5f}")
    if not options.kl_divergence and options.kl_divergence_base is not None and not options.quiet:
        print(f"{options.kl_divergence_base}: log-probabilities of {value.tokens} positions")
