"""`phiquant quantize --budget` and `--plan`, on the bundled model with a short text."""

import math
import re
import tomllib
from pathlib import Path

import pytest

from phiquant import LLM
from phiquant.cli.app import run
from phiquant.cli.commands.options import MIX_TOKENS
from phiquant.cli.mixes import DEFAULT_TOKENS
from phiquant.convert import convert
from phiquant.gguf import GGMLType, GGUFFile, keys, open_model

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
FEW = ["--sensitivity-tokens", "128", "-q", "--no-measure"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "text.txt"
    path.write_text((TINY / "calibration.txt").read_text("utf-8")[:6000], "utf-8")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "tiny-BF16.gguf"
    convert(TINY, path, "auto", quiet=True)
    return path


def types_of(path: Path) -> dict[str, GGMLType]:
    with GGUFFile.open(path) as file:
        return {name: tensor.type for name, tensor in file.tensors.items() if "norm" not in name}


@pytest.mark.cpu
def test_a_checkpoint_for_a_size_and_again_from_the_plan(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--calibrate", str(short), "--method", "imatrix", *FEW]
    assert run(["quantize", "--budget", "8MB", "--save-plan", "mix.toml", *common, str(TINY), "mix.gguf"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix.gguf", "mix.toml"]
    size = Path("mix.gguf").stat().st_size
    assert 0.999 * 8e6 < size <= 8e6
    written = tomllib.loads(Path("mix.toml").read_text("utf-8"))
    types = types_of(Path("mix.gguf"))
    assert {name: kind.name for name, kind in types.items()} == written["types"]
    assert len(set(types.values())) > 2
    with GGUFFile.open("mix.gguf") as file:
        assert file.require(keys.MIX_BUDGET, str) == written["budget"] == "8MB"
        assert file.require(keys.MIX_TEXT, str) == str(short)
        predicted, measured = (file.require(key, float) for key in (keys.MIX_PREDICTED, keys.MIX_MEASURED))
        assert predicted == pytest.approx(written["predicted"], rel=1e-6)
        assert measured == pytest.approx(written["measured"], rel=1e-6)
        assert 0.5 < predicted / measured < 1.5
    with LLM.load("mix.gguf", context=64) as llm:
        assert llm.generate("Once upon a time", max_tokens=4).text

    read = ["--calibrate", str(short), "-q", "--no-measure"]
    again = ["quantize", "--plan", "mix.toml", "--method", "imatrix", *read, str(TINY)]
    assert run([*again, "again.gguf"]) == 0
    assert run(["verify", "again.gguf", "-q"]) == 0
    with GGUFFile.open("mix.gguf") as one, GGUFFile.open("again.gguf") as two:
        assert list(one.tensors) == list(two.tensors)
        assert all((one.data(name) == two.data(name)).all() for name in one.tensors)
        assert keys.MIX_MEASURED not in two.fields, "whoever edits a plan has not measured it"

    text = Path("mix.toml").read_text("utf-8")
    kind = types["blk.3.ffn_down.weight"].name
    edited = text.replace(f'"blk.3.ffn_down.weight" = "{kind}"', '"blk.3.ffn_down.weight" = "q8_0"')
    assert edited != text
    Path("mine.toml").write_text(edited, "utf-8")
    assert run(["quantize", "--plan", "mine.toml", *read, str(TINY)]) == 0
    (named,) = tmp_path.glob("*-mine.gguf")
    with GGUFFile.open(named) as file:
        assert file.require(keys.QUANTIZE_METHOD, str) == "feedback"
    assert types_of(named) == {**types, "blk.3.ffn_down.weight": GGMLType.Q8_0}
    capsys.readouterr()
    Path("mine.toml").write_text(text.replace("blk.3.ffn_down", "blk.33.ffn_down"), "utf-8")
    assert run(["quantize", "--plan", "mine.toml", "-q", str(TINY), "no.gguf"]) == 1
    error = capsys.readouterr().err
    assert "has a type for 'blk.33.ffn_down.weight', and the model has no such weight, did you mean blk." in error
    assert not Path("no.gguf").exists()


@pytest.mark.cpu
def test_a_file_in_bits_per_weight_with_what_the_user_fixes(
    short: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fixed = ["--token-embedding-type", "iq4_xs", "--tensor-type", "blk.7.ffn_down=q6_k"]
    options = ["--mix-types", "q2_k,q3_k,q4_k,q5_k", "--split-max-tensors", "20", *fixed]
    common = ["quantize", "--budget", "4.25bpw", "--calibrate", str(short), *FEW, *options, str(whole)]
    assert run([*common, "--plan-only"]) == 0
    shown = capsys.readouterr()
    plan = tomllib.loads(shown.out)["types"]
    assert "blk.0.attn_qkv.weight" in shown.err
    assert [*tmp_path.iterdir()] == []
    assert plan["token_embd.weight"] == "IQ4_XS"
    assert plan["blk.7.ffn_down.weight"] == "Q6_K"
    rest = {kind for name, kind in plan.items() if name not in ("token_embd.weight", "blk.7.ffn_down.weight")}
    assert rest <= {"Q2_K", "Q3_K", "Q4_K", "Q5_K"}
    assert run([*common, str(tmp_path)]) == 0
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert parts == [f"tiny-4.25bpw-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    with open_model(tmp_path / parts[0]) as model:
        tensors = [*model.tensors.values()]
    bits = 8 * sum(tensor.nbytes for tensor in tensors) / sum(math.prod(tensor.shape) for tensor in tensors)
    assert 4.2 < bits <= 4.25


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--budget", "1MB"], "--budget 1MB is 1,000,000 bytes, and the smallest possible file has 3,"),
        (["--budget", "99%"], "OUT"),
        (["--budget", "40MB"], "the model as it is takes only 30,"),
        (["--budget", "big"], "--budget takes a size such as"),
        (["--budget", "8MB", "--reader", "ollama"], "no reader 'ollama'"),
        (["--budget", "8MB", "--mix-types", "q4_k,q9"], "'Q9' is not a tensor type|'q9' is not a tensor type"),
        (["--budget", "8MB", "--plan", "mix.toml"], "choose one of them"),
        (["--budget", "8MB", "--dry-run"], "use --plan-only"),
        (["--budget", "8MB", "--pure"], "--pure and --budget cannot be used together"),
        (["--budget", "8MB", "--prune-layers", "2"], "--prune-layers and --budget cannot"),
        (["--budget", "8MB", "--sensitivity-tokens", "0"], "must be at least 1"),
        (["--budget", "8MB", "--save-plan", "TEXT"], "also an input"),
        (["--plan", "none.toml"], "--plan none.toml cannot be read: No such file"),
        (["--plan", "none.toml", "--plan-only"], "--plan-only belongs to a mix that is found"),
    ],
)
def test_what_is_refused_before_the_work(
    short: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("phiquant.calibrate.Calibration.run", lambda *_: pytest.fail("it worked before it refused"))
    options = [str(short) if option == "TEXT" else option for option in options]
    arguments = [str(whole), "out.gguf"]
    if what == "OUT":
        arguments, what = [str(whole), str(whole)], "is also an input"
    calibrate = ["--calibrate", str(short)] if "--budget" in options else []
    assert run(["quantize", "-q", "--no-measure", *options, *calibrate, *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(what, error), error
    assert error.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["in.gguf", "Q4_K_M"], "choose the types themselves; leave Q4_K_M out"),
        (["in.gguf", "out.gguf", "Q4_K_M"], "choose the types themselves; leave Q4_K_M out"),
        (["in.gguf", "out.gguf", "many"], "'many' is not a number of threads"),
        (["in.gguf", "out.gguf", "1", "2"], "takes IN .OUT .NTHREADS"),
        (["in.gguf", "out.gguf"], "pass a text for it with --calibrate"),
    ],
)
def test_there_is_no_type(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "--budget", "8MB", *arguments]) == 1
    assert re.search(what, capsys.readouterr().err)


def test_options_of_a_mix_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "--save-plan", "x.toml", "in.gguf", "Q4_K_M"]) == 1
    assert "--save-plan belongs to a mix that is found for a size" in capsys.readouterr().err


@pytest.mark.cpu
def test_what_is_quantized_already_is_quantized_again_only_if_allowed(
    short: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["quantize", "-q", str(whole), "q8.gguf", "Q8_0"]) == 0
    common = ["quantize", "--budget", "12MB", "--plan-only", "--calibrate", str(short), *FEW, "q8.gguf"]
    assert run(common) == 1
    assert "is Q8_0 already and would be quantized to" in capsys.readouterr().err
    assert run([*common, "--allow-requantize", "--mix-types", "q4_k,q5_k,q6_k"]) == 0
    kinds = set(tomllib.loads(capsys.readouterr().out)["types"].values())
    assert len(kinds) > 1
    assert kinds <= {"Q4_K", "Q5_K", "Q6_K", "Q8_0"}


def test_the_default_is_said_once_more_where_the_options_are() -> None:
    assert MIX_TOKENS == DEFAULT_TOKENS
