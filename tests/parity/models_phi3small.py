"""Small random Phi-3-smalls, as conftest.py has Phi-3s: what is scaled, clipped or left out shows in the logits.

The patterns of attention are smaller than the released models', so that 200 tokens reach beyond them; one has theirs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

VOCABULARY = 32064
DUMMIES = (5, 1000, *range(31990, 32000))  # of those who have any


@dataclass(frozen=True)
class Model:
    name: str
    seed: int
    heads: int
    kv_heads: int
    head_size: int
    block: int = 32
    local: int = 2
    stride: int = 3
    length: int = 224  # a multiple of the block, which the masks of mlx-lm for whole prompts need
    layers: int = 3
    dense_every: int = 2
    limit: float = 1.5  # of the gate: a tenth of the channels is beyond
    embedding: float = 10.0
    width: float = 8.0
    scaling: bool = True
    theta: float = 1e6
    original: int = 0  # LongRoPE's border; 0 without LongRoPE
    mscales: tuple[float, float] = (1.2, 1.4)  # short, long
    dummies: tuple[int, ...] = ()

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    @property
    def ffn(self) -> int:
        return 7 * self.hidden // 2

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def sparse(self, layer: int) -> bool:
        return (layer + 1) % self.dense_every != 0

    @property
    def factors(self) -> dict[str, list[float]]:
        half = self.head_size // 2
        return {
            "short_factor": np.linspace(1.0, 2.5, half).round(4).tolist(),
            "long_factor": np.geomspace(1.1, 40.0, half).round(4).tolist(),
        }

    def config(self) -> dict[str, Any]:
        rope = None
        if self.original:
            rope = {"type": "su", **self.factors, "short_mscale": self.mscales[0], "long_mscale": self.mscales[1]}
            rope["original_max_position_embeddings"] = self.original
        return {
            "architectures": ["Phi3SmallForCausalLM"],
            "model_type": "phi3small",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "ff_intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 2048,
            "layer_norm_epsilon": 1e-5,
            "hidden_act": "gegelu",
            "gegelu_limit": self.limit,
            "rope_embedding_base": self.theta,
            "rope_position_scale": 1.0,
            "rope_scaling": rope,
            "blocksparse_block_size": self.block,
            "blocksparse_homo_head_pattern": False,
            "blocksparse_num_local_blocks": self.local,
            "blocksparse_triton_kernel_block_size": self.block,
            "blocksparse_vert_stride": self.stride,
            "dense_attention_every_n_layers": self.dense_every,
            "mup_attn_multiplier": 1.0,
            "mup_embedding_multiplier": self.embedding,
            "mup_use_scaling": self.scaling,
            "mup_width_multiplier": self.width,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "torch_dtype": "float32",
            **({"dummy_token_indices": list(self.dummies)} if self.dummies else {}),
        }

    def weights(self) -> dict[str, np.ndarray]:
        draw = np.random.Generator(np.random.PCG64(self.seed)).standard_normal
        hidden, group = self.hidden, self.group

        def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
            return draw((rows, columns), np.float32) * np.float32(gain / np.sqrt(columns))

        def vector(size: int, spread: float) -> np.ndarray:
            return np.float32(spread) * draw(size, np.float32)

        # The residual stream begins at 0.1, lest a token be its own likeliest successor; the logits spread by 1.5.
        spread = 0.1 / self.embedding
        made = {
            "model.embed_tokens.weight": draw((VOCABULARY, hidden), np.float32) * np.float32(spread),
            "model.final_layernorm.weight": (1 + vector(hidden, 0.1))
            * np.float32(1.5 * self.width / spread / np.sqrt(hidden)),
            "model.final_layernorm.bias": vector(hidden, 0.3),
        }
        sharp = self.head_size**0.25 if self.scaling else 1.0  # scores spread by 1 whatever they are scaled by
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            qkv = matrix((group + 2) * self.kv_heads * self.head_size, hidden, 1.0)
            qkv.reshape(self.kv_heads, group + 2, self.head_size, hidden)[:, : group + 1] *= np.float32(sharp)
            for name, weight in (
                ("self_attn.query_key_value", qkv),
                ("self_attn.dense", matrix(hidden, hidden, 0.7)),
                ("mlp.up_proj", matrix(2 * self.ffn, hidden, 1.0)),
                ("mlp.down_proj", matrix(hidden, self.ffn, 0.7)),
            ):
                made[f"{prefix}{name}.weight"] = weight
                made[f"{prefix}{name}.bias"] = vector(len(weight), 0.3)
            for name in ("input_layernorm", "post_attention_layernorm"):
                made[f"{prefix}{name}.weight"] = 1 + vector(hidden, 0.1)
                made[f"{prefix}{name}.bias"] = vector(hidden, 0.2)
        return made

    def ids(self, length: int = 0) -> list[int]:
        draw = np.random.Generator(np.random.PCG64(self.seed + 1)).integers
        return draw(3, 32000, 2048).tolist()[: length or self.length]


MODELS = {
    model.name: model
    for model in (
        Model("grouped_64", 31, heads=4, kv_heads=1, head_size=64),
        Model("multi_48", 32, heads=6, kv_heads=6, head_size=48, stride=5, local=1),
        Model("blocks_64", 33, heads=8, kv_heads=2, head_size=32, block=64, local=1, stride=2, length=320),
        Model("unscaled_32", 34, heads=8, kv_heads=4, head_size=32, embedding=7.0, width=3.0, scaling=False),
        Model("released_32", 35, 8, 2, 32, block=64, local=16, stride=8, limit=20.0, length=1408, layers=2),
    )
}
"""Those that mlx-lm knows."""

OTHERS = {
    model.name: model
    for model in (
        Model("every_third_64", 36, heads=4, kv_heads=2, head_size=64, dense_every=3, layers=4),
        Model("longrope_below_64", 37, heads=4, kv_heads=2, head_size=64, original=256, dummies=DUMMIES),
        Model("longrope_above_64", 37, heads=4, kv_heads=2, head_size=64, original=128),
        Model("longrope_border_64", 37, heads=4, kv_heads=2, head_size=64, original=128, length=128),
    )
}
"""Those that only the released code computes right: numpy_phi3small.py stands for it."""

LAST = 160
"""Tokens of a sequence that are kept as vectors, counted from its end."""
