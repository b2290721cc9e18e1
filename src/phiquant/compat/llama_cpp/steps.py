"""Choosing tokens one by one, as a script asks for them."""

from collections.abc import Callable, Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from phiquant.compat.llama_cpp.core import Core, Rows
from phiquant.compat.llama_cpp.generation import Generation, chance, sampling
from phiquant.compat.llama_cpp.llama_grammar import LlamaGrammar
from phiquant.compat.llama_cpp.processors import LogitsProcessor, Scores
from phiquant.compat.llama_cpp.refusals import ArgumentError
from phiquant.engine import Sampler

__all__ = ["Steps"]


class Steps(Core):
    """A `Core` that samples and generates."""

    def sample(
        self,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_eta: float = 0.1,
        mirostat_tau: float = 5.0,
        penalize_nl: bool = True,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        grammar: LlamaGrammar | None = None,
        idx: int | None = None,
    ) -> int:
        """Choose the token that follows the state, or its token `idx`; the state stays.

        Of repetitions it knows nothing, since nothing was generated yet, and a grammar is at its beginning. `tfs_z` and
        `penalize_nl` have no effect, as in llama-cpp-python.
        """
        at = self._computed - 1 if idx is None else idx
        if not 0 <= at < self._computed:
            raise ArgumentError(f"there are scores of {self._computed} tokens, and none of token {at}; call eval first")
        chosen = sampling(
            chance(self._seed),
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            temp=temp,
            mirostat_mode=mirostat_mode,
            mirostat_tau=mirostat_tau,
            mirostat_eta=mirostat_eta,
        )
        ids, mask = self._tokens[: at + 1], self._mask(grammar)
        hook = self._hook(logits_processor, len(ids), repeat_penalty, frequency_penalty, presence_penalty)
        unused = self.llm.tokenizer.unused_ids
        return Sampler(chosen).choose(
            hook(ids, self._row(at)),
            ids,
            unused=unused[unused < self.llm.config.vocab_size],
            allowed=None if mask is None else mask.allowed(),
        )

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Callable[[NDArray[np.intc], Scores], bool] | None = None,
        grammar: LlamaGrammar | None = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Tokens after a prompt, until the context is full or a criterion ends it; a token that ends the text does not.

        Args:
            tokens: the prompt.
            reset: begin with it; False puts it after the state.
            others: as `sample`, but for repetitions: what was generated counts.

        Tokens that are sent to the generator come after the one that it gave, and are not given out.
        """
        ids = [*([] if reset else self._evaluated()), *map(int, tokens)]
        self._suspend()
        if self._logits_all and ids:
            self._compute_rows(ids)
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
                temp=temp,
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
                see=self._seeing(rows, stopping_criteria),
            ),
            stepwise=True,
        )
        self._commit(generation.ids, len(ids))
        while (token := generation.take()) is not None:
            computed = len(generation.ids) - 1
            self._commit(generation.ids, computed)
            if stopping_criteria is not None and stopping_criteria(self._input_ids, rows.pop(computed - 1)):
                return
            sent = yield token
            if sent is not None:
                generation.put(sent)
