"""Error feedback over a model: what each matrix is rounded for, statistics in files, and runs that were interrupted."""

import base64
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from phiquant import arch
from phiquant.calibrate import Feedback, MomentsFile, Search, collect, rounding
from phiquant.calibrate.chunks import Chunks
from phiquant.calibrate.curvature import Curvature
from phiquant.calibrate.saved_stream import SavedStream
from phiquant.calibrate.shortfall import DAMPING
from phiquant.calibrate.stages import Stages
from phiquant.convert import Options, TypePattern, convert, quantize, weighing
from phiquant.convert.filetypes import parse_file_type
from phiquant.convert.output import Output
from phiquant.convert.plan import Plan, plan_quantize
from phiquant.convert.recipes import PlannedTensor
from phiquant.convert.run import execute
from phiquant.convert.source import open_source
from phiquant.convert.weighing import Calibrated
from phiquant.errors import ImportanceError, OutputError, RequestError, UnsupportedError, WeightsError
from phiquant.gguf import GGMLType, GGUFFile
from phiquant.kernels.feedback import SUPPORTED, factorize, feedback_rows
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record
from phiquant.quants import dequantize
from phiquant.text import Tokenizer, TokenType

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "models" / "phi3-tiny"
TOKENS = 1024
FEW = Search(curvature_tokens=512)


@pytest.fixture(scope="module")
def text() -> str:
    return (MODEL / "calibration.txt").read_text("utf-8")[:8000]


