"""Sequences, paged key-value cache, continuous batching, sampling. Token ids and masks come in; text stays outside."""

from phiquant.engine.draft import Drafter, PromptLookup
from phiquant.engine.engine import Engine
from phiquant.engine.model_draft import ModelDraft
from phiquant.engine.sampler import Sampling, TokenMask, sample
from phiquant.engine.sequence import Finish, Sequence

__all__ = ["Drafter", "Engine", "Finish", "ModelDraft", "PromptLookup", "Sampling", "Sequence", "TokenMask", "sample"]
