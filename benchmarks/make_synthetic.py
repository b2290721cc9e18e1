"""A checkpoint of Phi-3.5-mini's or Phi-3.5-MoE's shape with random weights, in Hugging Face layout: no download.

    python benchmarks/make_synthetic.py DIR [--model phimoe] [--layers 32] [--hidden 3072] ...

The defaults are the model's: of Phi-3.5-mini 3.82 B parameters, bfloat16, two shards, 7.6 GB; of Phi-3.5-MoE 41.9 B,
seventeen shards, 83.7 GB (2.6 GB for each of its layers). The weights are normal with a standard deviation of 0.02 and
a few outliers in every row, drawn once into a pool of 16 M values from which every tensor takes runs at random places;
so writing takes as long as the disk, and memory stays below 300 MB. The tokenizer's files are the bundled model's. What
such a model says means nothing. With --filled some layers are left empty, for disks that are too small.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import ml_dtypes
import numpy as np

POOL = 1 << 24  # values
RUN = 1 << 20  # values copied from one place of the pool
TOKENIZER = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
SHAPES = {
    "phi3": {"hidden": 3072, "ffn": 8192, "shards": 2},
    "phimoe": {"hidden": 4096, "ffn": 6400, "kv_heads": 8, "shards": 17},
}
BUNDLED = Path(__file__).resolve().parent.parent / "models" / "phi3-tiny"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=list(SHAPES), default="phi3")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--ffn", type=int, help="of phimoe: of one expert")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default of phi3: as many as heads")
    parser.add_argument("--experts", type=int, default=16, help="of phimoe")
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--filled", type=int, help="layers whose matrices are written; those of others are holes, zeros"
    )
    a = parser.parse_args()
    for name, value in SHAPES[a.model].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    return a


def tensors(a: argparse.Namespace) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes (outputs, inputs) in the order of the published checkpoint."""
    return tensors_of_moe(a) if a.model == "phimoe" else tensors_of_phi3(a)


def tensors_of_moe(a: argparse.Namespace) -> list[tuple[str, tuple[int, ...]]]:
    kv = a.kv_heads * (a.hidden // a.heads)
    result: list[tuple[str, tuple[int, ...]]] = []

    def linear(name: str, *shape: int) -> None:
        result.extend([(f"{name}.weight", shape), (f"{name}.bias", shape[:1])])

    result.append(("model.embed_tokens.weight", (a.vocabulary, a.hidden)))
    for i in range(a.layers):
        layer = f"model.layers.{i}."
        for expert in range(a.experts):
            for part, shape in (("w1", (a.ffn, a.hidden)), ("w2", (a.hidden, a.ffn)), ("w3", (a.ffn, a.hidden))):
                result.append((f"{layer}block_sparse_moe.experts.{expert}.{part}.weight", shape))
        result.append((layer + "block_sparse_moe.gate.weight", (a.experts, a.hidden)))
        linear(layer + "input_layernorm", a.hidden)
        linear(layer + "post_attention_layernorm", a.hidden)
        for part, rows in (("k", kv), ("o", a.hidden), ("q", a.hidden), ("v", kv)):
            linear(f"{layer}self_attn.{part}_proj", rows, a.hidden)
    linear("model.norm", a.hidden)
    linear("lm_head", a.vocabulary, a.hidden)
    return result


def tensors_of_phi3(a: argparse.Namespace) -> list[tuple[str, tuple[int, ...]]]:
    head = a.hidden // a.heads
    kv = (a.kv_heads or a.heads) * head
    result: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (a.vocabulary, a.hidden))]
    for i in range(a.layers):
        layer = f"model.layers.{i}."
        result += [
            (layer + "input_layernorm.weight", (a.hidden,)),
            (layer + "mlp.down_proj.weight", (a.hidden, a.ffn)),
            (layer + "mlp.gate_up_proj.weight", (2 * a.ffn, a.hidden)),
            (layer + "post_attention_layernorm.weight", (a.hidden,)),
            (layer + "self_attn.o_proj.weight", (a.hidden, a.hidden)),
            (layer + "self_attn.qkv_proj.weight", (a.hidden + 2 * kv, a.hidden)),
        ]
    return [*result, ("model.norm.weight", (a.hidden,)), ("lm_head.weight", (a.vocabulary, a.hidden))]


