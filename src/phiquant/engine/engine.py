"""The engine: sequences in, tokens out.

There is no thread of its own. Whoever waits for a sequence drives the step that all running sequences share, so that
one caller pays for no hand-over and several callers are batched (`advance`).
"""

import threading
import time

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.cache import PageCache
from phiquant.engine.draft import LONGEST, Pace
from phiquant.engine.logprobs import token_logprob
from phiquant.engine.runner import Runner
from phiquant.engine.sampler import Sampler
from phiquant.engine.scheduler import Chunk, Scheduler
from phiquant.engine.sequence import Sequence
from phiquant.errors import ContextError, PhiquantError, RequestError, TokenError
from phiquant.kernels.ops import Executable
from phiquant.model import Rope

__all__ = ["Engine"]


class Engine:
    """Computes sequences of one model on one Executable; safe to use from several threads.

    Args:
        executable: the model, bound to a processor; its pages must hold at least one whole context.
        rope: rotations of the model.
        context: most tokens of a sequence, prompt included.
        unused: ids that are never sampled, int64 [count].
    """

    def __init__(self, executable: Executable, rope: Rope, context: int, unused: NDArray[np.int64]) -> None:
        capacity = executable.capacity
        room = capacity.page_tokens * min(capacity.pages, capacity.pages_per_sequence)
        if room < context or capacity.outputs < capacity.sequences:
            raise ContextError(f"a context of {context} tokens does not fit {capacity}")
        self.context = context
        self._executable, self._unused = executable, unused
        self._cache = PageCache(capacity.pages, capacity.page_tokens, executable.copy_page)
        self._scheduler = Scheduler(capacity, self._cache, rope)
        self._runner = Runner(executable, rope)
        self._rope, self._pace = rope, Pace()
        self._lock = threading.Lock()

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._executable.threads

    @property
    def parallel(self) -> int:
        """Most sequences of a step."""
        return self._executable.capacity.sequences

    def check(self, sequence: Sequence) -> None:
        """Refuse, before any work, a sequence that cannot be computed: TokenError, ContextError."""
        vocabulary = self._executable.program.vocab_size
        bad = next((i for i in sequence.ids if not 0 <= i < vocabulary), None)
        if bad is not None:
            raise TokenError(f"token id {bad} is outside the vocabulary of {vocabulary}")
        room = self.context if sequence.wants_all_logits else self.context - 1
        if len(sequence.ids) > room:
            raise ContextError(
                f"a prompt of {len(sequence.ids)} tokens does not fit the context of {self.context}; "
                "shorten it, or load the model with a larger context"
            )

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; TokenError or ContextError as `check`."""
        self.check(sequence)
        if sequence.wants_all_logits and sequence.sink is None:
            sequence.logits = np.empty((len(sequence.ids), self._executable.program.vocab_size), np.float32)
        with self._lock:
            self._scheduler.add(sequence)

    def advance(self, sequence: Sequence, seen: int) -> None:
        """Work until the sequence has more than `seen` tokens or has ended. Raises what went wrong with it."""
        while sequence.finish is None and sequence.error is None and len(sequence.ids) <= seen:
            with self._lock:
                if sequence.finish is None and sequence.error is None and len(sequence.ids) <= seen:
                    self._step()
        if sequence.error is not None:
            raise sequence.error

    def step(self, sequence: Sequence) -> None:
        """One step, unless the sequence has ended. Raises what went wrong with it."""
        with self._lock:
            if sequence.finish is None and sequence.error is None:
                self._step()
        if sequence.error is not None:
            raise sequence.error

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state; one that has ended stays as it ended."""
        with self._lock:
            self._scheduler.remove(sequence)
            if sequence.finish is None:
                sequence.finish = "cancelled"

    def close(self) -> None:
        """End the running step and free the processor's memory and threads."""
        self._executable.cancel()
        with self._lock:
            for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
                sequence.error = RequestError("the model was closed while it worked")
                self._scheduler.remove(sequence)
            self._executable.close()

    def _step(self) -> None:
        """Every sequence is consistent if this is interrupted anywhere: what is not recorded is computed again."""
        self._speculate()
        chunks = self._scheduler.plan()
        if not chunks:
            raise RequestError("the engine was asked to go on with a sequence that it does not know")
        begin = time.perf_counter()
        results = self._runner.run(chunks)
        if len(chunks) == 1 and chunks[0].sequence.generated:
            self._pace.timed(chunks[0].stop - chunks[0].start, time.perf_counter() - begin)
        for chunk, logits in zip(chunks, results, strict=True):
            try:
                self._take(chunk, logits)
            except PhiquantError as error:
                chunk.sequence.error = error
            self._scheduler.computed(chunk)
            if chunk.sequence.finish is not None or chunk.sequence.error is not None:
                self._scheduler.remove(chunk.sequence)

    def _speculate(self) -> None:
        """Let a sequence that has the step to itself guess what comes."""
        if len(self._scheduler.running) != 1 or self._scheduler.waiting:
            return
        (sequence,) = self._scheduler.running
        sequence.draft = ()
        if not sequence.drafters or sequence.pending != 1 or not sequence.generated:
            return
        length, capacity = len(sequence.ids), self._executable.capacity
        most = min(LONGEST, self.context - 1 - length, capacity.tokens - 1, capacity.outputs - 1)
        if sequence.max_tokens is not None:
            most = min(most, sequence.max_tokens - len(sequence.generated) - 1)
        while most > 0 and self._rope.regime(length + most) is not self._rope.regime(length):
            most -= 1  # beyond the border all keys are others
        for drafter, odds in sequence.drafters:
            count = self._pace.guesses(odds.chance, drafter.seconds, most)
            if count == 0:
                odds.idled()
                continue
            sequence.draft = tuple(drafter.draft(sequence.ids, count))
            if sequence.draft:
                sequence.odds = odds
                return

    def _take(self, chunk: Chunk, logits: NDArray[np.float32]) -> None:
        """Keep the logits, or sample the next token of the sequence, and more as long as they were guessed."""
        sequence, sampler = chunk.sequence, chunk.sequence.sampler
        if sampler is None:
            if sequence.sink is not None:
                if len(logits):
                    sequence.sink(chunk.outputs.start, logits)
            elif sequence.logits is not None:
                sequence.logits[chunk.outputs.start : chunk.stop] = logits
            if chunk.stop == len(sequence.ids):
                sequence.finish = "stop"
            return
        right = 0
        for row in logits:
            token = self._next(sequence, sampler, row)
            if sequence.finish is not None or right == len(chunk.draft) or token != chunk.draft[right]:
                break
            right += 1
        if chunk.draft and sequence.odds is not None:
            sequence.odds.drafted(len(chunk.draft), right)
            sequence.drafted += len(chunk.draft)
            sequence.accepted += right

    def _next(self, sequence: Sequence, sampler: Sampler, logits: NDArray[np.float32]) -> int:
        """Append the next token, and see whether it is the last."""
        allowed = None if sequence.mask is None else sequence.mask.allowed()
        banned = None
        if len(sequence.generated) < sampler.sampling.min_tokens:
            banned = np.array(sorted(sequence.end_ids), np.int64)
        token = sampler.choose(logits, sequence.ids, unused=self._unused, allowed=allowed, banned=banned)
        if sequence.logprobs is not None:
            sequence.found.append(token_logprob(logits, token, sequence.logprobs))
        if sequence.mask is not None:
            sequence.mask.accept(token)
        sequence.ids.append(token)
        if token in sequence.end_ids:
            sequence.finish = "stop"
        elif len(sequence.generated) == sequence.max_tokens or len(sequence.ids) >= self.context:
            sequence.finish = "length"
        return token
