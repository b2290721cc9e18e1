"""The forward pass of Phi checkpoints that were rewritten as Llama or Mistral.

Pre-norm blocks: grouped-query attention over rotated heads, then a gated feed-forward network, each added to the
residual stream `x`, which stays in float32. GGUF's architecture llama has the rows of queries and keys in an order that
rotates neighbours with one another; scores are sums over channels, so that they can stay in it.
"""

from collections.abc import Mapping

from phiquant.arch import LlamaConfig, names
from phiquant.kernels.ops import AttentionShape, Buffer, Program, Recorder, Weight

__all__ = ["record"]


def record(config: LlamaConfig, weights: Mapping[str, Weight]) -> Program:
    """The Program that makes logits of tokens; KernelError where a weight does not fit."""
    shape = AttentionShape(
        heads=config.head_count,
        kv_heads=config.head_count_kv,
        head_size=config.head_size,
        rotary=config.head_size,
        scale=config.head_size**-0.5,
        window=config.sliding_window if config.sliding_window < config.context_length else 0,
        neighbours=True,
    )
    epsilon, hidden = config.rms_epsilon, config.feed_forward_length
    r = Recorder(shape, config.block_count)
    x = r.buffer("x", config.embedding_length)
    normed = r.buffer("normed", config.embedding_length)
    qkv = r.buffer("qkv", shape.q_width + 2 * shape.kv_width)
    q = r.buffer("q", shape.q_width)
    attended = r.buffer("attended", shape.q_width)
    gate_up = r.buffer("gate_up", 2 * hidden)
    gated = r.buffer("gated", hidden)
    last = r.buffer("last", config.embedding_length, "outputs")
    last_normed = r.buffer("last_normed", config.embedding_length, "outputs")
    logits = r.buffer("logits", config.vocab_size, "outputs")

    def matmul(name: str, source: Buffer, out: Buffer, *, add: bool = False) -> None:
        r.matmul(weights[name], source, out, add=add, bias=weights.get(names.bias(name)))

    r.embed(weights[names.TOKEN_EMBD], x)
    for block in range(config.block_count):
        r.rms_norm(x, weights[names.attn_norm(block)], epsilon, normed)
        if config.fused:
            matmul(names.attn_qkv(block), normed, qkv)
        else:
            first = shape.q_width
            matmul(names.attn_q(block), normed, qkv.columns(0, first))
            matmul(names.attn_k(block), normed, qkv.columns(first, shape.kv_width))
            matmul(names.attn_v(block), normed, qkv.columns(first + shape.kv_width, shape.kv_width))
        r.rotate_store(qkv, block, q)
        r.attention(q, block, attended)
        matmul(names.attn_output(block), attended, x, add=True)
        r.rms_norm(x, weights[names.ffn_norm(block)], epsilon, normed)
        matmul(names.ffn_gate(block), normed, gate_up.columns(0, hidden))
        matmul(names.ffn_up(block), normed, gate_up.columns(hidden, hidden))
        r.swiglu(gate_up, gated)
        matmul(names.ffn_down(block), gated, x, add=True)
    r.select(x, last)
    r.rms_norm(last, weights[names.OUTPUT_NORM], epsilon, last_normed)
    r.matmul(weights[names.TOKEN_EMBD if config.tied else names.OUTPUT], last_normed, logits)
    return r.finish(logits)
