"""Plan files: written, read, edited; and whatever else a file may hold."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiquant.calibrate.candidates import READERS, Weighted, candidates, reader_types
from phiquant.calibrate.mix import Mix
from phiquant.calibrate.planfile import PlanFile
from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import OutputError, RequestError
from phiquant.gguf import GGMLType

KINDS = sorted(READERS["ours"])


def weight(name: str, columns: int = 256, *, importance: bool = True) -> Weighted:
    tensor = PlannedTensor(name, (8, columns), GGMLType.F32, GGMLType.Q4_0)
    return Weighted(tensor, importance)


WEIGHTS = [weight("token_embd.weight"), weight("blk.0.ffn_up.weight"), weight("blk.0.ffn_down.weight", 96)]
TYPES = dict(zip((w.tensor.name for w in WEIGHTS), (GGMLType.Q6_K, GGMLType.IQ2_XS, GGMLType.Q5_0), strict=True))
GOOD = PlanFile(Mix(TYPES, dict.fromkeys(TYPES, 0.5), 0.0123, 0.0127), "2.2GB", "calibration.txt").written(WEIGHTS)


@given(
    st.tuples(*(st.sampled_from(KINDS),) * 2, st.sampled_from([kind for kind in KINDS if kind.block_elements <= 32])),
    st.floats(0, 100) | st.none(),
    st.text(max_size=30),
    st.text(max_size=30),
)
def test_what_is_written_is_read(kinds: tuple[GGMLType, ...], predicted: float | None, budget: str, text: str) -> None:
    types = dict(zip(TYPES, kinds, strict=True))
    written = PlanFile(Mix(types, {}, predicted, None), budget, text).written(WEIGHTS)
    read = PlanFile.parse(written)
    assert read.mix.types == types
    assert (read.budget, read.text, read.mix.measured) == (budget, text, None)
    assert read.mix.predicted == (None if predicted is None else pytest.approx(predicted, rel=1e-6))


def test_a_file_of_it(tmp_path: Path) -> None:
    path = tmp_path / "mix.toml"
    PlanFile(Mix(TYPES, {}, 0.0123, 0.0127), "2.2GB", "calibration.txt").write(path, WEIGHTS)
    assert [*tmp_path.iterdir()] == [path]
    read = PlanFile.read(path)
    assert read.matching(WEIGHTS, ["output_norm.weight"]) == TYPES
    assert (read.budget, read.text, read.mix.predicted, read.mix.measured) == (
        "2.2GB",
        "calibration.txt",
        0.0123,
        0.0127,
    )
    with pytest.raises(OutputError, match="also an input"):
        PlanFile(Mix(TYPES)).write(path, WEIGHTS, [path])
    with pytest.raises(OutputError, match="not a directory"):
        PlanFile(Mix(TYPES)).write(tmp_path / "none" / "x.toml", WEIGHTS)


def test_figures_stand_beside_the_weights() -> None:
    assert '"token_embd.weight" = "Q6_K"  # 1,696 bytes, 5.00e-01 nats' in GOOD  # 8 rows of 210 bytes, padded
    assert "predicted = 1.230000e-02  # nats" in GOOD


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("version = 1", "version = 2", "version = 1"),
        ("version = 1", "", "version = 1"),
        ("version = 1", 'version = "1"', "version is '1' and must be a whole number"),
        ("version = 1", "version = true", "version is 'True' and must be a whole number"),
        ('budget = "2.2GB"', 'bugdet = "2.2GB"', "no setting 'bugdet', did you mean budget"),
        ('budget = "2.2GB"', "budget = 2", "budget is '2' and must be a text"),
        ('"Q6_K"', '"Q6K"', "'Q6K' is not a tensor type, did you mean Q6_K"),
        ('"Q6_K"', '"Q8_1"', "Weights are not stored as Q8_1"),
        ('"Q6_K"', "6", "the type of token_embd.weight is '6' and must be a name"),
        ('"Q6_K"', '{a = "Q6_K"}', "must be a name"),
        ("[types]", "[[types]]", "types is .* and must be a table"),
        ("[types]", "[[[", "Expected|Invalid|Cannot"),
        ("[types]", "[types.a]", "must be a name"),
        ("calibration.txt", "x" * 5000, "text is too long"),
        (GOOD, "", "version = 1"),
        (GOOD, "version = 1\n[types]\n", "no .types."),
    ],
)
def test_what_is_no_plan(tmp_path: Path, old: str, new: str, what: str) -> None:
    assert old in GOOD
    path = tmp_path / "mix.toml"
    path.write_text(GOOD.replace(old, new), "utf-8")
    with pytest.raises(RequestError, match=what) as caught:
        PlanFile.read(path)
    assert str(caught.value).startswith(f"--plan {path} is not a plan that can be used: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"\0" * 20, b"[" * 100_000, b'"' * 1000, b"#" * (1 << 24) + b"\n"])
def test_what_is_no_text(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "mix.toml"
    path.write_bytes(data)
    with pytest.raises(RequestError, match="not a plan that can be used"):
        PlanFile.read(path)
    with pytest.raises(RequestError, match="cannot be read"):
        PlanFile.read(tmp_path)
    with pytest.raises(RequestError, match="cannot be read"):
        PlanFile.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (
            "blk.0.ffn_up",
            "blk.0.fnn_up",
            "'blk.0.fnn_up.weight', and the model has no such weight, did you mean blk.0.ffn",
        ),
        ('"blk.0.ffn_up.weight"', '"output_norm.weight"', "type for output_norm.weight, which stays as it is"),
        ('"blk.0.ffn_up.weight"', "# ", "no type for blk.0.ffn_up.weight .1 of 3 weights are missing"),
        ('"Q5_0"', '"Q5_K"', "ffn_down.weight cannot be Q5_K: its rows of 96 .* blocks of 256; F16, .*IQ4_NL are poss"),
    ],
)
def test_what_does_not_fit_the_model(old: str, new: str, what: str) -> None:
    assert old in GOOD
    plan = PlanFile.parse(GOOD.replace(old, new))
    with pytest.raises(RequestError, match=what):
        plan.matching(WEIGHTS, ["output_norm.weight"])


def test_candidates_fit_shape_importance_and_reader() -> None:
    types = reader_types("llama.cpp")
    assert candidates(weight("blk.0.ffn_down.weight", 96), types) == [
        *(GGMLType.Q4_0, GGMLType.IQ4_NL, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0),
        *(GGMLType.F16, GGMLType.BF16, GGMLType.F32),
    ]
    blind = candidates(weight("blk.0.ffn_up.weight", importance=False), types)
    assert blind[0] is GGMLType.Q2_K
    assert not any(kind in blind for kind in (GGMLType.IQ1_S, GGMLType.IQ2_S, GGMLType.IQ3_XXS))
    assert candidates(weight("blk.0.ffn_up.weight"), types)[0] is GGMLType.IQ1_S
    stored = Weighted(PlannedTensor("output.weight", (8, 256), GGMLType.Q4_K, GGMLType.Q4_0), True)
    found = candidates(stored, types)
    assert found[-1] is GGMLType.Q4_K
    assert max(kind.bits_per_weight for kind in found) == 4.5
    assert types < READERS["ours"]
    assert reader_types("ours", [GGMLType.MXFP4]) == {GGMLType.MXFP4}
    with pytest.raises(RequestError, match="hold no MXFP4"):
        reader_types("llama.cpp", [GGMLType.MXFP4])
    with pytest.raises(RequestError, match="no reader 'ollama'; possible are llama"):
        reader_types("ollama")
