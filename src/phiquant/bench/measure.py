"""Speeds of one model.

As in llama-bench: "pp" is the time of a prompt of random tokens, "tg" the time of generating so many tokens one by one,
either behind `depth` tokens that are computed before and not timed; a first run is not counted. Where generated tokens
cross the border of LongRoPE, the engine computes all before them again with other factors, and that is timed: it is
what generating them costs. A prompt that ends beyond the border finds what is before it computed as it needs it.
"""

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np

from phiquant.errors import RequestError
from phiquant.llm import LLM, PAGE_TOKENS

__all__ = ["Bench", "Job", "grouped", "jobs"]

_SEED: Final = 20260


@dataclass(frozen=True)
class Setting:
    """What a model is loaded with."""

    model: str
    threads: int
    batch: int
    cache_type: str
    bf16_dot: bool = False


@dataclass(frozen=True)
class Job:
    """One line of the result: a prompt of so many tokens, so many generated, or both, behind `depth` tokens."""

    setting: Setting
    prompt: int
    generated: int
    depth: int
    context: int = 0

    @property
    def name(self) -> str:
        """As llama-bench has it: pp512, tg128, pp512+tg128; "@ d4096" behind 4096 tokens."""
        parts = [f"pp{self.prompt}"] * (self.prompt > 0) + [f"tg{self.generated}"] * (self.generated > 0)
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.prompt + self.generated

    @property
    def room(self) -> int:
        """Tokens that must fit the context."""
        return max(self.depth + self.tokens + 2, self.context)


def jobs(
    models: Iterable[str | os.PathLike[str]],
    *,
    prompts: Iterable[int] = (512,),
    generated: Iterable[int] = (128,),
    both: Iterable[tuple[int, int]] = (),
    depths: Iterable[int] = (0,),
    batches: Iterable[int] = (512,),
    threads: Iterable[int] = (0,),
    cache_types: Iterable[str] = ("f16",),
    context: int = 0,
    bf16_dot: bool = False,
) -> list[Job]:
    """Every combination, those that share a loaded model together; 0 tokens leave a test out.

    Raises RequestError if there is nothing to measure.
    """
    tests = [(p, 0) for p in prompts if p] + [(0, n) for n in generated if n] + [(p, n) for p, n in both if p or n]
    settings = [
        Setting(os.fspath(model), count, batch, kind, bf16_dot)
        for model, count, batch, kind in itertools.product(models, threads, batches, cache_types)
    ]
    found = [
        Job(setting, prompt, count, depth, context)
        for setting, depth, (prompt, count) in itertools.product(settings, depths, tests)
    ]
    if not found:
        raise RequestError("there is nothing to measure; give a prompt (-p) or tokens to generate (-n)")
    return found


class Bench:
    """A model, loaded for jobs of one setting; use it with `with`, or close it."""

    def __init__(self, setting: Setting, room: int) -> None:
        """`room`: tokens that the context must hold. Raises what `LLM.load` raises."""
        self.setting = setting
        self.llm = LLM.load(
            setting.model,
            context=room,
            threads=setting.threads,
            batch=setting.batch,
            cache_type=setting.cache_type,
            bf16_dot=setting.bf16_dot,
            speculate=False,  # all tests are to cost what they cost on any text
        )
        if self.llm.context < room:
            available = self.llm.context
            self.close()
            raise RequestError(
                f"{setting.model} has a context of {available} tokens, and a test takes {room}; measure fewer"
            )
        self._rng = np.random.default_rng(_SEED)

    @property
    def size(self) -> int:
        """Bytes of the model's tensors."""
        return self.llm.weight_bytes

    @property
    def parameters(self) -> int:
        """Weights of the model."""
        return self.llm.parameter_count

    def seconds(self, job: Job) -> float:
        """Run a job once."""
        before, computed = self._random(job.depth), 0
        if before:
            # What is timed must find its beginning computed, and beyond the border of LongRoPE all of it is another.
            border = self.llm.config.rotary.original_context_length
            beyond = job.prompt or 1
            more = beyond if len(before) <= border < len(before) + beyond else 0
            self.llm.generate([*before, *self._random(more)], max_tokens=1, temperature=0, ignore_eos=True)
            computed = len(before) // PAGE_TOKENS * PAGE_TOKENS if more else len(before)
        took = 0.0
        if job.prompt:
            # The first token comes with the prompt's last logits; generating starts behind it.
            before = [*before, *self._random(job.prompt)]
            took += self._timed(before, computed, 1)
            computed = len(before)
        if job.generated:
            took += self._timed([*before, *self._random(1)], computed, job.generated)
        return took

    def close(self) -> None:
        """Free the model."""
        self.llm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _timed(self, ids: list[int], known: int, count: int) -> float:
        """Seconds of generating behind `ids`, of which the first `known` were computed before."""
        begin = time.perf_counter()
        done = self.llm.generate(ids, max_tokens=count, temperature=0, ignore_eos=True)
        took = time.perf_counter() - begin
        assert done.usage.completion_tokens == count
        assert done.usage.cached_tokens >= known - 1
        return took

    def _random(self, count: int) -> list[int]:
        ids: list[int] = self._rng.integers(0, self.llm.config.vocab_size, count).tolist()
        return ids


def grouped(every: Iterable[Job]) -> Iterator[tuple[Setting, list[Job]]]:
    """Jobs by what they need loaded."""
    for setting, some in itertools.groupby(every, lambda job: job.setting):
        yield setting, list(some)
