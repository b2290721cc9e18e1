"""PhiMoE's recorded Program: its operations in order, what they write, and its meaning against plain NumPy."""

from dataclasses import replace

import numpy as np
import pytest

from phiquant.arch.phimoe import PhiMoEConfig
from phiquant.errors import KernelError
from phiquant.gguf import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.ops import Capacity, Step, Weight
from phiquant.kernels.reference import ReferenceBackend
from phiquant.model import Rope, record


def config(**changes: object) -> PhiMoEConfig:
    base = PhiMoEConfig(
        name="test",
        vocab_size=50,
        context_length=1024,
        original_context_length=8,
        embedding_length=48,
        feed_forward_length=20,
        block_count=2,
        head_count=4,
        head_count_kv=2,
        head_size=16,
        expert_count=5,
        rope_dimension_count=16,
        rope_freq_base=10000.0,
        norm_epsilon=1e-5,
        sliding_window=0,
        router_jitter=0.05,
        rope_attention_factor_short=1.25,
        rope_attention_factor_long=1.5,
        fused_qkv=False,
        attention_bias=True,
        output_bias=True,
        rope_factors_short=None,
        rope_factors_long=None,
    )
    return replace(base, **changes)


def made(config: PhiMoEConfig, seed: int = 3) -> dict[str, Weight]:
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in config.tensor_shapes():
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        found[name] = Weight(name, GGMLType.F32, shape, values.reshape(-1).view(np.uint8))
    return found


def test_operations_in_order() -> None:
    block = ["LayerNorm", *["MatMul"] * 3, "RotateStore", "Attention", "MatMul", "LayerNorm", "MatMul", "Route"]
    block += ["ExpertMatMul", "ExpertMatMul", "SwiGLU", "ExpertMatMul", "Combine"]
    program = record(config(), made(config()))
    assert program.hidden is vars(program.operations[-1])["x"], "what logits are made of"
    assert [type(o).__name__ for o in program.operations] == ["Embed", *block, *block, "Select", "LayerNorm", "MatMul"]
    assert program.attention == ops.AttentionShape(4, 2, 16, 16, 0.25, 0)
    assert (program.layers, program.vocab_size, program.logits.rows, program.routes) == (2, 50, "outputs", 2)
    (jitter,) = {o.jitter for o in program.operations if isinstance(o, ops.Route)}
    assert jitter == 0.05


@pytest.mark.parametrize("fused", [False, True])
def test_parts_of_a_row_are_written_into_their_place(fused: bool) -> None:
    c = config(fused_qkv=fused)
    program = record(c, made(c))
    written = {
        o.weight.name: (o.out.first, o.out.width)
        for o in program.operations
        if isinstance(o, ops.MatMul | ops.ExpertMatMul) and ".0." in o.weight.name
    }
    apart = {"attn_q": (0, 64), "attn_k": (64, 32), "attn_v": (96, 32)}
    expected = ({"attn_qkv": (0, 128)} if fused else apart) | {
        "attn_output": (0, 48),
        "ffn_gate_inp": (0, 5),
        "ffn_gate_exps": (0, 20),
        "ffn_up_exps": (20, 20),
        "ffn_down_exps": (0, 48),
    }
    assert written == {f"blk.0.{name}.weight": place for name, place in expected.items()}


@pytest.mark.parametrize("there", [True, False])
def test_every_bias_there_is_is_added(there: bool) -> None:
    c = config(attention_bias=there, output_bias=there)
    program = record(c, made(c))
    biased = {o.bias.name for o in program.operations if isinstance(o, ops.MatMul) and o.bias is not None}
    norms = {o.bias.name for o in program.operations if isinstance(o, ops.LayerNorm)}
    assert biased | norms == {name for name, _ in c.tensor_shapes() if name.endswith(".bias")}
    assert bool(biased) == there


@pytest.mark.parametrize(("window", "expected"), [(0, 0), (100, 100), (1023, 1023), (1024, 0), (131072, 0)])
def test_a_window_counts_when_it_is_shorter_than_the_context(window: int, expected: int) -> None:
    c = config(sliding_window=window)
    assert record(c, made(c)).attention.window == expected


def test_a_weight_that_does_not_fit_is_named() -> None:
    weights = made(config())
    weights["blk.1.ffn_up_exps.weight"] = weights["blk.0.ffn_down_exps.weight"]
    with pytest.raises(KernelError, match="ffn_down_exps"):
        record(config(), weights)


def run(c: PhiMoEConfig, weights: dict[str, Weight], ids: list[int], chunk: int) -> np.ndarray:
    executable = ReferenceBackend().prepare(record(c, weights), Capacity(pages=2, pages_per_sequence=2))
    rope, out = Rope(c.rotary), []
    for start in range(0, len(ids), chunk):
        tokens = np.array(ids[start : start + chunk], np.int32)
        positions = np.arange(start, start + len(tokens), dtype=np.int32)
        cos, sin = rope.rotation(positions, rope.regime(len(ids)))
        slots, pages = np.zeros(len(tokens), np.int32), np.arange(2, dtype=np.int32)[None]
        out.append(executable.run(Step(tokens, positions, slots, pages, cos, sin, np.arange(len(tokens), dtype="i4"))))
    executable.close()
    return np.concatenate(out)


IDS = np.random.default_rng(5).integers(0, 50, 20).tolist()


def test_fused_and_separate_projections_say_the_same() -> None:
    apart, fused = config(), config(fused_qkv=True)
    weights = made(apart)
    together = {n: w for n, w in weights.items() if n.split(".")[-2] not in ("attn_q", "attn_k", "attn_v")}
    for name, shape in fused.tensor_shapes():
        if "attn_qkv" in name:
            parts = [weights[name.replace("qkv", part)].data for part in "qkv"]
            together[name] = Weight(name, GGMLType.F32, shape, np.concatenate(parts))
    assert np.array_equal(run(apart, weights, IDS, 20), run(fused, together, IDS, 20))


def test_chunks_do_not_matter() -> None:
    c = config(rope_factors_short=(1.5,) * 8, rope_factors_long=(3.0,) * 8)
    weights = made(c)
    assert np.array_equal(run(c, weights, IDS, 20), run(c, weights, IDS, 3))


def test_the_long_factors_hold_for_the_whole_of_a_long_sequence() -> None:
    """Beyond the border a model with short factors and factor of attention equal to the long ones says the same."""
    c = config(rope_factors_short=(1.5,) * 8, rope_factors_long=(3.0,) * 8)
    long = config(rope_factors_short=(3.0,) * 8, rope_factors_long=(3.0,) * 8, rope_attention_factor_short=1.5)
    weights = made(c)
    assert np.array_equal(run(c, weights, IDS, 20), run(long, weights, IDS, 20))
    assert not np.allclose(run(c, weights, IDS[:8], 20), run(long, weights, IDS[:8], 20), atol=1e-3)
