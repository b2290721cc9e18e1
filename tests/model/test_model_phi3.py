"""The recorded Program: its operations in order, its shapes, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from phiquant import arch
from phiquant.arch import Phi3Config
from phiquant.convert import convert
from phiquant.errors import KernelError
from phiquant.gguf import GGMLType, GGUFFile
from phiquant.kernels import ops
from phiquant.kernels.ops import Weight
from phiquant.model import load_weights, record

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


def made(config: Phi3Config) -> dict[str, Weight]:
    return {
        name: Weight(name, GGMLType.F32, shape, np.zeros(4 * int(np.prod(shape)), np.uint8))
        for name, shape in config.tensor_shapes()
    }


def config(**changes: object) -> Phi3Config:
    base = Phi3Config(
        name="test",
        vocab_size=100,
        context_length=1024,
        original_context_length=1024,
        embedding_length=64,
        feed_forward_length=96,
        block_count=2,
        head_count=4,
        head_count_kv=2,
        head_size=16,
        rope_dimension_count=12,
        rope_freq_base=10000.0,
        rms_epsilon=1e-5,
        sliding_window=0,
        rope_attention_factor=1.0,
        tied=False,
        rope_factors_short=None,
        rope_factors_long=None,
    )
    return replace(base, **changes)


def test_operations_in_order() -> None:
    block = ["RMSNorm", "MatMul", "RotateStore", "Attention", "MatMul", "RMSNorm", "MatMul", "SwiGLU", "MatMul"]
    program = record(config(), made(config()))
    assert program.hidden is vars(program.operations[-1])["x"], "what logits are made of"
    assert [type(o).__name__ for o in program.operations] == ["Embed", *block, *block, "Select", "RMSNorm", "MatMul"]
    assert [o.weight.name for o in program.operations if isinstance(o, ops.MatMul) and o.add] == [
        f"blk.{n}.{name}.weight" for n in range(2) for name in ("attn_output", "ffn_down")
    ]
    assert program.attention == ops.AttentionShape(4, 2, 16, 12, 0.25, 0)
    assert (program.layers, program.vocab_size, program.logits.rows) == (2, 100, "outputs")


def test_a_tied_model_uses_its_embedding_twice() -> None:
    for tied, name in ((True, "token_embd.weight"), (False, "output.weight")):
        last = record(config(tied=tied), made(config(tied=tied))).operations[-1]
        assert isinstance(last, ops.MatMul)
        assert last.weight.name == name


@pytest.mark.parametrize(("window", "expected"), [(0, 0), (100, 100), (1023, 1023), (1024, 0), (262144, 0)])
def test_a_window_counts_when_it_is_shorter_than_the_context(window: int, expected: int) -> None:
    c = config(sliding_window=window)
    assert record(c, made(c)).attention.window == expected


def test_a_weight_that_does_not_fit_is_named() -> None:
    weights = made(config())
    weights["blk.1.ffn_up.weight"] = weights["blk.0.ffn_down.weight"]
    with pytest.raises(KernelError, match="ffn_down"):
        record(config(), weights)


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "tiny.gguf", "bf16")
    with GGUFFile.open(tmp_path / "tiny.gguf") as gguf:
        found = arch.load(gguf)
        weights = load_weights(gguf, found)
        assert set(weights) == set(gguf.tensors)
        assert all(w.data.base is not None and not w.data.flags.writeable for w in weights.values())
        assert weights["token_embd.weight"].shape == (32064, 256)
        del weights
