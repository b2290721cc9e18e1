"""What a `Llama` is underneath: a model, the tokens that it has computed, and steps that a script takes itself."""

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from phiquant.compat.llama_cpp.generation import Generation, penalties
from phiquant.compat.llama_cpp.llama_cache import BaseLlamaCache, longest_prefix
from phiquant.compat.llama_cpp.llama_grammar import LlamaGrammar
from phiquant.compat.llama_cpp.llama_speculative import Drafts, LlamaDraftModel
from phiquant.compat.llama_cpp.llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer
from phiquant.compat.llama_cpp.processors import Hook, LogitsProcessor, Scores, StoppingCriteria
from phiquant.compat.llama_cpp.refusals import ArgumentError, StateError
from phiquant.compat.llama_cpp.state import LlamaState
from phiquant.engine import Drafter, TokenMask
from phiquant.engine import Sequence as Job
from phiquant.errors import CacheError, RequestError
from phiquant.llm import LLM
from phiquant.text.grammar import Constraints

__all__ = ["Core", "Rows"]


class Rows:
    """Rows that a criterion is going to look at, by position; there may be some of guesses, ahead of the text."""

    def __init__(self) -> None:
        self._rows: dict[int, Scores] = {}

    def see(self, position: int, row: Scores) -> None:
        """Keep one."""
        self._rows[position] = row.copy()

    def pop(self, position: int) -> Scores:
        """Give one up."""
        return self._rows.pop(position)