def config(a: argparse.Namespace) -> dict[str, object]:
    """config.json, with LongRoPE factors that grow as those of the 3.5 models do."""
    half = a.hidden // a.heads // 2
    steps = np.linspace(0, 1, half)
    made: dict[str, object] = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": a.hidden,
        "intermediate_size": a.ffn,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads or a.heads,
        "vocab_size": a.vocabulary,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [round(float(1 + 1.84 * s), 4) for s in steps],
            "long_factor": [round(float(1.08 + 63.76 * s * s), 4) for s in steps],
        },
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if a.model == "phimoe":
        scaling = dict(made["rope_scaling"])  # type: ignore[call-overload]
        mscales = dict.fromkeys(("short_mscale", "long_mscale"), 1.243163121016122)
        made |= {
            "architectures": ["PhiMoEForCausalLM"],
            "model_type": "phimoe",
            "num_local_experts": a.experts,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            "input_jitter_noise": 0.01,
            "rope_scaling": {**scaling, **mscales, "original_max_position_embeddings": 4096},
            "sliding_window": 131072,
            "attention_bias": True,
            "lm_head_bias": True,
        }
    return made


def pool(rng: np.random.Generator) -> np.ndarray:
    """bfloat16 values: normal, one in a thousand eight times as large."""
    values = rng.standard_normal(POOL, dtype=np.float32)
    values *= 0.02
    values[rng.integers(0, POOL, POOL // 1000)] *= 8
    return values.astype(ml_dtypes.bfloat16)


def write_shard(
    path: Path, members: list[tuple[str, tuple[int, ...]]], values: np.ndarray, rng: np.random.Generator, filled: int
) -> None:
    """A safetensors file: length of the header, the header, the tensors one after the other.

    Where the layers from `filled` on would have their matrices, the file has a hole, which takes no room on the disk.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in members:
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in members:
            left = int(np.prod(shape))
            if len(shape) == 1:  # norms, and biases
                vector = values[:left].astype(np.float32) + (0 if name.endswith(".bias") else 1)
                f.write(vector.astype(ml_dtypes.bfloat16).tobytes())
                continue
            layer = name.removeprefix("model.layers.").split(".")[0]
            if layer.isdecimal() and int(layer) >= filled:
                f.seek(2 * left, 1)
                continue
            while left:
                count = min(left, RUN)
                start = int(rng.integers(0, POOL - count + 1))
                f.write(values[start : start + count].view(np.uint8).data)
                left -= count
        f.truncate(8 + len(text) + offset)


def main() -> None:
    a = arguments()
    started = time.perf_counter()
    a.directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(a.seed)
    values = pool(rng)
    names = tensors(a)
    total = sum(int(np.prod(shape)) for _, shape in names)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(a.shards)]
    done = 0
    for name, shape in names:
        shards[min(done * a.shards // total, a.shards - 1)].append((name, shape))
        done += int(np.prod(shape))
    index: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = "model.safetensors" if a.shards == 1 else f"model-{number:05}-of-{a.shards:05}.safetensors"
        write_shard(a.directory / file, members, values, rng, a.layers if a.filled is None else a.filled)
        index.update({name: file for name, _ in members})
    if a.shards > 1:
        document = {"metadata": {"total_size": 2 * total}, "weight_map": index}
        (a.directory / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))
    (a.directory / "config.json").write_text(json.dumps(config(a), indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": [32007, 32001, 32000], "pad_token_id": 32000}
    (a.directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    for file in TOKENIZER:
        shutil.copy(BUNDLED / file, a.directory / file)
    seconds = time.perf_counter() - started
    print(f"{a.directory}: {total / 1e9:.3f} B parameters, {2 * total / 1e9:.2f} GB in {seconds:.0f} s")


if __name__ == "__main__":
    main()
