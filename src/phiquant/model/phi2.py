"""The forward pass of Phi-1, Phi-1.5 and Phi-2.

Parallel blocks: one norm feeds attention and feed-forward network, and both results are added to the residual stream
`x`, which stays in float32. Every matrix has a bias.
"""

from collections.abc import Mapping

from phiquant.arch import Phi2Config, names
from phiquant.kernels.ops import AttentionShape, Buffer, Program, Recorder, Weight

__all__ = ["record"]


def record(config: Phi2Config, weights: Mapping[str, Weight]) -> Program:
    """The Program that makes logits of tokens; KernelError where a weight does not fit."""
    shape = AttentionShape(
        heads=config.head_count,
        kv_heads=config.head_count_kv,
        head_size=config.head_size,
        rotary=config.rope_dimension_count,
        scale=config.head_size**-0.5,
    )
    r = Recorder(shape, config.block_count)
    x = r.buffer("x", config.embedding_length)
    normed = r.buffer("normed", config.embedding_length)
    qkv = r.buffer("qkv", shape.q_width + 2 * shape.kv_width)
    q = r.buffer("q", shape.q_width)
    attended = r.buffer("attended", shape.q_width)
    hidden = r.buffer("hidden", config.feed_forward_length)
    last = r.buffer("last", config.embedding_length, "outputs")
    last_normed = r.buffer("last_normed", config.embedding_length, "outputs")
    logits = r.buffer("logits", config.vocab_size, "outputs")

    def norm(name: str, source: Buffer, out: Buffer) -> None:
        r.layer_norm(source, weights[name], weights[names.bias(name)], config.norm_epsilon, out)

    def matmul(name: str, source: Buffer, out: Buffer, *, add: bool = False) -> None:
        r.matmul(weights[name], source, out, add=add, bias=weights[names.bias(name)])

    r.embed(weights[names.TOKEN_EMBD], x)
    for block in range(config.block_count):
        norm(names.attn_norm(block), x, normed)
        if config.fused:
            matmul(names.attn_qkv(block), normed, qkv)
        else:
            matmul(names.attn_q(block), normed, qkv.columns(0, shape.q_width))
            matmul(names.attn_k(block), normed, qkv.columns(shape.q_width, shape.kv_width))
            matmul(names.attn_v(block), normed, qkv.columns(shape.q_width + shape.kv_width, shape.kv_width))
        r.rotate_store(qkv, block, q)
        r.attention(q, block, attended)
        matmul(names.attn_output(block), attended, x, add=True)
        matmul(names.ffn_up(block), normed, hidden)
        r.gelu(hidden, hidden)
        matmul(names.ffn_down(block), hidden, x, add=True)
    r.select(x, last)
    norm(names.OUTPUT_NORM, last, last_normed)
    matmul(names.OUTPUT, last_normed, logits)
    return r.finish(logits)
