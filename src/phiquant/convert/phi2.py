"""Phi-1, Phi-1.5 and Phi-2: their configuration, their GGUF keys, and where each GGUF tensor comes from.

The first releases call their tensors and settings otherwise, "PhiForCausalLM" of type phi-msft one way and
"MixFormerSequentialForCausalLM" another, and store queries, keys and values as one matrix, rows Q, K, V. That is
llama.cpp's attn_qkv; of the later style's q_proj, k_proj, v_proj it makes attn_q, attn_k, attn_v. Nothing is permuted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from phiquant.convert.assembly import Assembly, match
from phiquant.convert.entries import Entry, boolean, float32, uint32
from phiquant.convert.fields import MAX_LAYERS, MAX_VOCABULARY, Fields, short
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.gguf import keys

__all__ = ["Settings"]

THETA: Final = 10000.0  # of every release, and what a reader takes for granted


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of config.json that matter, checked. `style` is that of the tensors' names: "phi" as in
    transformers, "msft" or "mixformer" as in the first releases."""

    architecture: ClassVar[str] = "phi2"

    style: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    rotary_dimensions: int
    rope_theta: float
    norm_epsilon: float

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read config.json of either style. Absent fields take the class's defaults; whatever is present is checked."""
        fields = Fields(config)
        old = "n_embd" in config
        hidden = fields.count("n_embd" if old else "hidden_size")
        heads = fields.count("n_head" if old else "num_attention_heads")
        kv_heads = fields.count("n_head_kv" if old else "num_key_value_heads", heads)
        if hidden % heads:
            raise CheckpointError(f"config.json: a hidden size of {hidden} is not a multiple of {heads} heads.")
        if heads % kv_heads:
            raise CheckpointError(f"config.json: {heads} heads are not a multiple of {kv_heads} key and value heads.")
        head_size = hidden // heads
        _refuse(config, fields, head_size)
        layers = fields.count("n_layer" if old else "num_hidden_layers", most=MAX_LAYERS)
        if old:
            named = (config.get("model_type"), config.get("architectures"))
            style = "mixformer" if "mixformer" in repr(named).lower() else "msft"
            rotary, theta = min(fields.count("rotary_dim", 32), head_size), THETA
        else:
            style, rope = "phi", fields.rope()
            if rope.kind not in (None, "default"):
                raise UnsupportedError(
                    f"config.json: rope type {short(rope.kind)} is not supported; Phi-2 has the default."
                )
            rotary = int(rope.number("partial_rotary_factor", 0.5, top=True, most=1.0) * head_size)
            theta = rope.number("rope_theta", THETA, top=True)
        if rotary < 2 or rotary % 2:
            raise CheckpointError(
                f"config.json: {rotary} rotated channels of a head of {head_size}; they must be a positive even number."
            )
        return cls(
            style=style,
            vocab_size=fields.count("vocab_size", most=MAX_VOCABULARY),
            hidden_size=hidden,
            intermediate_size=fields.count("n_inner" if old else "intermediate_size", 4 * hidden if old else None),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            context=fields.count("n_positions" if old else "max_position_embeddings", 2048),
            rotary_dimensions=rotary,
            rope_theta=theta,
            norm_epsilon=fields.number("layer_norm_epsilon" if old else "layer_norm_eps", 1e-5, most=1.0),
        )

    def entries(self) -> list[Entry]:
        """The keys `phi2.*` that llama.cpp's converter writes, in its order; the base of the rotation if it is unusual.

        llama.cpp's own feed_forward_length is always four times the hidden size, and its head_count_kv head_count.
        """
        key = keys.ArchitectureKeys(self.architecture)
        entries = [
            uint32(key.context_length, self.context),
            uint32(key.embedding_length, self.hidden_size),
            uint32(key.feed_forward_length, self.intermediate_size),
            uint32(key.block_count, self.layers),
            uint32(key.head_count, self.heads),
            uint32(key.head_count_kv, self.kv_heads),
            float32(key.layer_norm_epsilon, self.norm_epsilon),
            uint32(key.rope_dimension_count, self.rotary_dimensions),
            boolean(keys.ADD_BOS, False),
        ]
        if self.rope_theta != THETA:
            entries.append(float32(key.rope_freq_base, self.rope_theta))
        return entries

    def constants(self) -> dict[str, np.ndarray]:
        """None."""
        return {}

    def assemble(self, stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
        """Every tensor as it is stored, under GGUF's name."""
        expected = _expected(self)
        shapes = {name: shape for name, (_, shape) in expected.items()}
        found = match(shapes, stored, f"a Phi-2 of {self.layers} layers")
        return {expected[name][0]: Assembly.whole(stored[name]) for name in found}


def _refuse(config: Mapping[str, Any], fields: Fields, head_size: int) -> None:
    """What no release has, and GGUF's architecture phi2 cannot say."""
    for name in ("hidden_act", "activation_function"):
        activation = config.get(name, "gelu_new")
        if activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):  # three names of one formula
            raise UnsupportedError(f"config.json: {name} {short(activation)} is not supported; Phi-2 uses gelu_new.")
    if fields.flag("qk_layernorm", False):
        raise UnsupportedError(
            "config.json: qk_layernorm is true; norms of queries and keys have no place in GGUF's architecture phi2."
        )
    if fields.flag("tie_word_embeddings", False):
        raise UnsupportedError("config.json: tie_word_embeddings is true; GGUF's architecture phi2 has an own output.")
    if fields.count("head_dim", head_size) != head_size:
        raise UnsupportedError(
            f"config.json: head_dim {config['head_dim']} is not hidden_size / num_attention_heads = {head_size}, "
            "which GGUF's architecture phi2 cannot express."
        )


