"""PhiMoE in float64, written from the mathematics of the released model: the oracle where transformers departs from it.

    PhiMoE(config.json, weights by the released checkpoint's names).logits(ids)

With n tokens, x[t] the embedding of token t, LN(x) = (x - mean x) / sqrt(var x + eps) * weight + bias:

    x += O attend(rotate Q LN(x), rotate K LN(x), V LN(x))        in every layer, causal, within the window
    x += sum over the two chosen experts e of  m[e] W2[e] (silu(W1[e] LN(x)) * W3[e] LN(x))
    logits = head LN(x)

The angle of position p and pair i of channels (i, i + d/2) is p / (factor[i] theta^(2i/d)), and mscale multiplies
cosine and sine; both are the long ones for the whole sequence if n exceeds the original context, else the short.

The first expert is the one with the largest score s, the second that with the largest of the others. The weight of a
chosen e among the candidates C is exp(s[e]) / sum of exp(s[c]) over the c in C whose distance from it,
(s[e] - s[c]) / max(|s[c]|, s[e]), is at most 2 jitter; C are all experts for the first, all but it for the second.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.float64]


class PhiMoE:
    """`keep_short_factors`: beyond the border mscale alone becomes the long one, as transformers 5.24 has it."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]], *, keep_short_factors: bool = False
    ) -> None:
        self.config, self.keep_short_factors = config, keep_short_factors
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.chosen: list[NDArray[np.int64]] = []  # [tokens, 2] for each layer, of the last run

    def logits(self, ids: Sequence[int]) -> Wide:
        """[tokens, vocabulary]."""
        x = self.weights["model.embed_tokens.weight"][list(ids)]
        self.chosen = []
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(prefix + "self_attn.", self._norm(prefix + "input_layernorm", x))
            x = x + self._experts(prefix + "block_sparse_moe.", self._norm(prefix + "post_attention_layernorm", x))
        return self._linear("lm_head", self._norm("model.norm", x))

    def _linear(self, name: str, x: Wide) -> Wide:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _norm(self, name: str, x: Wide) -> Wide:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return centred / deviation * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _rotation(self, tokens: int, size: int) -> tuple[Wide, Wide]:
        theta, scaling = self.config["rope_theta"], self.config["rope_scaling"]
        factors, mscale = np.ones(size // 2), 1.0
        if scaling is not None:
            long = tokens > scaling["original_max_position_embeddings"]
            factors = np.array(scaling["long_factor" if long and not self.keep_short_factors else "short_factor"])
            mscale = scaling["long_mscale" if long else "short_mscale"]
        frequencies = 1 / (factors * theta ** (np.arange(0, size, 2) / size))
        angles = np.arange(tokens)[:, None] * frequencies
        return mscale * np.cos(angles), mscale * np.sin(angles)

    def _attention(self, prefix: str, x: Wide) -> Wide:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size, n = self.config.get("head_dim") or self.config["hidden_size"] // heads, len(x)
        cos, sin = self._rotation(n, size)
        q, k, v = (
            self._linear(f"{prefix}{name}_proj", x).reshape(n, -1, size).transpose(1, 0, 2) for name in ("q", "k", "v")
        )

        def rotate(h: Wide) -> Wide:
            a, b = h[..., : size // 2], h[..., size // 2 :]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        q, k = rotate(q), rotate(k)
        distance = np.arange(n)[:, None] - np.arange(n)
        seen = distance >= 0
        if self.config["sliding_window"] is not None:
            seen &= distance < self.config["sliding_window"]
        out = []
        for head in range(heads):
            own = head // (heads // kv_heads)
            scores = np.where(seen, q[head] @ k[own].T / np.sqrt(size), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out.append(weights / weights.sum(axis=1, keepdims=True) @ v[own])
        return self._linear(f"{prefix}o_proj", np.concatenate(out, axis=1))

    def _experts(self, prefix: str, x: Wide) -> Wide:
        scores = self._linear(f"{prefix}gate", x)
        chosen = np.empty((len(x), 2), np.int64)
        y = np.zeros_like(x)
        for token, s in enumerate(scores):
            candidates = set(range(len(s)))
            for choice in range(2):
                best = max(sorted(candidates), key=lambda e: s[e])
                near = [
                    c
                    for c in candidates
                    if not (s[best] - s[c]) / max(abs(s[c]), s[best]) > 2 * self.config["router_jitter_noise"]
                ]
                weight = np.exp(s[best]) / sum(np.exp(s[c]) for c in near)
                w1, w2, w3 = (self.weights[f"{prefix}experts.{best}.{part}.weight"] for part in ("w1", "w2", "w3"))
                gate = w1 @ x[token]
                y[token] += weight * (w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ x[token])))
                chosen[token, choice] = best
                candidates.remove(best)
        self.chosen.append(chosen)
        return y
