"""The recorded Program of Phi-2: its operations in order, and that the fused projection gives the bits of the split."""

from dataclasses import replace

import numpy as np
import pytest

from phiquant.arch import Phi2Config
from phiquant.errors import KernelError
from phiquant.gguf import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.ops import Weight
from phiquant.kernels.reference import ReferenceBackend
from phiquant.model import Regime, Rope, record

CONFIG = Phi2Config(
    name="test",
    vocab_size=100,
    context_length=1024,
    embedding_length=64,
    feed_forward_length=96,
    block_count=2,
    head_count=4,
    head_count_kv=2,
    head_size=16,
    rope_dimension_count=6,
    rope_freq_base=10000.0,
    norm_epsilon=1e-5,
    fused=False,
)


def made(config: Phi2Config, seed: int = 3) -> dict[str, Weight]:
    rng = np.random.default_rng(seed)
    return {
        name: Weight(name, GGMLType.F32, shape, rng.normal(0, 0.3, shape).astype("<f4").reshape(-1).view(np.uint8))
        for name, shape in config.tensor_shapes()
    }


def test_operations_in_order() -> None:
    block = [
        *("LayerNorm", "MatMul", "MatMul", "MatMul", "RotateStore", "Attention", "MatMul"),
        *("MatMul", "GELU", "MatMul"),
    ]
    program = record(CONFIG, made(CONFIG))
    assert program.hidden is vars(program.operations[-1])["x"], "what logits are made of"
    assert [type(o).__name__ for o in program.operations] == ["Embed", *block, *block, "Select", "LayerNorm", "MatMul"]
    products = [o for o in program.operations if isinstance(o, ops.MatMul)]
    assert all(o.bias is not None and o.bias.name == o.weight.name.replace("weight", "bias") for o in products)
    added = [o.weight.name for o in products if o.add]
    assert added == [f"blk.{n}.{name}.weight" for n in range(2) for name in ("attn_output", "ffn_down")]
    assert program.attention == ops.AttentionShape(4, 2, 16, 6, 0.25, 0)
    assert (program.layers, program.vocab_size, program.logits.rows) == (2, 100, "outputs")


def test_one_norm_feeds_attention_and_network() -> None:
    program = record(CONFIG, made(CONFIG))
    normed = next(o.out for o in program.operations if isinstance(o, ops.LayerNorm))
    reads = {o.weight.name for o in program.operations if isinstance(o, ops.MatMul) and o.x is normed}
    parts = ("attn_q", "attn_k", "attn_v", "ffn_up")
    assert reads == {f"blk.{n}.{part}.weight" for n in range(2) for part in parts}


def logits(config: Phi2Config, weights: dict[str, Weight]) -> np.ndarray:
    executable = ReferenceBackend().prepare(record(config, weights), ops.Capacity(tokens=20))
    positions = np.arange(20, dtype=np.int32)
    cos, sin = Rope(config.rotary).rotation(positions, Regime.SHORT)
    step = ops.Step(
        positions * 3 % 100, positions, np.zeros(20, np.int32), np.zeros((1, 1), np.int32), cos, sin, positions
    )
    return executable.run(step)


def test_the_fused_projection_of_older_files_gives_the_same() -> None:
    split, fused = made(CONFIG), dict[str, Weight]()
    for name, shape in replace(CONFIG, fused=True).tensor_shapes():
        parts = [split[name.replace("attn_qkv", part)] for part in ("attn_q", "attn_k", "attn_v")]
        data = np.concatenate([part.data for part in parts]) if "qkv" in name else split[name].data
        fused[name] = Weight(name, GGMLType.F32, shape, data)
    expected = logits(CONFIG, split)
    assert expected.std() > 0.1
    assert np.array_equal(logits(replace(CONFIG, fused=True), fused), expected)


def test_a_bias_that_does_not_fit_is_named() -> None:
    weights = made(CONFIG)
    weights["blk.1.attn_k.bias"] = weights["blk.0.attn_q.bias"]
    with pytest.raises(KernelError, match="attn_k"):
        record(CONFIG, weights)
