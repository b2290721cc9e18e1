"""GGUF's names of the tensors that Phi architectures share; shapes are the business of each architecture's own file."""

from typing import Final

TOKEN_EMBD: Final = "token_embd.weight"
OUTPUT_NORM: Final = "output_norm.weight"
OUTPUT: Final = "output.weight"  # absent where the embedding is used again (tied)
ROPE_FACTORS_LONG: Final = "rope_factors_long.weight"
ROPE_FACTORS_SHORT: Final = "rope_factors_short.weight"
ROPE_FREQS: Final = "rope_freqs.weight"  # factors that hold for sequences of any length


def attn_norm(block: int) -> str:
    """The norm before a block's attention."""
    return f"blk.{block}.attn_norm.weight"


def attn_qkv(block: int) -> str:
    """A block's fused projection to queries, keys and values, in this order of rows."""
    return f"blk.{block}.attn_qkv.weight"


def attn_q(block: int) -> str:
    """A block's projection to queries, where it is not fused."""
    return f"blk.{block}.attn_q.weight"


def attn_k(block: int) -> str:
    """A block's projection to keys, where it is not fused."""
    return f"blk.{block}.attn_k.weight"


def attn_v(block: int) -> str:
    """A block's projection to values, where it is not fused."""
    return f"blk.{block}.attn_v.weight"


def attn_output(block: int) -> str:
    """A block's projection of the attended values back to the residual stream."""
    return f"blk.{block}.attn_output.weight"


def ffn_norm(block: int) -> str:
    """The norm before a block's feed-forward network."""
    return f"blk.{block}.ffn_norm.weight"


def ffn_gate(block: int) -> str:
    """A block's gate projection, where it is not fused into `ffn_up`."""
    return f"blk.{block}.ffn_gate.weight"


def ffn_up(block: int) -> str:
    """A block's up projection; in Phi-3 the gate's rows come first, then those of the up projection."""
    return f"blk.{block}.ffn_up.weight"


def ffn_down(block: int) -> str:
    """A block's projection back to the residual stream."""
    return f"blk.{block}.ffn_down.weight"


def ffn_gate_inp(block: int) -> str:
    """A block's router: it scores the experts."""
    return f"blk.{block}.ffn_gate_inp.weight"


def ffn_gate_exps(block: int) -> str:
    """The gate projections of a block's experts."""
    return f"blk.{block}.ffn_gate_exps.weight"


def ffn_up_exps(block: int) -> str:
    """The up projections of a block's experts."""
    return f"blk.{block}.ffn_up_exps.weight"


def ffn_down_exps(block: int) -> str:
    """The projections of a block's experts back to the residual stream."""
    return f"blk.{block}.ffn_down_exps.weight"


def bias(weight: str) -> str:
    """The bias that belongs to a weight of this name."""
    return f"{weight.removesuffix('.weight')}.bias"
