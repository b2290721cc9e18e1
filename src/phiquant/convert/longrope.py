"""LongRoPE in config.json: two lists of factors and what multiplies cosine and sine."""

import math

import numpy as np

from phiquant.arch import names
from phiquant.convert.fields import Fields, short
from phiquant.errors import CheckpointError, UnsupportedError

__all__ = ["factor_tensors", "long_rope"]

Factors = tuple[float, ...] | None


def long_rope(rope: Fields, pairs: int, context: int, original: int) -> tuple[Factors, Factors, float | None]:
    """The two factor lists and the attention factor, as transformers reads them; None thrice without LongRoPE.

    "su" (the first release) and "yarn" are older names of "longrope" in the releases of Phi-3. The attention factor is
    sqrt(1 + ln(s) / ln(original)), s = context / original, unless given.
    """
    if rope.kind in (None, "default"):
        return None, None, None
    if rope.kind not in ("longrope", "su", "yarn"):
        raise UnsupportedError(
            f"config.json: rope type {short(rope.kind)} is not supported here; known are default, longrope, su, yarn."
        )
    long_, short_ = rope.factors("long_factor", pairs), rope.factors("short_factor", pairs)
    if "attention_factor" in rope.values and rope.values["attention_factor"] is not None:
        return long_, short_, rope.number("attention_factor", 1.0)
    scale = context / original
    if rope.values.get("factor") is not None:
        scale = rope.number("factor", 1.0)
    if scale <= 1.0:
        return long_, short_, 1.0
    if original < 2:
        raise CheckpointError(f"config.json: original_max_position_embeddings {original} is too small for LongRoPE.")
    return long_, short_, math.sqrt(1 + math.log(scale) / math.log(original))


def factor_tensors(long_: Factors, short_: Factors) -> dict[str, np.ndarray]:
    """The two lists as F32 tensors, which come first in a file; empty without LongRoPE."""
    lists = {names.ROPE_FACTORS_LONG: long_, names.ROPE_FACTORS_SHORT: short_}
    return {name: np.array(values, "<f4") for name, values in lists.items() if values is not None}
