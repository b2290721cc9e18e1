"""The recorded Program of a Llama: operations in order, the rotation of neighbours, split and fused projections."""

from dataclasses import replace

import numpy as np
import pytest

from phiquant.arch import LlamaConfig
from phiquant.errors import KernelError
from phiquant.gguf import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.ops import Weight
from phiquant.kernels.reference import ReferenceBackend
from phiquant.model import Regime, Rope, record

CONFIG = LlamaConfig(
    name="test",
    vocab_size=100,
    context_length=1024,
    original_context_length=1024,
    embedding_length=48,
    feed_forward_length=96,
    block_count=2,
    head_count=4,
    head_count_kv=2,
    head_size=16,
    rope_freq_base=10000.0,
    rms_epsilon=1e-5,
    sliding_window=0,
    rope_attention_factor=1.0,
    tied=False,
    fused=False,
    qkv_bias=False,
    output_bias=False,
    ffn_bias=False,
    rope_factors_short=None,
    rope_factors_long=None,
)
OPERATIONS = (ops.RotateStore, ops.Attention)
BIASED = replace(CONFIG, qkv_bias=True, output_bias=True, ffn_bias=True)


def made(config: LlamaConfig, seed: int = 3) -> dict[str, Weight]:
    rng = np.random.default_rng(seed)
    return {
        name: Weight(name, GGMLType.F32, shape, rng.normal(0, 0.3, shape).astype("<f4").reshape(-1).view(np.uint8))
        for name, shape in config.tensor_shapes()
    }


def logits(config: LlamaConfig, weights: dict[str, Weight]) -> np.ndarray:
    executable = ReferenceBackend().prepare(record(config, weights), ops.Capacity(tokens=20))
    positions = np.arange(20, dtype=np.int32)
    cos, sin = Rope(config.rotary).rotation(positions, Regime.SHORT)
    step = ops.Step(
        positions * 3 % 100, positions, np.zeros(20, np.int32), np.zeros((1, 1), np.int32), cos, sin, positions
    )
    return executable.run(step)


def test_operations_in_order() -> None:
    block = [
        *("RMSNorm", "MatMul", "MatMul", "MatMul", "RotateStore", "Attention", "MatMul"),
        *("RMSNorm", "MatMul", "MatMul", "SwiGLU", "MatMul"),
    ]
    program = record(CONFIG, made(CONFIG))
    assert program.hidden is vars(program.operations[-1])["x"], "what logits are made of"
    assert [type(o).__name__ for o in program.operations] == ["Embed", *block, *block, "Select", "RMSNorm", "MatMul"]
    assert all(o.bias is None for o in program.operations if isinstance(o, ops.MatMul))
    assert program.attention == ops.AttentionShape(4, 2, 16, 16, 0.25, 0, neighbours=True)


def test_biases_where_there_are_any() -> None:
    products = [o for o in record(BIASED, made(BIASED)).operations if isinstance(o, ops.MatMul)]
    assert [o.weight.name for o in products if o.bias is None] == ["output.weight"]


def test_a_tied_model_uses_its_embedding_twice() -> None:
    tied = replace(CONFIG, tied=True)
    last = record(tied, made(tied)).operations[-1]
    assert isinstance(last, ops.MatMul)
    assert last.weight.name == "token_embd.weight"


@pytest.mark.parametrize(("window", "expected"), [(0, 0), (100, 100), (1024, 0), (262144, 0)])
def test_a_window_counts_when_it_is_shorter_than_the_context(window: int, expected: int) -> None:
    c = replace(CONFIG, sliding_window=window)
    assert record(c, made(c)).attention.window == expected


def test_neighbouring_rows_are_rotated_together() -> None:
    """The attention scores of one head are those of complex numbers made of channels 2i and 2i + 1."""
    shape = replace(CONFIG, head_count=1, head_count_kv=1, embedding_length=16, block_count=1)
    weights = made(shape)
    program = record(shape, weights)
    rotate, attend = (next(o for o in program.operations if isinstance(o, kind)) for kind in OPERATIONS)
    cut = replace(program, operations=program.operations[: program.operations.index(attend) + 1], logits=attend.out)
    positions = np.arange(20, dtype=np.int32)
    cos, sin = Rope(shape.rotary).rotation(positions, Regime.SHORT)
    step = ops.Step(
        positions * 3 % 100, positions, np.zeros(20, np.int32), np.zeros((1, 1), np.int32), cos, sin, positions
    )
    attended = ReferenceBackend().prepare(cut, ops.Capacity(tokens=20, cache_type=GGMLType.F32)).run(step)

    assert rotate.layer == 0
    matrix = {name: w.data.view("<f4").reshape(w.shape).astype(np.float64) for name, w in weights.items()}
    x = matrix["token_embd.weight"][step.tokens]
    x /= np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5)
    q, k, v = (x * matrix["blk.0.attn_norm.weight"] @ matrix[f"blk.0.attn_{part}.weight"].T for part in "qkv")
    turn = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(8) / 8))
    q, k = ((y[:, 0::2] + 1j * y[:, 1::2]) * turn for y in (q, k))
    scores = np.where(np.tri(20, dtype=bool), (q @ np.conj(k).T).real / 4, -np.inf)
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    assert np.abs(attended - chances / chances.sum(axis=1, keepdims=True) @ v).max() < 1e-5


def test_the_fused_projection_gives_the_same() -> None:
    split, fused = made(BIASED), dict[str, Weight]()
    for name, shape in replace(BIASED, fused=True).tensor_shapes():
        parts = [split[name.replace("attn_qkv", part)] for part in ("attn_q", "attn_k", "attn_v")]
        data = np.concatenate([part.data for part in parts]) if "qkv" in name else split[name].data
        fused[name] = Weight(name, GGMLType.F32, shape, data)
    expected = logits(BIASED, split)
    assert expected.std() > 0.1
    assert np.array_equal(logits(replace(BIASED, fused=True), fused), expected)


def test_a_weight_that_does_not_fit_is_named() -> None:
    weights = made(CONFIG)
    weights["blk.1.ffn_gate.weight"] = weights["blk.0.ffn_down.weight"]
    with pytest.raises(KernelError, match="ffn_down"):
        record(CONFIG, weights)
