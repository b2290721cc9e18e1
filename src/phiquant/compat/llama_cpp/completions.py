"""Completions of a prompt, whole and as streams."""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from phiquant.compat.llama_cpp.core import Core, Rows
from phiquant.compat.llama_cpp.generation import Generation, chance, sampling
from phiquant.compat.llama_cpp.llama_cache import longest_prefix
from phiquant.compat.llama_cpp.llama_grammar import LlamaGrammar
from phiquant.compat.llama_cpp.llama_types import CreateCompletionResponse
from phiquant.compat.llama_cpp.pieces import Mark, Piece, Pieces
from phiquant.compat.llama_cpp.processors import LogitsProcessor, Scores
from phiquant.compat.llama_cpp.refusals import ArgumentError
from phiquant.compat.llama_cpp.shapes import Envelope, completion_logprobs
from phiquant.engine import Sequence as Job
from phiquant.engine.logprobs import token_logprob

__all__ = ["Completions"]

Criteria = Callable[[NDArray[np.intc], Scores], bool]


@dataclass(frozen=True)
class _Order:
    """What was ordered, read and checked."""

    prompt: str | list[int]
    ids: list[int]
    limit: int
    stops: tuple[str, ...]
    logprobs: int | None
    echo: bool
    criteria: Criteria | None


class Completions(Core):
    """A `Core` that completes prompts.

    Attributes:
        model_path: of the file, which is the name of the model in results.
    """

    model_path: str

    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = [],  # noqa: B006  as in llama-cpp-python, and never changed
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Criteria | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> Any:
        """Continue a prompt: a CreateCompletionResponse, or an iterator of them with `stream`.

        Args:
            prompt: a text, in which special tokens are parsed, or token ids.
            suffix: refused: the models have no tokens for infill.
            max_tokens: generate at most this many; None or 0 for as many as the context holds.
            temperature: 0 always takes the likeliest token; below 0 chance alone decides.
            logprobs: how many alternatives to tell for every token.
            echo: put the prompt in front of the text; a stream leaves it out, as in llama-cpp-python.
            stop: texts that end the text and are not part of it.
            seed: of chance; without one it follows from the last.
            model: name of the model in the result.
            stopping_criteria: asked before every token with the tokens so far and the scores of the next.
            logits_processor: changes scores, first of all.
            logit_bias: token id -> what is added to its score.
            others: see `completion.Options`; `tfs_z` has no effect, as in llama-cpp-python.

        Raises:
            ArgumentError (a ValueError): the prompt does not fit the context, or an argument makes no sense.
            GrammarError: the grammar cannot be used.
        """
        if suffix:
            raise ArgumentError("suffix is not supported: the models have no tokens for infill; leave it out")
        ids = self._prompt_ids(prompt)
        order = _Order(
            prompt=prompt,
            ids=ids,
            limit=self._limit(max_tokens, len(ids)),
            stops=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            logprobs=logprobs,
            echo=echo,
            criteria=stopping_criteria,
        )
        self._look_up(ids)
        self._seed = random.Random(self._seed).randint(0, 2**32) if seed is None else seed
        self._suspend()
        rows = Rows()
        generation = Generation(
            self.llm.engine,
            ids,
            sampling(
                chance(self._seed),
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                typical_p=typical_p,
                temp=temperature,
                mirostat_mode=mirostat_mode,
                mirostat_tau=mirostat_tau,
                mirostat_eta=mirostat_eta,
            ),
            mask=self._mask(grammar),
            hook=self._hook(
                logits_processor,
                len(ids),
                repeat_penalty,
                frequency_penalty,
                presence_penalty,
                bias=self._bias(logit_bias),
                see=self._seeing(rows, stopping_criteria),
            ),
            drafters=self._drafters,
            limit=order.limit,
            logprobs=logprobs,
        )
        run = _Run(self, order, generation, rows, Envelope(self.model_path if model is None else model))
        return run.chunks() if stream else run.whole()

    __call__ = create_completion

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        bos = self.llm.tokenizer.bos_id
        begin = [bos] if bos is not None and self.llm.tokenizer.add_bos else []
        if isinstance(prompt, str):
            ids = begin + (self.tokenize(prompt.encode(), add_bos=False, special=True) if prompt else [])
        else:
            ids = [int(token) for token in prompt]
        ids = ids or ([] if bos is None else [bos])
        if not ids:
            raise ArgumentError("the prompt is empty, and the model has no token that begins a text; give a token")
        if bos is not None and ids[:2] == [bos, bos]:
            warnings.warn(
                "the prompt begins with two tokens that begin a text; leave the one that is written out",
                RuntimeWarning,
                stacklevel=3,
            )
        if len(ids) >= self.llm.context:
            raise ArgumentError(f"a prompt of {len(ids)} tokens does not fit the context of {self.llm.context} tokens")
        return ids

    def _limit(self, most: int | None, prompt: int) -> int:
        room = self.llm.context - prompt
        return room if most is None or most <= 0 else min(most, room)

    def _bias(self, given: Mapping[int, float] | None) -> dict[int, float]:
        bias = {int(token): float(value) for token, value in (given or {}).items()}
        for token in bias:
            if not 0 <= token < self.llm.config.vocab_size:
                raise ArgumentError(f"logit_bias names the token {token}; there are {self.llm.config.vocab_size}")
        return bias

    def _look_up(self, ids: list[int]) -> None:
        """Take up a state of the cache that has more of the prompt than this one."""
        if self.cache is not None:
            try:
                state = self.cache[ids]
            except KeyError:
                return
            if longest_prefix(state.ids, ids) > longest_prefix(self._evaluated(), ids):
                self.load_state(state)

    def _prompt_marks(self, ids: list[int], most: int) -> list[Mark]:
        """The tokens of a prompt with their log-probabilities; the first has none, and that which begins is no text."""
        first = int(ids[0] == self.llm.tokenizer.bos_id)
        found = []

        def sink(position: int, rows: Scores) -> None:
            for at, row in enumerate(rows, position + 1):
                if first < at < len(ids):
                    found.append(token_logprob(row, ids[at], most))

        if len(ids) > first + 1:
            self._work(Job(ids, None, first=first, sink=sink))
        marks, offset = [], 0
        for token, figures in zip(ids[first:], [None, *found], strict=False):
            marks.append(Mark(token, offset, figures))
            offset += len(self._text_of(token))
        return marks

    def _text_of(self, token: int, before: list[int] | None = None) -> str:
        return self.detokenize([token], prev_tokens=before).decode("utf-8", errors="ignore")