@pytest.fixture(scope="module")
def short(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three blocks of the bundled model."""
    path = tmp_path_factory.mktemp("short") / "short-F32.gguf"
    quantize(tiny, path, "COPY", prune=range(3, 8), quiet=True)
    return path


class Stopper:
    """Raises when so many tensors are written."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.told: list[tuple[str, float]] = []

    def planned(self, plan: Plan) -> None:
        pass

    def preparing(self, what: str, share: float) -> None:
        self.told.append((what, share))

    def resumed(self, source_bytes: int) -> None:
        pass

    def advanced(self, source_bytes: int, tensor: str) -> None:
        self.left -= not tensor.startswith(("token_embd", "output")) and "norm" not in tensor
        if self.left == 0:
            raise KeyboardInterrupt


def rounded(
    model: Path,
    out: Path,
    kind: str,
    text: str = "",
    *,
    statistics: Path | None = None,
    options: Options | None = None,
    prune: tuple[int, ...] = (),
    exclude: tuple[str, ...] = (),
    progress: Stopper | None = None,
    resume: bool = False,
    search: Search = FEW,
) -> Plan:
    """`out`, made by error feedback."""
    file = None if statistics is None else MomentsFile.open(statistics)
    with (
        open_source(model) as source,
        Feedback(model, text, dataset="text", tokens=TOKENS, search=search, statistics=file, threads=2) as made,
    ):
        calibrated = Calibrated("text", made.entries, exclude=exclude, remarks=made.remarks, embedding=made.embedding)
        plan = plan_quantize(
            source, parse_file_type(kind), out, options or Options(), calibrated=calibrated, prune=prune
        )
        report = execute(plan, threads=2, maker=made, progress=progress, resume=resume)
    if file is not None:
        file.close()
    return report.plan


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(short: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "x.gguf"
    rounded(short, path, "Q4_K_M", text)
    return path


def normed(embedding: np.ndarray, ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
    rows = embedding[ids].astype(np.float64)
    return rows / np.sqrt((rows * rows).mean(axis=-1, keepdims=True) + 1e-5) * weight


def embedding_costs(model: GGUFFile, text: str) -> np.ndarray:
    """Moments of what errors of the embedding's rows cost."""
    config = arch.load(model)
    cut = Stages.of(record(config, load_weights(model, config)), lambda name: False)
    chunks = Chunks.of(text, Tokenizer.from_gguf(model), "text", tokens=TOKENS)
    return Curvature.of(cut, chunks, Rope(config.rotary), select("cpu", None), tokens=TOKENS).moments(0).of(0)


def test_the_first_matrix_makes_up_for_the_rounded_embedding(short: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    rounded(short, path, "Q4_K_M", text, search=Search(curvature_tokens=0))
    with GGUFFile.open(short) as model, GGUFFile.open(path) as file:
        chunks = Chunks.of(text, Tokenizer.from_gguf(model), "text", tokens=TOKENS)
        read = [
            normed(dequantize(source.data(info.name), info.type, info.shape), chunks.ids, norm).reshape(2, 512, -1)
            for norm in [model.data("blk.0.attn_norm.weight").view(np.float32)]
            for source, info in ((s, s.tensors["token_embd.weight"]) for s in (file, model))
        ]
        name = "blk.0.attn_qkv.weight"
        weight = model.data(name).view(np.float32).reshape(model.tensors[name].shape)
        squares = [x.T @ x for x in read[0]]
        asked = [weight @ ((y - x).T @ x) for x, y in zip(*read, strict=True)]

        def change(moments: np.ndarray, product: np.ndarray) -> np.ndarray:
            return product @ np.linalg.inv(moments + np.eye(len(moments)) * DAMPING * np.diagonal(moments).mean())

        some = np.linspace(0, len(weight) - 1, 256).astype(int)
        each = [change(sum(squares), g)[some] for g in asked]
        found = sum((each[i] * asked[1 - i][some]).sum() for i in (0, 1))
        held = found / sum((part @ sum(squares) * part).sum() for part in each)
        share = 2 * held / (1 + held)
        assert 0.1 < share < 1
        target = weight + share * change(sum(squares), sum(asked))
        expected = feedback_rows(target.astype(np.float32), file.tensors[name].type, factorize(sum(squares)))
        assert (file.data(name).reshape(expected.shape) == expected).mean() > 0.99  # sums of another precision
        assert file.require("phiquant.quantize.method", str) == "feedback"
        assert file.require("phiquant.quantize.tokens", int) == TOKENS
        assert file.require("phiquant.quantize.dataset_hash", str) == chunks.digest
        assert "quantize.imatrix.file" not in file.fields


def test_what_is_made_has_the_types_of_the_recipe_and_is_nearer_for_the_text(
    short: Path, text: str, whole: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.gguf"
    quantize(short, plain, "Q4_K_M", quiet=True)
    with GGUFFile.open(plain) as before, GGUFFile.open(whole) as after, GGUFFile.open(short) as model:
        assert {n: t.type for n, t in before.tensors.items()} == {n: t.type for n, t in after.tensors.items()}
        changed = {n for n in before.tensors if not np.array_equal(before.data(n), after.data(n))}
        assert changed == {n for n, t in model.tensors.items() if len(t.shape) > 1}  # the embedding is the output too


def test_an_embedding_that_is_the_output_too_is_nearer_as_output_and_still_near_as_embedding(
    short: Path, text: str, whole: Path, tmp_path: Path
) -> None:
    plain, path, name = tmp_path / "plain.gguf", tmp_path / "statistics.gguf", "token_embd.weight"
    quantize(short, plain, "Q4_K_M", quiet=True)
    with Feedback(short, text, dataset="text", tokens=TOKENS, threads=2) as made:
        made.collect(path)
    with MomentsFile.open(path) as statistics, GGUFFile.open(short) as model:
        width = model.tensors[name].shape[1]
        weights = [statistics.moments(name, 1, width).of(0), embedding_costs(model, text)]
        wanted = model.data(name).view(np.float32).reshape(-1, width)
        lost = []
        for made_file in (plain, whole):
            with GGUFFile.open(made_file) as file:
                info = file.tensors[name]
                errors = dequantize(file.data(name), info.type, info.shape) - wanted
            lost.append([float(np.einsum("ri,ij,rj->", errors, w, errors, optimize=True)) for w in weights])
    (output, embedding), (better, near) = lost
    assert better < 0.8 * output
    assert near < 0.8 * embedding
    rounded(short, tmp_path / "alone.gguf", "Q4_K_M", text, exclude=("blk",))
    with GGUFFile.open(tmp_path / "alone.gguf") as alone, GGUFFile.open(whole) as file, GGUFFile.open(plain) as other:
        assert np.array_equal(alone.data(name), file.data(name))
        assert np.array_equal(alone.data("blk.0.attn_qkv.weight"), other.data("blk.0.attn_qkv.weight"))
    rounded(short, tmp_path / "kept.gguf", "Q4_K_M", text, options=Options(token_embedding_type=GGMLType.F16))
    with GGUFFile.open(tmp_path / "kept.gguf") as file:
        assert file.tensors[name].type is GGMLType.F16


@pytest.mark.parametrize("seed", range(3))
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    short: Path, text: str, whole: Path, tmp_path: Path, seed: int
) -> None:
    chance, path = random.Random(seed), tmp_path / "x.gguf"
    for after in (chance.randrange(1, 5), chance.randrange(1, 4)):
        with pytest.raises(KeyboardInterrupt):
            rounded(short, path, "Q4_K_M", text, resume=True, progress=Stopper(after))
        assert set(names(tmp_path)) <= {".x.gguf.part", ".x.gguf.part.json", ".x.gguf.part.stream"}
    assert ".x.gguf.part.stream" in names(tmp_path) or after + seed < 9
    plan = rounded(short, path, "Q4_K_M", text, resume=True)
    assert any("done by an earlier run" in note for note in plan.notes)
    assert names(tmp_path) == ["x.gguf"]
    assert path.read_bytes() == whole.read_bytes()


def test_blocks_that_are_done_are_not_read_again(
    short: Path, text: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(KeyboardInterrupt):
        rounded(short, path, "Q4_K_M", text, resume=True, progress=Stopper(9))  # the first matrix of the third block
    saved = tmp_path / ".x.gguf.part.stream"
    assert saved.stat().st_size > TOKENS * 256 * 4
    written: list[str] = []
    write = Output.write_whole

    def spy(self: Output, tensor: PlannedTensor, data: np.ndarray) -> None:
        written.append(tensor.name)
        write(self, tensor, data)

    monkeypatch.setattr(Output, "write_whole", spy)
    rounded(short, path, "Q4_K_M", text, resume=True)
    assert written
    assert all(name.startswith("blk.2.") for name in written)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "other"])
def test_a_damaged_stream_is_computed_again(short: Path, text: str, whole: Path, tmp_path: Path, damage: str) -> None:
    path, saved = tmp_path / "x.gguf", tmp_path / ".x.gguf.part.stream"
    with pytest.raises(KeyboardInterrupt):
        rounded(short, path, "Q4_K_M", text, resume=True, progress=Stopper(9))
    data = bytearray(saved.read_bytes())
    if damage == "cut":
        saved.write_bytes(data[:-1])
    elif damage == "flipped":
        data[-5] ^= 1
        saved.write_bytes(data)
    elif damage == "gone":
        saved.unlink()
    else:
        saved.write_bytes(data.replace(b'"plan": "', b'"plan": "0', 1))
    rounded(short, path, "Q4_K_M", text, resume=True)
    assert path.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["x.gguf"]


def test_a_stream_that_has_no_place_is_one_sentence(tmp_path: Path) -> None:
    saved = SavedStream(tmp_path / "x.gguf", "plan")
    saved.path.with_name(f"{saved.path.name}.new").mkdir()
    with pytest.raises(OutputError, match="go without --resume"):
        saved.write(1, np.zeros((2, 3), np.float32))


def test_blocks_can_be_left_out(tiny: Path, short: Path, text: str, tmp_path: Path) -> None:
    path, pure = tmp_path / "x.gguf", Options(pure=True)  # mixtures count the blocks that were there
    rounded(tiny, path, "Q4_K_S", text, prune=tuple(range(3, 8)), options=pure)
    rounded(short, tmp_path / "short.gguf", "Q4_K_S", text, options=pure)
    with GGUFFile.open(path) as pruned, GGUFFile.open(tmp_path / "short.gguf") as expected:
        assert {n: t.type for n, t in pruned.tensors.items()} == {n: t.type for n, t in expected.tensors.items()}
        assert [n for n in expected.tensors if not np.array_equal(pruned.data(n), expected.data(n))] == []


def test_types_without_feedback_are_weighed_or_rounded_plainly(
    short: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rounding, weighing):
        monkeypatch.setattr(module, "SUPPORTED", SUPPORTED - {GGMLType.IQ2_XXS})
    options = Options(tensor_types=(TypePattern.parse("ffn_up=iq2_xxs"), TypePattern.parse("ffn_down=tq2_0")))
    plan = rounded(short, tmp_path / "x.gguf", "Q4_K_M", text, options=options)
    notes = "\n".join(plan.notes)
    assert "3 weights become IQ2_XXS, which is not made by error feedback: they are weighed by importance" in notes
    assert "3 weights become TQ2_0, which is not made by error feedback: they are rounded as without" in notes
    kept = Options(token_embedding_type=GGMLType.F16)  # it is the output too
    with open_source(short) as source, pytest.raises(RequestError, match="no weight of this file would be rounded"):
        plan_quantize(source, parse_file_type("TQ2_0"), tmp_path / "y.gguf", kept, calibrated=Calibrated("t", []))


def test_statistics_are_collected_once_for_several_types(short: Path, text: str, tmp_path: Path) -> None:
    path, told = tmp_path / "statistics.gguf", []
    with Feedback(short, text, dataset="text", tokens=TOKENS, threads=2) as model:
        model.collect(path, lambda done, total: told.append((done, total)))
    steps, total = len(told), TOKENS * (2 * 3 + 1)  # two stages a block; the embedding is the output too
    assert (steps, told[-1]) == (2 * 3 + 1, (total, total))
    plan = rounded(short, tmp_path / "a.gguf", "Q4_K_M", statistics=path)
    assert any("no text is read" in note for note in plan.notes)
    rounded(short, tmp_path / "b.gguf", "Q4_K_M", statistics=path)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    rounded(short, tmp_path / "c.gguf", "Q3_K_S", statistics=path)
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.require("phiquant.quantize.statistics", str) == str(path)[:127]
        assert file.require("phiquant.quantize.tokens", int) == TOKENS

    # Their diagonals are what an importance matrix of the same text holds.
    expected = collect(short, text, chunks=2, dataset="text", threads=2)
    with MomentsFile.open(path) as file:
        found = file.matrix()
        assert file.moments("token_embd.weight", 1, 256).counts.tolist() == [TOKENS]
    assert found.entries.keys() == expected.entries.keys()
    assert (found.chunk_count, found.chunk_size, found.datasets) == (2, 512, ("text",))
    for name, entry in expected.entries.items():
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-4)
        assert found.entries[name].counts.tolist() == entry.counts.tolist()


def test_statistics_of_another_model_are_refused(short: Path, tiny: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "statistics.gguf"
    with Feedback(short, text, dataset="text", tokens=TOKENS, threads=2) as model:
        model.collect(path)
    with pytest.raises(ImportanceError, match="statistics of another model"):
        rounded(tiny, tmp_path / "x.gguf", "Q4_K_M", statistics=path)
    # The same model in another type has the same statistics.
    quantize(short, tmp_path / "half.gguf", "F16", quiet=True)
    rounded(tmp_path / "half.gguf", tmp_path / "x.gguf", "Q4_K_M", statistics=path)
    collect(short, text, chunks=2, threads=2).write_gguf(tmp_path / "imatrix.gguf")
    for other in ("half.gguf", "imatrix.gguf", "no.gguf"):
        with pytest.raises(ImportanceError, match="file of another kind"):
            MomentsFile.open(tmp_path / other)
    assert "statistics.gguf" in names(tmp_path)


def test_a_damaged_file_of_statistics_is_refused(short: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "statistics.gguf"
    with Feedback(short, text, dataset="text", tokens=TOKENS, threads=2) as model:
        model.collect(path)
    with GGUFFile.open(path) as file:
        (first,) = [n for n in file.tensors if n == "blk.0.attn_qkv.weight.moments"]
        values = file.data(first).view(np.float32)
        place = path.read_bytes().find(values[:8].tobytes())
    data = bytearray(path.read_bytes())
    data[place + 4 : place + 8] = np.array([np.nan], "<f4").tobytes()
    path.write_bytes(data)
    with pytest.raises(ImportanceError, match=r"blk\.0\.attn_qkv\.weight holds what is no moment"):
        rounded(short, tmp_path / "x.gguf", "Q4_K_M", statistics=path)
    assert names(tmp_path) == ["statistics.gguf"]


def test_weights_that_are_no_numbers_are_refused_and_leave_nothing(short: Path, text: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    data = bytearray(short.read_bytes())
    with GGUFFile.open(short) as file:
        place = data.find(file.data("blk.1.ffn_up.weight")[:64].tobytes())
    data[place : place + 4] = np.array([np.inf], "<f4").tobytes()
    broken.write_bytes(data)
    with pytest.raises(WeightsError, match=r"inputs of blk\.2\.attn_qkv\.weight are not finite"):
        rounded(broken, tmp_path / "x.gguf", "Q4_K_M", text, resume=True)
    assert names(tmp_path) == ["broken.gguf"]


def test_texts_that_a_model_cannot_learn_from(short: Path, text: str) -> None:
    with GGUFFile.open(short) as file:
        tokenizer = Tokenizer.from_gguf(file)
    with pytest.raises(RequestError, match=r"has \d+ tokens and must have at least 1024"):
        Chunks.of(text[:500], tokenizer, "t")
    with pytest.raises(RequestError, match="too short: it needs at least 1024"):
        Chunks.of(text, tokenizer, "t", tokens=600)
    signs = "".join(chr(random.Random(i).randrange(0x1400, 0x1600)) for i in range(3000))
    with pytest.raises(RequestError, match="vocabulary does not know this text"):
        Chunks.of(signs, tokenizer, "t")
    assert Chunks.of(text, tokenizer, "t").remarks == ()
    noise = "".join(f"{base64.b64encode(random.Random(i).randbytes(9)).decode()} and then " for i in range(400))
    (remark,) = Chunks.of(noise, tokenizer, "t").remarks
    assert "tokens for each byte" in remark
    cut = Chunks.of(text, tokenizer, "t", tokens=1300)
    assert cut.ids.shape == (2, 512)
    assert (cut.ids[:, 0] == tokenizer.bos_id).all() == tokenizer.add_bos
    assert cut.digest != Chunks.of(text[40:], tokenizer, "t", tokens=1300).digest


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of random weights, with an output of its own."""
    folder = tmp_path_factory.mktemp("mixture")
    script = MODEL.parents[1] / "benchmarks" / "make_synthetic.py"
    shape = ["--layers", "1", "--hidden", "256", "--ffn", "256", "--heads", "4", "--kv-heads", "2", "--experts", "8"]
    subprocess.run([sys.executable, str(script), str(folder / "checkpoint"), "--model", "phimoe", *shape], check=True)
    convert(folder / "checkpoint", folder / "moe-F16.gguf", "f16", quiet=True)
    return folder / "moe-F16.gguf"


def test_experts_are_rounded_each_by_its_own_tokens(mixture: Path, text: str, tmp_path: Path) -> None:
    """A mixture of which some experts are used by few of the 1024 tokens: all come out near what they were."""
    rounded(mixture, tmp_path / "x.gguf", "Q4_K_M", text)
    with GGUFFile.open(mixture) as before, GGUFFile.open(tmp_path / "x.gguf") as after:
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            info, made = before.tensors[f"blk.0.{name}.weight"], after.tensors[f"blk.0.{name}.weight"]
            assert made.type.is_quantized
            values = dequantize(before.data(info.name), info.type, info.shape)
            errors = dequantize(after.data(made.name), made.type, made.shape) - values
            shares = np.sqrt((errors**2).mean(axis=(1, 2)) / (values**2).mean(axis=(1, 2)))
            assert len(shares) == 8
            assert (shares < 0.15).all()


def test_an_embedding_is_rounded_for_what_its_errors_cost(mixture: Path, text: str, tmp_path: Path) -> None:
    plain, made, name = tmp_path / "plain.gguf", tmp_path / "made.gguf", "token_embd.weight"
    quantize(mixture, plain, "Q4_K_M", quiet=True)
    rounded(mixture, made, "Q4_K_M", text)
    with GGUFFile.open(mixture) as model:
        costs = embedding_costs(model, text)
        wanted = dequantize(model.data(name), model.tensors[name].type, model.tensors[name].shape)
        found = []
        for path in (plain, made):
            with GGUFFile.open(path) as file:
                info = file.tensors[name]
                assert info.type is GGMLType.Q4_K
                errors = dequantize(file.data(name), info.type, info.shape) - wanted
            found.append(np.einsum("ri,ij,rj->", errors, costs, errors, optimize=True) / len(errors))
    assert found[1] < 0.7 * found[0]


def test_an_embedding_is_rounded_plainly_where_that_is_not_known(mixture: Path, text: str, tmp_path: Path) -> None:
    plain, name = tmp_path / "plain.gguf", "token_embd.weight"
    quantize(mixture, plain, "Q4_K_M", quiet=True)
    with Feedback(mixture, text, dataset="text", tokens=TOKENS, threads=2) as model:
        model.collect(tmp_path / "statistics.gguf")
    rounded(mixture, tmp_path / "none.gguf", "Q4_K_M", text, search=Search(curvature_tokens=0))
    rounded(mixture, tmp_path / "known.gguf", "Q4_K_M", statistics=tmp_path / "statistics.gguf")
    with GGUFFile.open(plain) as expected:
        for path in ("none.gguf", "known.gguf"):
            with GGUFFile.open(tmp_path / path) as file:
                assert np.array_equal(file.data(name), expected.data(name))
                assert not np.array_equal(file.data("output.weight"), expected.data("output.weight"))
    # Planned all the same, which the plan's maker sees.
    with (
        open_source(mixture) as source,
        Feedback(mixture, text, dataset="text", tokens=TOKENS, search=Search(curvature_tokens=0)) as made,
    ):
        plan = plan_quantize(
            source, parse_file_type("Q4_K_M"), tmp_path / "x.gguf", Options(), calibrated=Calibrated("t", made.entries)
        )
        with pytest.raises(UnsupportedError, match=r"not known what errors of token_embd\.weight cost"):
            execute(plan, threads=2, maker=made)
    assert not (tmp_path / "x.gguf").exists()


def test_what_is_asked_of_the_search_changes_the_bytes_and_is_recorded(short: Path, text: str, tmp_path: Path) -> None:
    path, one, bytes = tmp_path / "x.gguf", tmp_path / "one.gguf", set()
    quantize(short, one, "COPY", prune=(1, 2), quiet=True)
    others = [
        Search(curvature_tokens=1024),
        Search(damping=0.3),
        Search(by_activation=False),
        Search(rounds=0, sweeps=0),
        Search(curvature_tokens=512),
    ]
    for search in others:
        rounded(one, path, "Q4_K_S", text, search=search)
        with GGUFFile.open(path) as file:
            assert file.require("phiquant.quantize.search", str) == str(search.settled(1))
            bytes.add(b"".join(file.data(name).tobytes() for name in file.tensors))
    assert len(bytes) == len(others)
    # A run that was left cannot be gone on with otherwise.
    with pytest.raises(KeyboardInterrupt):
        rounded(short, path, "Q4_K_M", text, resume=True, progress=Stopper(4))
    plan = rounded(short, path, "Q4_K_M", text, resume=True, search=Search(sweeps=0))
    assert any("other options, so this one starts anew" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"damping": 0.0}, "damping of 0 was asked for"),
        ({"damping": float("nan")}, "damping of nan"),
        ({"drawn": 0.7}, "0.7 of the text was to be drawn"),
        ({"rounds": -1}, "-1 rounds were asked for"),
        ({"curvature_tokens": -5}, "-5 tokens were asked for"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(wrong: dict[str, float], what: str) -> None:
    with pytest.raises(RequestError, match=what):
        Search(**wrong)  # type: ignore[arg-type]


def test_progress_is_told_before_anything_is_rounded(short: Path, text: str, tmp_path: Path) -> None:
    progress = Stopper(1 << 30)
    rounded(short, tmp_path / "x.gguf", "Q4_K_S", text, progress=progress)
    assert {what for what, _ in progress.told} == {"derivatives"}
    shares = [share for _, share in progress.told]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1


def test_some_chunks_are_drawn_at_random(short: Path, text: str) -> None:
    with GGUFFile.open(short) as file:
        tokenizer = Tokenizer.from_gguf(file)
    whole = Chunks.of(text * 4, tokenizer, "t", tokens=12 * 512)
    mixed = whole.with_drawn(tokenizer, 1 / 3)
    drawn = [i for i in range(12) if not np.array_equal(mixed.ids[i], whole.ids[i])]
    assert len(drawn) == 4
    assert {i % 2 for i in drawn} == {0, 1}, "both halves of the text have some"
    ids = mixed.ids[drawn][:, int(tokenizer.add_bos) :]
    assert (tokenizer.vocabulary.types[ids] == TokenType.NORMAL).all()
    unseen = ~np.isin(ids, whole.ids)
    assert 0.2 < unseen.mean() < 0.3
    assert mixed.digest != whole.digest
    assert np.array_equal(mixed.ids, whole.with_drawn(tokenizer, 1 / 3).ids)
    assert np.array_equal(whole.with_drawn(tokenizer, 0).ids, whole.ids)
    assert np.array_equal(Chunks(whole.ids[:2], "t").with_drawn(tokenizer, 1 / 3).ids, whole.ids[:2])
    part = Chunks(whole.ids[[0, 0, 0]], "t")
    alone, of_all = (part.with_drawn(tokenizer, 1 / 3, of=of).ids[2, 1:] for of in (None, whole))
    elsewhere = np.setdiff1d(whole.ids, part.ids)
    assert np.isin(alone, elsewhere).mean() < 0.1
    assert np.isin(of_all, elsewhere).mean() > 0.2, "of the words that other chunks have"
    marks = SimpleNamespace(
        add_bos=False, bos_id=None, vocabulary=SimpleNamespace(types=np.full(32064, TokenType.CONTROL))
    )
    assert whole.with_drawn(marks, 1 / 3) is whole, "there are no words to draw"  # type: ignore[arg-type]


def test_derivatives_are_of_more_tokens_where_they_cost_little(short: Path, text: str) -> None:
    assert Search().settled(50_000_000).curvature_tokens == 8192
    assert "curvature of 8192 tokens" in str(Search().settled(50_000_000))
    assert "None" not in str(Search())
    assert Search().settled(3_800_000_000).curvature_tokens == 2048
    assert Search(curvature_tokens=0).settled(50_000_000).curvature_tokens == 0
    with Feedback(short, text, dataset="text", tokens=TOKENS) as model:
        search = next(entry.value for entry in model.entries if entry.key == "phiquant.quantize.search")
    assert "curvature of 8192 tokens" in str(search)