def _expected(settings: Settings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Checkpoint name -> (GGUF name, shape with rows first)."""
    hidden, ffn, vocabulary = settings.hidden_size, settings.intermediate_size, settings.vocab_size
    kv = settings.kv_heads * settings.head_size
    embedding, norm, output = {
        "phi": ("model.embed_tokens", "model.final_layernorm", "lm_head"),
        "msft": ("transformer.embd.wte", "lm_head.ln", "lm_head.linear"),
        "mixformer": ("layers.0.wte", f"layers.{settings.layers + 1}.ln", f"layers.{settings.layers + 1}.linear"),
    }[settings.style]
    biased: dict[str, tuple[str, tuple[int, ...]]] = {
        norm: ("output_norm", (hidden,)),
        output: ("output", (vocabulary, hidden)),
    }
    for layer in range(settings.layers):
        ours = f"blk.{layer}"
        theirs = {
            "phi": f"model.layers.{layer}",
            "msft": f"transformer.h.{layer}",
            "mixformer": f"layers.{layer + 1}",  # the embedding counts as the first
        }[settings.style]
        biased |= {
            f"{theirs}.mlp.fc1": (f"{ours}.ffn_up", (ffn, hidden)),
            f"{theirs}.mlp.fc2": (f"{ours}.ffn_down", (hidden, ffn)),
        }
        if settings.style == "phi":
            biased |= {
                f"{theirs}.input_layernorm": (f"{ours}.attn_norm", (hidden,)),
                f"{theirs}.self_attn.q_proj": (f"{ours}.attn_q", (hidden, hidden)),
                f"{theirs}.self_attn.k_proj": (f"{ours}.attn_k", (kv, hidden)),
                f"{theirs}.self_attn.v_proj": (f"{ours}.attn_v", (kv, hidden)),
                f"{theirs}.self_attn.dense": (f"{ours}.attn_output", (hidden, hidden)),
            }
        else:
            biased |= {
                f"{theirs}.ln": (f"{ours}.attn_norm", (hidden,)),
                f"{theirs}.mixer.Wqkv": (f"{ours}.attn_qkv", (hidden + 2 * kv, hidden)),
                f"{theirs}.mixer.out_proj": (f"{ours}.attn_output", (hidden, hidden)),
            }
    table: dict[str, tuple[str, tuple[int, ...]]] = {f"{embedding}.weight": ("token_embd.weight", (vocabulary, hidden))}
    for name, (ours, shape) in biased.items():
        table[f"{name}.weight"] = (f"{ours}.weight", shape)
        table[f"{name}.bias"] = (f"{ours}.bias", shape[:1])
    return table
