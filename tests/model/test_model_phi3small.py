"""The recorded Program of Phi-3-small: its operations in order, its scalings, which layers are sparse."""

from dataclasses import replace

import numpy as np
import pytest

from phiquant.arch import Phi3SmallConfig
from phiquant.errors import KernelError
from phiquant.gguf import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.ops import BlockSparse, Weight
from phiquant.model import record


def made(config: Phi3SmallConfig) -> dict[str, Weight]:
    rng = np.random.default_rng(0)
    return {
        name: Weight(
            name, GGMLType.F32, shape, rng.standard_normal(shape).astype(np.float32).reshape(-1).view(np.uint8)
        )
        for name, shape in config.tensor_shapes()
    }


def config(**changes: object) -> Phi3SmallConfig:
    base = Phi3SmallConfig(
        name="test",
        vocab_size=100,
        context_length=1024,
        original_context_length=1024,
        embedding_length=64,
        feed_forward_length=96,
        block_count=3,
        head_count=4,
        head_count_kv=2,
        head_size=16,
        rope_freq_base=1e6,
        norm_epsilon=1e-5,
        embedding_scale=10.0,
        attention_scale=1 / 16,
        logit_scale=1 / 8,
        gate_limit=20.0,
        sparse_layers=(True, False, True),
        sparse_block_size=64,
        sparse_local_blocks=16,
        sparse_vertical_stride=8,
        rope_factors_short=None,
        rope_factors_long=None,
        rope_attention_factor_short=1.0,
        rope_attention_factor_long=1.0,
    )
    return replace(base, **changes)


def test_operations_in_order() -> None:
    block = ["LayerNorm", "MatMul", "RotateStore", "Attention", "MatMul", "LayerNorm", "MatMul", "GeGELU", "MatMul"]
    program = record(config(), made(config()))
    assert program.hidden is vars(program.operations[-1])["x"], "what logits are made of"
    names = [type(o).__name__ for o in program.operations]
    assert names == ["Embed", *block, *block, *block, "Select", "LayerNorm", "MatMul"]
    products = [o for o in program.operations if isinstance(o, ops.MatMul)]
    assert [o.weight.name for o in products if o.add] == [
        f"blk.{n}.{name}.weight" for n in range(3) for name in ("attn_output", "ffn_down")
    ]
    for o in products[:-1]:
        assert o.bias is not None
        assert o.bias.name == o.weight.name.replace("weight", "bias")
    assert (products[-1].weight.name, products[-1].bias) == ("token_embd.weight", None)
    assert program.attention == ops.AttentionShape(4, 2, 16, 16, 1 / 16, 0)
    assert (program.layers, program.vocab_size, program.logits.rows) == (3, 100, "outputs")


def test_sparse_layers_have_the_pattern() -> None:
    found = [o.sparse for o in record(config(), made(config())).operations if isinstance(o, ops.Attention)]
    assert found == [BlockSparse(64, 16, 8), None, BlockSparse(64, 16, 8)]


def test_the_scale_of_the_logits_is_in_the_last_norm() -> None:
    weights = made(config())
    for scale in (1 / 8, 1 / 3):
        program = record(config(logit_scale=scale), weights)
        first, last = program.operations[0], program.operations[-2]
        assert isinstance(first, ops.Embed)
        assert first.scale == 10.0
        assert isinstance(last, ops.LayerNorm)
        for found, name in ((last.weight, "output_norm.weight"), (last.bias, "output_norm.bias")):
            expected = weights[name].data.view(np.float32) * np.float32(scale)
            assert (found.data.view(np.float32) == expected).all()
            assert found.name == name


def test_a_bias_that_does_not_fit_is_named() -> None:
    weights = made(config())
    weights["blk.1.ffn_up.bias"] = weights["blk.0.ffn_down.bias"]
    with pytest.raises(KernelError, match=r"blk\.1\.ffn_up"):
        record(config(), weights)
