"""Phi-3-small in float64 NumPy, from the checkpoint's tensors as they are stored: a second opinion besides mlx-lm.

Whole sequences, every key in one matrix of scores, the pattern of sparse attention as a mask over tokens. The angles of
the rotation are those of float32, as in training.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Floats = np.ndarray


def logits(model: Any, weights: Mapping[str, np.ndarray], ids: list[int]) -> Floats:
    """Float64 [tokens, vocabulary], before any id is forbidden."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    embedding = w["model.embed_tokens.weight"]
    x = model.embedding * embedding[ids]
    rotation = _rotation(model, len(ids))
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        seen = _seen(model, len(ids), sparse=model.sparse(layer))
        x = x + _attention(model, w, prefix, _norm(w, prefix + "input_layernorm", x), rotation, seen)
        x = x + _feed_forward(model, w, prefix, _norm(w, prefix + "post_attention_layernorm", x))
    return _norm(w, "model.final_layernorm", x) @ embedding.T / model.width


def _norm(w: Mapping[str, Floats], name: str, x: Floats) -> Floats:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w: Mapping[str, Floats], name: str, x: Floats) -> Floats:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _feed_forward(model: Any, w: Mapping[str, Floats], prefix: str, x: Floats) -> Floats:
    up = _linear(w, prefix + "mlp.up_proj", x)
    gate, linear = np.minimum(up[:, 0::2], model.limit), np.clip(up[:, 1::2], -model.limit, model.limit)
    return _linear(w, prefix + "mlp.down_proj", gate / (1 + np.exp(-1.702 * gate)) * (linear + 1))


def _attention(
    model: Any, w: Mapping[str, Floats], prefix: str, x: Floats, rotation: tuple[Floats, Floats], seen: Floats
) -> Floats:
    n, group = len(x), model.group
    qkv = _linear(w, prefix + "self_attn.query_key_value", x).reshape(n, model.kv_heads, group + 2, model.head_size)
    q, k, v = qkv[:, :, :group], qkv[:, :, group], qkv[:, :, group + 1]
    q, k = _rotate(q.reshape(n, -1, model.head_size), rotation), _rotate(k, rotation)
    scale = 1 / model.head_size if model.scaling else model.head_size**-0.5
    out = np.empty((n, model.heads, model.head_size))
    for head in range(model.heads):
        scores = np.where(seen[head], q[:, head] @ k[:, head // group].T * scale, -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = p / p.sum(axis=1, keepdims=True) @ v[:, head // group]
    return _linear(w, prefix + "self_attn.dense", out.reshape(n, -1))


def _seen(model: Any, n: int, *, sparse: bool) -> Floats:
    """Bool [heads, query, key]."""
    query, key = np.indices((n, n))
    masks = []
    for head in range(model.heads):
        mask = key <= query
        if sparse:
            mine, theirs = query // model.block, key // model.block
            mask &= (mine - theirs < model.local) | ((theirs + head + 1) % model.stride == 0)
        masks.append(mask)
    return np.array(masks)


def _rotation(model: Any, n: int) -> tuple[Floats, Floats]:
    """Cosines and sines [tokens, pairs] of a sequence of n tokens."""
    pairs = np.arange(0, model.head_size, 2, dtype=np.float32) / np.float32(model.head_size)
    factors, scale = np.ones(model.head_size // 2, np.float32), 1.0
    if model.original:
        name, scale = ("long_factor", model.mscales[1]) if n > model.original else ("short_factor", model.mscales[0])
        factors = np.array(model.factors[name], np.float32)
    frequencies = np.float32(1) / (factors * np.float32(model.theta) ** pairs)
    angles = (np.arange(n, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    return np.cos(angles) * scale, np.sin(angles) * scale


def _rotate(x: Floats, rotation: tuple[Floats, Floats]) -> Floats:
    """Heads [tokens, heads, channels]: channel i with i + half."""
    cos, sin = (part[:, None] for part in rotation)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
