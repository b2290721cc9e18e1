"""`phiquant bench`: speeds of models, beside the machine's limits and, in turns, llama-bench."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..bench import Bench, Job, Peer, Result, grouped, jobs, render
from ..errors import RequestError
from ..kernels.cpu.limits import Limits
from .failures import WrongUsage
from .notices import Notices

__all__ = ["BenchOptions", "bench"]

FORMS = ("md", "json", "jsonl", "csv")


@dataclass(frozen=True)
class BenchOptions:
    """The options of `phiquant bench`, as they were given; `commands.bench` says what they mean."""

    models: Sequence[Path]
    n_prompt: Sequence[str] = ()
    n_gen: Sequence[str] = ()
    pg: Sequence[str] = ()
    n_depth: Sequence[str] = ()
    batch_size: Sequence[str] = ()
    threads: Sequence[str] = ()
    kv_type: Sequence[str] = ()
    bf16_dot: bool = False
    ctx_size: int = 0
    repetitions: int = 5
    output: str = "md"
    against: str | None = None
    limits: bool = True
    quiet: bool = False


def bench(options: BenchOptions) -> int:
    """Measures, and prints the results to stdout; returns the exit status."""
    if options.output not in FORMS:
        raise WrongUsage(f"--output takes {', '.join(FORMS)}, not {options.output!r}")
    every = jobs(
        options.models,
        prompts=_numbers("--n-prompt", options.n_prompt, [512]),
        generated=_numbers("--n-gen", options.n_gen, [128]),
        both=[_pair(text) for text in options.pg],
        depths=_numbers("--n-depth", options.n_depth, [0]),
        batches=_numbers("--batch-size", options.batch_size, [512], least=1),
        threads=_numbers("--threads", options.threads, [0]),
        cache_types=[kind for text in options.kv_type for kind in text.split(",")] or ["f16"],
        context=options.ctx_size,
        bf16_dot=options.bf16_dot,
    )
    peer = _peer(options.against)
    notices = Notices(quiet=options.quiet)
    results: list[Result] = []
    done, total = 0, len(every) * (options.repetitions + 1)
    for setting, some in grouped(every):
        notices.progress(f"loading {setting.model}")
        with ExitStack() as stack:
            model = stack.enter_context(Bench(setting, max(job.room for job in some)))
            limits = stack.enter_context(Limits(model.llm.threads)) if options.limits else None
            for job in some:
                result = Result(
                    job, model.llm.config.name, model.size, model.parameters, model.llm.backend, model.llm.threads
                )
                for turn in range(options.repetitions + 1):
                    notices.progress(f"{done} of {total}: {job.name} of {Path(setting.model).name}")
                    _turn(model, job, result, peer, limits, counted=turn > 0)
                    done += 1
                results.append(result)
    notices.clear()
    sys.stdout.write(render(results, options.output))
    if peer is not None and options.output == "md":
        print(f"\nllama-bench: {peer.version}; each of its runs in turn with one of ours; ratio: median of neighbours")
    return 0


def _turn(model: Bench, job: Job, result: Result, peer: Peer | None, limits: Limits | None, *, counted: bool) -> None:
    """Ours, the peer and the limits once; what comes first warms up."""
    speed = job.tokens / model.seconds(job)
    if not counted:
        return
    result.speeds.append(speed)
    if peer is not None:
        result.peer.append(peer.speed(job, result.threads))
    if limits is not None:
        result.products.append(limits.dot_products())
        result.bandwidth.append(limits.read_bandwidth())


def _numbers(option: str, given: Sequence[str], usual: list[int], least: int = 0) -> list[int]:
    """Numbers with commas between, from one option or several."""
    found = []
    for text in given:
        for part in text.split(","):
            if not part.strip().isdecimal() or int(part) < least:
                raise WrongUsage(f"{option} takes numbers of at least {least}, with commas between, not {part!r}")
            found.append(int(part))
    return found or usual


def _pair(text: str) -> tuple[int, int]:
    prompt, comma, generated = text.partition(",")
    if not (comma and prompt.isdecimal() and generated.isdecimal()):
        raise WrongUsage(f"-pg takes two numbers, PROMPT,GENERATED, not {text!r}")
    return int(prompt), int(generated)


def _peer(against: str | None) -> Peer | None:
    if against is None:
        return None
    name, equals, path = against.partition("=")
    if name != "llama-bench" or not equals or not path:
        raise RequestError(f"--against takes llama-bench=PATH, not {against!r}")
    return Peer(path)
