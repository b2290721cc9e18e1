"""mlx-lm's Phi-3-small on the CPU, in float32, from the weights of a model of models_phi3small.py.

Token by token its masks are right. For a prompt as a whole, mlx-lm 0.32 adds a boolean mask to the scores of its sparse
layers, where a sum needs minus infinity, and its blocks are in place only if the prompt fills the last one; so `logits`
gives it a mask that can be added, and a full block.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import phi3small
from mlx_lm.models.cache import make_prompt_cache

mx.set_default_device(mx.cpu)


def load(model: Any) -> phi3small.Model:
    made = phi3small.Model(phi3small.ModelArgs.from_dict(model.config()))
    made.load_weights([(name, mx.array(value)) for name, value in model.weights().items()], strict=True)
    return made


def logits(made: phi3small.Model, ids: list[int]) -> np.ndarray:
    """Of a whole prompt [tokens, vocabulary], before any id is forbidden."""
    filled = ids + [3] * (-len(ids) % made.args.blocksparse_block_size)
    original = phi3small.create_attention_mask
    phi3small.create_attention_mask = _added_mask
    try:
        return _logits(made, filled, None)[: len(ids)]
    finally:
        phi3small.create_attention_mask = original


def logits_by_token(made: phi3small.Model, ids: list[int]) -> np.ndarray:
    """The same, token by token."""
    cache = make_prompt_cache(made)
    return np.concatenate([_logits(made, [token], cache) for token in ids])


def _logits(made: phi3small.Model, ids: list[int], cache: Any) -> np.ndarray:
    hidden = made.model(mx.array([ids]), cache)
    return np.array(made.model.embed_tokens.as_linear(hidden)[0] / made.mup_width_multiplier)


def _added_mask(hidden: mx.array, cache: Any, **_: Any) -> mx.array:
    n = hidden.shape[1]
    return mx.where(mx.tri(n, dtype=mx.bool_), mx.array(0.0), mx.array(-np.inf))
