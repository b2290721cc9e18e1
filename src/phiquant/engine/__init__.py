"""Sequences, paged key-value cache, continuous batching, sampling. Token ids and masks come in; text stays outside."""

from phiquant.engine.draft import Drafter, PromptLookup
from phiquant.engine.engine import Engine
from phiquant.engine.logprobs import TokenLogprob
from phiquant.engine.model_draft import ModelDraft
from phiquant.engine.sampler import Sampler, TokenMask, sample
from phiquant.engine.sampling import CHAIN, Breaker, Sampling, parse_chain
from phiquant.engine.sequence import Finish, Sequence
from phiquant.engine.stats import Stats

__all__ = [
    "CHAIN",
    "Breaker",
    "Drafter",
    "Engine",
    "Finish",
    "ModelDraft",
    "PromptLookup",
    "Sampler",
    "Sampling",
    "Sequence",
    "Stats",
    "TokenLogprob",
    "TokenMask",
    "parse_chain",
    "sample",
]