class Core:
    """Tokens, state, and generating token by token.

    The state is the tokens that count as computed. Their keys and values are in the engine's cache, which finds them
    again by the tokens; what it had to give up is computed again, and nobody notices.

    Attributes:
        llm: the model.
        n_batch: most tokens of a step, and of a text that is embedded.
        cache: states of earlier prompts; None for none.
        last_n_tokens_size: how many tokens penalties look at.
        draft_model: guesses tokens; None for the engine's own guesses.
        tokenizer_: between texts and tokens.
        has_own_tokenizer: whether a script brought it.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        batch: int,
        seed: int,
        logits_all: bool,
        last_n_tokens_size: int,
        tokenizer: BaseLlamaTokenizer | None,
        draft_model: LlamaDraftModel | None,
    ) -> None:
        self.llm = llm
        self.n_batch = batch
        self.cache: BaseLlamaCache | None = None
        self.last_n_tokens_size = last_n_tokens_size
        self.draft_model = draft_model
        self.has_own_tokenizer = tokenizer is not None
        self.tokenizer_ = LlamaTokenizer(llm.tokenizer) if tokenizer is None else tokenizer
        self._seed, self._logits_all = seed, logits_all
        self._tokens: list[int] = []
        self._computed = 0
        self._rows: Scores | None = None  # of all tokens, with logits_all
        self._last: tuple[list[int], Scores] | None = None  # the last row, and the tokens that it comes after
        self._constraints = Constraints(llm.tokenizer)
        self._live = WeakSet[Generation]()

    # Tokens.

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of a text in UTF-8. Raises ArgumentError (a ValueError) for what is none."""
        return self.tokenizer_.tokenize(text, add_bos, special)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Bytes of ids; `special` writes special tokens. Raises TokenError."""
        return self.tokenizer_.detokenize(tokens, prev_tokens=prev_tokens, special=special)

    # The state.

    @property
    def n_tokens(self) -> int:
        """Tokens that count as computed; set it to a lower number to go back."""
        return self._computed

    @n_tokens.setter
    def n_tokens(self, count: int) -> None:
        if not 0 <= count <= len(self._tokens):
            raise ArgumentError(
                f"n_tokens is {count} and must be from 0 to {len(self._tokens)}, the tokens that there are"
            )
        self._computed = count

    @property
    def input_ids(self) -> NDArray[np.intc]:
        """The tokens, int32 [context]; behind those that count there are zeros."""
        ids = np.zeros(self.llm.context, np.intc)
        ids[: self._computed] = self._evaluated()
        return ids

    @property
    def _input_ids(self) -> NDArray[np.intc]:
        return np.array(self._evaluated(), np.intc)

    @property
    def eval_tokens(self) -> deque[int]:
        """The tokens."""
        return deque(self._evaluated(), maxlen=self.llm.context)

    @property
    def scores(self) -> Scores:
        """Logits after each token, float32 [context, vocabulary]. Raises StateError without `logits_all`."""
        if not self._logits_all:
            raise StateError("scores of all tokens are kept by a model with logits_all=True; load it so")
        if self._rows is None:
            self._rows = np.zeros((self.llm.context, self.llm.config.vocab_size), np.single)
        return self._rows

    @property
    def _scores(self) -> Scores:
        return self.scores[: self._computed]

    @property
    def eval_logits(self) -> deque[list[float]]:
        """Logits after each token with `logits_all`, otherwise after the last."""
        if self._logits_all:
            return deque(self._scores.tolist(), maxlen=self.llm.context)
        rows = [self._row(self._computed - 1).tolist()] if self._computed else []
        return deque(rows, maxlen=1)

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Look prompts up there, and keep what is computed of them; None to stop that."""
        self.cache = cache

    def set_seed(self, seed: int) -> None:
        """Of chance."""
        self._seed = seed

    def reset(self) -> None:
        """Begin again, without a token."""
        self._tokens, self._computed, self._last = [], 0, None

    def save_state(self) -> LlamaState:
        """Tokens, and keys and values of whole pages of them."""
        return self._state_of(self._evaluated())

    def load_state(self, state: LlamaState) -> None:
        """Go on from a state that `save_state` gave.

        Raises:
            ArgumentError (a ValueError): it is no such thing, or longer than the context.
            CacheError: what is computed in it was made by another model, type of cache or version, or is damaged.
        """
        if not isinstance(state, LlamaState):
            raise ArgumentError(
                f"a state is a LlamaState, not {type(state).__name__}; LlamaState.from_bytes reads a saved one"
            )
        ids = state.ids
        if ids:
            self.llm.engine.check(Job(ids, None))
        if self._logits_all and len(state.scores) != len(ids):
            raise ArgumentError("the state was saved without logits_all, and this model has it")
        if state.llama_state:
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "state"
                path.write_bytes(state.llama_state)
                if self.llm.load_cache(path) != ids:
                    raise CacheError("the state is damaged: its keys and values are of other tokens")
        if self._logits_all:
            self.scores[: len(ids)] = state.scores
        self._tokens, self._computed, self._last, self._seed = ids, len(ids), None, state.seed

    # Steps.

    def eval(self, tokens: Sequence[int]) -> None:
        """Compute tokens after those of the state. Raises TokenError, ContextError."""
        ids = [*self._evaluated(), *map(int, tokens)]
        if len(ids) > self._computed:
            self._suspend()
            self._compute(ids, self._computed if self._logits_all else len(ids) - 1)
            self._commit(ids, len(ids))

    # For the other parts of a Llama.

    def _evaluated(self) -> list[int]:
        return self._tokens[: self._computed]

    def _commit(self, ids: list[int], computed: int) -> None:
        """The state; `ids` may still grow."""
        self._tokens, self._computed = ids, computed

    def _state_of(self, ids: list[int]) -> LlamaState:
        kept = b""
        if ids:
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "state"
                try:
                    self.llm.save_cache(path, ids)
                    kept = path.read_bytes()
                except RequestError:  # there is no whole page; that little is soon computed again
                    kept = b""
        padded = np.zeros(self.llm.context, np.intc)
        padded[: len(ids)] = ids
        rows = len(ids) if self._logits_all else 0
        scores = self.scores[:rows].copy() if rows else np.empty((0, self.llm.config.vocab_size), np.single)
        return LlamaState(padded, scores, len(ids), kept, len(kept), self._seed)

    def _suspend(self) -> None:
        """Texts that somebody has begun and may never go on with shall not be computed ahead."""
        for generation in list(self._live):
            generation.suspend()

    def _mask(self, grammar: LlamaGrammar | None) -> TokenMask | None:
        if grammar is None:
            return None
        if not isinstance(grammar, LlamaGrammar):
            raise ArgumentError(f"grammar is of type {type(grammar).__name__} and must be a LlamaGrammar")
        return self._constraints.constraint(grammar.grammar)

    def _hook(
        self,
        processors: Sequence[LogitsProcessor] | None,
        prompt: int,
        repeat: float,
        frequency: float,
        presence: float,
        bias: dict[int, float] | None = None,
        see: Callable[[int, Scores], None] | None = None,
    ) -> Hook:
        chosen = penalties(self.last_n_tokens_size, repeat=repeat, frequency=frequency, presence=presence)
        return Hook(list(processors or ()), bias or {}, chosen, prompt, see)

    def _seeing(self, rows: Rows, criteria: StoppingCriteria | None) -> Callable[[int, Scores], None] | None:
        """Who is told of the rows of a text: criteria need them for a moment, `scores` for longer."""
        if self._logits_all:
            scores = self.scores

            def keep(position: int, row: Scores) -> None:
                scores[position] = row
                if criteria is not None:
                    rows.see(position, row)

            return keep
        return None if criteria is None else rows.see

    def _drafters(self) -> Iterable[Drafter]:
        if self.draft_model is not None:
            return [Drafts(self.draft_model, self.llm.config.vocab_size)]
        return self.llm.drafters()

    def _row(self, position: int) -> Scores:
        """Logits after the token at a position."""
        if self._logits_all:
            scores: Scores = self.scores[position]
            return scores
        ids = self._tokens[: position + 1]
        if self._last is None or self._last[0] != ids:
            self._compute(ids, position)
        assert self._last is not None
        return self._last[1]

    def _compute(self, ids: list[int], first: int) -> None:
        """Rows of `ids` from `first` on; whatever the cache has of what comes before is not computed again."""

        def sink(position: int, rows: Scores) -> None:
            if self._logits_all:
                self.scores[position : position + len(rows)] = rows
            elif position + len(rows) == len(ids):
                self._last = ids, rows[-1].copy()

        self._work(Job(ids, None, first=first, sink=sink))

    def _compute_rows(self, ids: list[int]) -> None:
        """Rows of all `ids`: those of the tokens that the state begins with are there."""
        self._compute(ids, min(longest_prefix(self._evaluated(), ids), len(ids) - 1))

    def _work(self, job: Job) -> None:
        engine = self.llm.engine
        engine.submit(job)
        try:
            engine.advance(job, len(job.ids))
        finally:
            engine.cancel(job)
