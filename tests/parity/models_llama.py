"""Small random Llamas and Mistrals in the proportions of rewritten Phis, as conftest.py has Phi-3s."""

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
    kv_heads: int
    head_size: int
    hidden: int = 0  # 0: heads * head_size
    tied: bool = False
    window: int | None = None  # a Mistral's
    mistral: bool = False
    biased: bool = False
    rope: str = "default"
    original: int = 64  # the border of LongRoPE

    architecture = "llama"

    @property
    def classes(self) -> tuple[str, str]:
        return ("MistralForCausalLM", "MistralConfig") if self.mistral else ("LlamaForCausalLM", "LlamaConfig")

    @property
    def width(self) -> int:
        return self.hidden or self.heads * self.head_size

    def config(self) -> dict[str, Any]:
        half = self.head_size // 2
        scalings: dict[str, dict[str, Any]] = {
            "default": {},
            "linear": {"factor": 4.0},
            # Waves of 64 to 512 tokens are between short and long.
            "llama3": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 512,
            },
            "longrope": {
                "original_max_position_embeddings": self.original,
                "short_factor": np.linspace(1.0, 2.5, half).round(4).tolist(),
                "long_factor": np.geomspace(1.1, 40.0, half).round(4).tolist(),
            },
        }
        own: dict[str, Any] = (
            {"sliding_window": self.window}
            if self.mistral
            else {"attention_bias": self.biased, "mlp_bias": self.biased}
        )
        return {
            "architectures": [self.classes[0]],
            "model_type": "mistral" if self.mistral else "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": self.rope, **scalings[self.rope]},
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "dtype": "float32",
            **own,
        }

    def weights(self) -> dict[str, np.ndarray]:
        draw = np.random.Generator(np.random.PCG64(self.seed)).standard_normal
        hidden, ffn = self.width, 2 * self.width
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        spread = 1.5 / np.sqrt(hidden) if self.tied else 1.0
        made = {"model.embed_tokens.weight": draw((VOCABULARY, hidden), np.float32) * np.float32(spread)}

        def linear(name: str, rows: int, columns: int, gain: float, *, biased: bool = self.biased) -> None:
            made[f"{name}.weight"] = draw((rows, columns), np.float32) * np.float32(gain / np.sqrt(columns))
            if biased:
                made[f"{name}.bias"] = draw(rows, np.float32) * np.float32(0.5)

        def norm(name: str) -> None:
            made[f"{name}.weight"] = 1 + np.float32(0.1) * draw(hidden, np.float32)

        if not self.tied:
            linear("lm_head", VOCABULARY, hidden, 1.5, biased=False)
        norm("model.norm")
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}"
            norm(f"{prefix}.input_layernorm")
            norm(f"{prefix}.post_attention_layernorm")
            for part, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                linear(f"{prefix}.self_attn.{part}", rows, hidden, 1.0)
            linear(f"{prefix}.self_attn.o_proj", hidden, q, 0.7)
            linear(f"{prefix}.mlp.gate_proj", ffn, hidden, 1.0)
            linear(f"{prefix}.mlp.up_proj", ffn, hidden, 1.0)
            linear(f"{prefix}.mlp.down_proj", hidden, ffn, 0.7)
        return made

    def ids(self, length: int = LENGTH) -> list[int]:
        return np.random.Generator(np.random.PCG64(self.seed + 1)).integers(3, 32000, length).tolist()


MODELS = {
    model.name: model
    for model in (
        Model("as_phi3_mini_96", 31, heads=3, kv_heads=3, head_size=96),
        Model("as_phi4_128", 32, heads=4, kv_heads=1, head_size=128, hidden=256),
        Model("biased_tied_grouped_64", 33, heads=4, kv_heads=2, head_size=64, tied=True, biased=True),
        Model("window_96", 34, heads=2, kv_heads=2, head_size=96, mistral=True, window=47),
        Model("no_window_64", 35, heads=4, kv_heads=2, head_size=64, mistral=True),
        Model("linear_64", 36, heads=4, kv_heads=4, head_size=64, rope="linear"),
        Model("llama3_64", 37, heads=4, kv_heads=2, head_size=64, rope="llama3"),
        Model("longrope_96", 38, heads=2, kv_heads=2, head_size=96, rope="longrope"),
    )
}
