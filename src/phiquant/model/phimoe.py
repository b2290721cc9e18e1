"""The forward pass of Phi-3.5-MoE, Phi-mini-MoE and Phi-tiny-MoE.

Pre-norm blocks: grouped-query attention over rotated heads, then two of many gated feed-forward networks, chosen for
each token by sparsemixer and weighed by what it gives them; both added to the residual stream `x`, which stays in
float32.
"""

from collections.abc import Mapping

from phiquant.arch import PhiMoEConfig, names
from phiquant.arch.phimoe import EXPERTS_USED
from phiquant.kernels.ops import AttentionShape, Buffer, Program, Recorder, Weight

__all__ = ["record"]


def record(config: PhiMoEConfig, weights: Mapping[str, Weight]) -> Program:
    """The Program that makes logits of tokens; KernelError where a weight does not fit."""
    shape = AttentionShape(
        heads=config.head_count,
        kv_heads=config.head_count_kv,
        head_size=config.head_size,
        rotary=config.rope_dimension_count,
        scale=config.head_size**-0.5,
        window=config.sliding_window if config.sliding_window < config.context_length else 0,
    )
    r = Recorder(shape, config.block_count)
    embedding, hidden = config.embedding_length, config.feed_forward_length
    x = r.buffer("x", embedding)
    normed = r.buffer("normed", embedding)
    qkv = r.buffer("qkv", shape.q_width + 2 * shape.kv_width)
    q = r.buffer("q", shape.q_width)
    attended = r.buffer("attended", shape.q_width)
    scores = r.buffer("scores", config.expert_count)
    gate_up = r.buffer("gate_up", 2 * hidden, "routes")
    gated = r.buffer("gated", hidden, "routes")
    made = r.buffer("made", embedding, "routes")
    last = r.buffer("last", embedding, "outputs")
    last_normed = r.buffer("last_normed", embedding, "outputs")
    logits = r.buffer("logits", config.vocab_size, "outputs")

    def norm(weight: str, x: Buffer, out: Buffer) -> None:
        r.layer_norm(x, weights[weight], weights[names.bias(weight)], config.norm_epsilon, out)

    def project(weight: str, x: Buffer, out: Buffer, *, add: bool = False) -> None:
        r.matmul(weights[weight], x, out, add=add, bias=weights.get(names.bias(weight)))

    r.embed(weights[names.TOKEN_EMBD], x)
    for block in range(config.block_count):
        norm(names.attn_norm(block), x, normed)
        if config.fused_qkv:
            project(names.attn_qkv(block), normed, qkv)
        else:
            project(names.attn_q(block), normed, qkv.columns(0, shape.q_width))
            project(names.attn_k(block), normed, qkv.columns(shape.q_width, shape.kv_width))
            project(names.attn_v(block), normed, qkv.columns(shape.q_width + shape.kv_width, shape.kv_width))
        r.rotate_store(qkv, block, q)
        r.attention(q, block, attended)
        project(names.attn_output(block), attended, x, add=True)

        norm(names.ffn_norm(block), x, normed)
        r.matmul(weights[names.ffn_gate_inp(block)], normed, scores)
        route = r.route(scores, EXPERTS_USED, config.router_jitter)
        r.expert_matmul(weights[names.ffn_gate_exps(block)], route, normed, gate_up.columns(0, hidden))
        r.expert_matmul(weights[names.ffn_up_exps(block)], route, normed, gate_up.columns(hidden, hidden))
        r.swiglu(gate_up, gated)
        r.expert_matmul(weights[names.ffn_down_exps(block)], route, gated, made)
        r.combine(route, made, x)
    r.select(x, last)
    norm(names.OUTPUT_NORM, last, last_normed)
    project(names.OUTPUT, last_normed, logits)
    return r.finish(logits)
