"""Small random PhiMoEs with the proportions of the released ones, seeded as in conftest.py: the same interface.

Scores of attention spread by 1, of the router by 1.5, so that several experts share the weight of some tokens and one
alone has that of others (`test_the_models_tell_what_matters_apart`).
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
VOCABULARY = 32064
LENGTH = 200
LAYERS = 3
EXPERTS = 16


@dataclass(frozen=True)
class Model:
    name: str
    seed: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    ffn: int
    original: int = 0  # LongRoPE's border; 0 without LongRoPE
    mscales: tuple[float, float] = (1.0, 1.0)  # under the short and under the long factors
    window: int | None = None
    biases: bool = True
    jitter: float = 0.01
    vocabulary: int = VOCABULARY
    context: int = 2048

    def config(self, *, released: bool = True) -> dict[str, Any]:
        """config.json as it was released, or as transformers 5 writes it."""
        rope: dict[str, Any] = {}
        if self.original:
            half = self.head_size // 2
            rope = {
                "short_factor": np.linspace(1.0, 2.5, half).round(4).tolist(),
                "long_factor": np.geomspace(1.1, 40.0, half).round(4).tolist(),
                "short_mscale": self.mscales[0],
                "long_mscale": self.mscales[1],
                "original_max_position_embeddings": self.original,
            }
        made: dict[str, Any] = {
            "architectures": ["PhiMoEForCausalLM" if released else "PhimoeForCausalLM"],
            "model_type": "phimoe",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "router_jitter_noise": self.jitter,
            "input_jitter_noise": 0.01,
            "max_position_embeddings": self.context,
            "original_max_position_embeddings": self.original or self.context,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": self.biases,
            "lm_head_bias": self.biases,
            "sliding_window": self.window,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
            "dtype": "float32",
        }
        if self.head_size * self.heads != self.hidden:
            made["head_dim"] = self.head_size
        kind = "longrope" if self.original else "default"
        if not released:
            made["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": kind, **rope}
            return made
        return made | {"rope_theta": 10000.0, "rope_scaling": {"type": kind, **rope} if rope else None}

    def weights(self) -> dict[str, np.ndarray]:
        """By the released checkpoint's names, float32."""
        draw = np.random.Generator(np.random.PCG64(self.seed)).standard_normal
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size

        def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
            return draw((rows, columns), np.float32) * np.float32(gain / np.sqrt(columns))

        def linear(name: str, rows: int, columns: int, gain: float) -> dict[str, np.ndarray]:
            made = {f"{name}.weight": matrix(rows, columns, gain)}
            if self.biases:
                made[f"{name}.bias"] = np.float32(0.2) * draw(rows, np.float32)
            return made

        def norm(name: str) -> dict[str, np.ndarray]:
            weight, bias = draw((2, self.hidden), np.float32) * np.float32(0.1)
            return {f"{name}.weight": 1 + weight, f"{name}.bias": bias}

        made = {"model.embed_tokens.weight": matrix(self.vocabulary, self.hidden, np.sqrt(self.hidden))}
        made |= linear("lm_head", self.vocabulary, self.hidden, 1.5) | norm("model.norm")
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            for name, rows, columns, gain in (
                ("q_proj", q, self.hidden, 1.0),
                ("k_proj", kv, self.hidden, 1.0),
                ("v_proj", kv, self.hidden, 1.0),
                ("o_proj", self.hidden, q, 0.7),
            ):
                made |= linear(f"{prefix}self_attn.{name}", rows, columns, gain)
            made |= norm(prefix + "input_layernorm") | norm(prefix + "post_attention_layernorm")
            made[prefix + "block_sparse_moe.gate.weight"] = matrix(EXPERTS, self.hidden, 1.5)
            for expert in range(EXPERTS):
                for part, rows, columns in (
                    ("w1", self.ffn, self.hidden),
                    ("w2", self.hidden, self.ffn),
                    ("w3", self.ffn, self.hidden),
                ):
                    gain = 0.7 if part == "w2" else 1.0
                    name = f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight"
                    made[name] = matrix(rows, columns, gain)
        return made

    def ids(self, length: int = LENGTH) -> list[int]:
        most = min(32000, self.vocabulary)
        return np.random.Generator(np.random.PCG64(self.seed + 1)).integers(3, most, length).tolist()


_LONG = Model("", 27, heads=4, kv_heads=1, head_size=64, hidden=256, ffn=400, mscales=(1.15, 1.35))

MODELS = {
    model.name: model
    for model in (
        # As Phi-3.5-MoE: query heads in groups of 4, a head of 128, F = 1.5625 E.
        Model("grouped_128", 21, heads=4, kv_heads=1, head_size=128, hidden=512, ffn=800),
        # As Phi-tiny-MoE: the heads together are narrower than the embedding, and the experts small.
        Model("tiny_128", 22, heads=2, kv_heads=1, head_size=128, hidden=512, ffn=56, window=2047),
        Model("no_biases_64", 23, heads=4, kv_heads=2, head_size=64, hidden=256, ffn=96, biases=False),
        Model("many_near_64", 24, heads=4, kv_heads=1, head_size=64, hidden=256, ffn=96, jitter=0.1),
        Model("window_64", 25, heads=4, kv_heads=1, head_size=64, hidden=256, ffn=96, window=47),
        replace(_LONG, name="longrope_below_64", original=256),
        replace(_LONG, name="longrope_at_64", original=LENGTH),
        replace(_LONG, name="longrope_just_above_64", original=LENGTH - 1),
        replace(_LONG, name="longrope_above_64", original=96),
    )
}

# Those that tests/vectors has, which go by log-probabilities of these tokens.
VECTORS_OF = ("tiny_128", "many_near_64", "window_64", "longrope_at_64", "longrope_just_above_64")
KEPT = np.random.Generator(np.random.PCG64(2)).choice(32000, 24, replace=False)


def beyond(model: Model) -> bool:
    """Whether its sequence of LENGTH tokens has the long factors."""
    return 0 < model.original < LENGTH


def restacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights in transformers 5's layout: a layer's experts in two tensors, gate rows before up rows."""
    made = {}
    for name, value in weights.items():
        if ".experts." not in name:
            made[name.replace("block_sparse_moe.gate", "mlp.router")] = value
    for layer in range(LAYERS):
        theirs = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (
            np.stack([weights[f"{theirs}.{e}.{part}.weight"] for e in range(EXPERTS)]) for part in ("w1", "w2", "w3")
        )
        made[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        made[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return made


def write_checkpoint(model: Model, directory: Path, *, released: bool = True) -> Path:
    """The model in Hugging Face layout, of the release or of transformers 5, without transformers' help."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config(released=released)))
    weights = model.weights()
    save_file(weights if released else restacked(weights), directory / "model.safetensors", {"format": "pt"})
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, directory / name)
    return directory
