"""Small random Phi-2s in the proportions of the real ones, as conftest.py has Phi-3s; every bias is large."""

from dataclasses import dataclass
from typing import Any

import numpy as np

LENGTH = 100
VOCABULARY = 32064
LAYERS = 3


@dataclass(frozen=True)
class Model:
    name: str
    seed: int
    heads: int
    head_size: int
    partial: float
    kv_heads: int = 0  # 0: as many as heads
    wide: int = 4  # the feed-forward length by the hidden size
    theta: float = 10000.0

    architecture = "phi2"
    classes = ("PhiForCausalLM", "PhiConfig")

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.wide * self.hidden,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
            "qk_layernorm": False,
            "rope_parameters": {
                "rope_theta": self.theta,
                "rope_type": "default",
                "partial_rotary_factor": self.partial,
            },
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "dtype": "float32",
        }

    def weights(self) -> dict[str, np.ndarray]:
        draw = np.random.Generator(np.random.PCG64(self.seed)).standard_normal
        hidden, kv, ffn = self.hidden, (self.kv_heads or self.heads) * self.head_size, self.wide * self.hidden
        made = {"model.embed_tokens.weight": draw((VOCABULARY, hidden), np.float32)}

        def linear(name: str, rows: int, columns: int, gain: float, bias: float = 0.5) -> None:
            made[f"{name}.weight"] = draw((rows, columns), np.float32) * np.float32(gain / np.sqrt(columns))
            made[f"{name}.bias"] = draw(rows, np.float32) * np.float32(bias)

        def norm(name: str) -> None:
            made[f"{name}.weight"] = 1 + np.float32(0.1) * draw(hidden, np.float32)
            made[f"{name}.bias"] = np.float32(0.1) * draw(hidden, np.float32)

        linear("lm_head", VOCABULARY, hidden, 1.5)
        norm("model.final_layernorm")
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}"
            norm(f"{prefix}.input_layernorm")
            for part, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
                linear(f"{prefix}.self_attn.{part}", rows, hidden, 1.0)
            linear(f"{prefix}.self_attn.dense", hidden, hidden, 0.7)
            linear(f"{prefix}.mlp.fc1", ffn, hidden, 1.0)
            linear(f"{prefix}.mlp.fc2", hidden, ffn, 0.7)
        return made

    def ids(self, length: int = LENGTH) -> list[int]:
        return np.random.Generator(np.random.PCG64(self.seed + 1)).integers(3, 32000, length).tolist()


MODELS = {
    model.name: model
    for model in (
        Model("phi_1", 21, heads=4, head_size=64, partial=0.5),
        Model("phi_2", 22, heads=3, head_size=80, partial=0.4),
        Model("grouped_narrow", 23, heads=4, head_size=64, partial=0.5, kv_heads=2, wide=3, theta=50000.0),
    )
}
