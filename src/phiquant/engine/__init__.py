"""Sequences, paged key-value cache, continuous batching, sampling. Token ids and masks come in; text stays outside."""

from phiquant.engine.engine import Engine
from phiquant.engine.sampler import Sampling, TokenMask, sample
from phiquant.engine.sequence import Finish, Sequence

__all__ = ["Engine", "Finish", "Sampling", "Sequence", "TokenMask", "sample"]
