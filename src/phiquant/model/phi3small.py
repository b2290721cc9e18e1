"""The forward pass of Phi-3-small.

Pre-norm blocks as in Phi-3, with means and biases: grouped-query attention over rotated heads, by blocks of keys in
some layers, then a gated feed-forward network, each added to the residual stream `x`, which stays in float32. The
embedding, the scores and the logits are scaled as the model was parametrized (muP).
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from phiquant.arch import Phi3SmallConfig, names
from phiquant.kernels.ops import AttentionShape, BlockSparse, Program, Recorder, Weight

__all__ = ["record"]


def record(config: Phi3SmallConfig, weights: Mapping[str, Weight]) -> Program:
    """The Program that makes logits of tokens; KernelError where a weight does not fit."""
    shape = AttentionShape(
        heads=config.head_count,
        kv_heads=config.head_count_kv,
        head_size=config.head_size,
        rotary=config.head_size,
        scale=config.attention_scale,
    )
    pattern = BlockSparse(config.sparse_block_size, config.sparse_local_blocks, config.sparse_vertical_stride)
    hidden = config.feed_forward_length
    r = Recorder(shape, config.block_count)
    x = r.buffer("x", config.embedding_length)
    normed = r.buffer("normed", config.embedding_length)
    qkv = r.buffer("qkv", shape.q_width + 2 * shape.kv_width)
    q = r.buffer("q", shape.q_width)
    attended = r.buffer("attended", shape.q_width)
    gate_linear = r.buffer("gate_linear", 2 * hidden)
    gated = r.buffer("gated", hidden)
    last = r.buffer("last", config.embedding_length, "outputs")
    last_normed = r.buffer("last_normed", config.embedding_length, "outputs")
    logits = r.buffer("logits", config.vocab_size, "outputs")

    def pair(name: str) -> tuple[Weight, Weight]:
        return weights[name], weights[names.bias(name)]

    r.embed(weights[names.TOKEN_EMBD], x, scale=config.embedding_scale)
    for block in range(config.block_count):
        r.layer_norm(x, *pair(names.attn_norm(block)), config.norm_epsilon, normed)
        weight, bias = pair(names.attn_qkv(block))
        r.matmul(weight, normed, qkv, bias=bias)
        r.rotate_store(qkv, block, q)
        r.attention(q, block, attended, sparse=pattern if config.sparse_layers[block] else None)
        weight, bias = pair(names.attn_output(block))
        r.matmul(weight, attended, x, add=True, bias=bias)
        r.layer_norm(x, *pair(names.ffn_norm(block)), config.norm_epsilon, normed)
        weight, bias = pair(names.ffn_up(block))
        r.matmul(weight, normed, gate_linear, bias=bias)  # gate rows, then linear rows
        r.gegelu(gate_linear, gated, config.gate_limit)
        weight, bias = pair(names.ffn_down(block))
        r.matmul(weight, gated, x, add=True, bias=bias)
    r.select(x, last)
    weight, bias = (_scaled(w, config.logit_scale) for w in pair(names.OUTPUT_NORM))
    r.layer_norm(last, weight, bias, config.norm_epsilon, last_normed)
    r.matmul(weights[names.TOKEN_EMBD], last_normed, logits)
    return r.finish(logits)


def _scaled(weight: Weight, scale: float) -> Weight:
    """A vector times the scale of the logits, which are linear in it.

    Exact for the released models' 1/8 as for any power of two; another scale is rounded once for each element.
    """
    values = weight.data.view(np.float32) * np.float32(scale)
    return replace(weight, data=values.view(np.uint8))