class _Run:
    """One completion."""

    def __init__(self, llama: Completions, order: _Order, generation: Generation, rows: Rows, envelope: Envelope):
        self._llama, self._order, self._generation, self._rows = llama, order, generation, rows
        self._envelope = envelope
        self._pieces = Pieces(order.stops)
        self._finish: Literal["stop", "length"] = "length"

    def whole(self) -> CreateCompletionResponse:
        """All of it."""
        order = self._order
        text = "".join([piece.text for piece in self._text()])
        marks, base = self._pieces.marks, len(order.prompt)
        logprobs = None
        if order.echo:
            written = order.prompt if isinstance(order.prompt, str) else self._written(order.prompt)
            text = written + text
        if order.logprobs is not None:
            if order.echo:
                before = self._llama._prompt_marks(order.ids, order.logprobs)
                end = before[-1].offset + len(self._llama._text_of(before[-1].token)) if before else 0
                marks = before + [Mark(mark.token, mark.offset + end, mark.found) for mark in marks]
                base = 0
            logprobs = completion_logprobs(marks, base, self._llama._text_of)
        return self._envelope.whole(text, logprobs, self._finish, len(order.ids), len(self._pieces.marks))

    def chunks(self) -> Iterator[CreateCompletionResponse]:
        """A chunk for every piece, and one that says why it ended."""
        base = len(self._order.prompt)
        for piece in self._text():
            told = self._order.logprobs is not None
            logprobs = completion_logprobs(piece.marks, base, self._llama._text_of) if told else None
            yield self._envelope.chunk(piece.text, logprobs)
        yield self._envelope.chunk("", finish=self._finish)

    def _text(self) -> Iterator[Piece]:
        """Generate; afterwards `_finish` says why it ended."""
        llama, generation = self._llama, self._generation
        llama._live.add(generation)
        try:
            if llama._logits_all:
                llama._compute_rows(self._order.ids)
            while (token := generation.take()) is not None:
                computed = len(generation.ids) - 1
                llama._commit(generation.ids, computed)
                if self._criteria_met(computed) or token in llama.llm.tokenizer.eog_ids:
                    self._finish = "stop"
                    break
                data = llama.detokenize([token], prev_tokens=generation.ids[:computed])
                yield from self._pieces.push(token, data, generation.found)
                if self._pieces.stopped:
                    self._finish = "stop"
                    break
        finally:
            llama._live.discard(generation)
            generation.suspend()
        yield from self._pieces.finish()
        if llama.cache is not None:
            key = self._order.ids + [mark.token for mark in self._pieces.marks]
            llama.cache[key] = llama._state_of(generation.ids[:-1])

    def _criteria_met(self, computed: int) -> bool:
        criteria = self._order.criteria
        if criteria is None:
            return False
        return bool(criteria(np.array(self._generation.ids[:computed], np.intc), self._rows.pop(computed - 1)))

    def _written(self, ids: list[int]) -> str:
        return self._llama.detokenize(ids).decode("utf-8", errors="ignore")
