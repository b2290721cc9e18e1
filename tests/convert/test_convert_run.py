"""The streaming run, end to end: files that the gguf package reads, exact plans, no debris, bounded memory."""

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf
from phiquant import quants
from phiquant.convert import Importance, Options, Target, convert, parse_file_type, quantize
from phiquant.convert.filetypes import DEFAULT_TYPES
from phiquant.convert.imatrix import ImportanceMatrix, Statistic
from phiquant.convert.overrides import parse_override
from phiquant.convert.plan import plan_quantize
from phiquant.convert.recipes import Tensor
from phiquant.convert.rows import convert_rows, first_bad_row
from phiquant.convert.source import open_source
from phiquant.errors import ArchitectureError, GGUFError, OutputError, RequestError, UnsupportedError, WeightsError
from phiquant.gguf import FileType, GGMLType, GGUFFile, GGUFWriter, ValueType

pytestmark = pytest.mark.cpu


def values(path: Path) -> dict[str, Any]:
    with GGUFFile.open(path) as file:
        return dict(file.metadata)


@pytest.mark.parametrize("kind", ["f16", "Q4_K_M", "Q3_K_L", "Q5_1"])
def test_the_gguf_package_reads_our_files(tiny: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out.gguf"
    report = convert(tiny, path, kind)
    assert report.plan.size == path.stat().st_size
    reader = gguf.GGUFReader(path)
    planned = {tensor.name: tensor for tensor in report.plan.tensors}
    assert [tensor.name for tensor in reader.tensors] == list(planned)
    for tensor in reader.tensors:
        assert int(tensor.tensor_type) == planned[tensor.name].type
        assert tuple(reversed(tensor.shape.tolist())) == planned[tensor.name].shape
    last = reader.tensors[-1]
    assert np.isfinite(gguf.quants.dequantize(last.data, last.tensor_type)).all()
    assert reader.fields["general.file_type"].contents() == FileType[kind.upper()]
    assert reader.fields["general.quantization_version"].contents() == 2


def test_values_survive(tiny: Path, tmp_path: Path) -> None:
    import ml_dtypes
    from safetensors import safe_open

    convert(tiny, tmp_path / "f32.gguf", "f32")
    with safe_open(tiny / "model.safetensors", "numpy") as theirs, GGUFFile.open(tmp_path / "f32.gguf") as ours:
        pairs = {"token_embd": "embed_tokens", "blk.7.ffn_down": "layers.7.mlp.down_proj", "output_norm": "norm"}
        for name, source in pairs.items():
            expected = theirs.get_tensor(f"model.{source}.weight").view(ml_dtypes.bfloat16).astype(np.float32)
            assert np.array_equal(ours.data(f"{name}.weight").view("<f4"), expected.reshape(-1))


def test_auto_keeps_the_type(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for dtype, expected in (
        ("BF16", FileType.BF16),
        ("F16", FileType.F16),
        ("F32", FileType.F16),
        ("F64", FileType.F16),
    ):
        path = tmp_path / f"{dtype}.gguf"
        convert(checkpoint(f"phi3-{dtype}", dtype=dtype), path)
        assert values(path)["general.file_type"] == expected


@pytest.mark.parametrize("between", ["bf16", "f32"])
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K", "Q8_0", "F16"])
def test_one_step_is_two_steps(tiny: Path, tmp_path: Path, between: str, kind: str) -> None:
    convert(tiny, tmp_path / "between.gguf", between)
    quantize(tmp_path / "between.gguf", tmp_path / "two.gguf", kind)
    quantize(tiny, tmp_path / "one.gguf", kind)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_and_shards_change_no_byte(checkpoint: Callable[..., Path], tmp_path: Path, threads: int) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": False}
    quantize(checkpoint("phi3-a", **shape), tmp_path / "a.gguf", "Q5_K_M", threads=1)
    quantize(checkpoint("x/phi3-a", shards=3, **shape), tmp_path / "b.gguf", "Q5_K_M", threads=threads)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_long_rope_factors_come_first(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    scaling = {"type": "su", "long_factor": [float(i + 2) for i in range(8)], "short_factor": [1.5] * 8}
    convert(checkpoint(rope_scaling=scaling), tmp_path / "x.gguf", "f16")
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert list(file.tensors)[:2] == ["rope_factors_long.weight", "rope_factors_short.weight"]
        assert file.data("rope_factors_long.weight").view("<f4").tolist() == scaling["long_factor"]
        assert file.data("rope_factors_short.weight").view("<f4").tolist() == scaling["short_factor"]
        expected = np.float32(np.sqrt(1 + np.log(2) / np.log(64)))
        assert file.require("phi3.rope.scaling.attn_factor", float) == pytest.approx(expected, rel=1e-7)
    quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", "Q8_0")
    with GGUFFile.open(tmp_path / "y.gguf") as file:
        assert file.tensors["rope_factors_long.weight"].type is GGMLType.F32


def test_rows_that_do_not_divide_are_reported(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize(checkpoint(), tmp_path / "x.gguf", "Q4_K_M")  # rows of 64 and 96
    types = {tensor.name: tensor.type.name for tensor in report.plan.tensors}
    assert types["blk.0.attn_output.weight"] == "Q5_0"
    assert types["token_embd.weight"] == "Q8_0"
    assert any(note.startswith("blk.0.attn_output.weight: rows of 64") for note in report.plan.notes)
    assert report.plan.size == (tmp_path / "x.gguf").stat().st_size


def importance_for(tensors: Iterable[Tensor], seed: int = 0) -> Importance:
    """Random importance of every matrix in the blocks."""
    rng = np.random.default_rng(seed)
    entries = {
        tensor.name: Statistic(rng.random((1, tensor.shape[-1]), np.float32) * 1000, np.array([1024]))
        for tensor in tensors
        if len(tensor.shape) > 1 and tensor.name.startswith("blk.")
    }
    return Importance(ImportanceMatrix(entries, 2, 512, ("a text",)), "imatrix.gguf")


@pytest.mark.parametrize(
    ("kind", "from_gguf"), [(kind, i % 2 == 1) for i, kind in enumerate([*(k.name for k in DEFAULT_TYPES), "COPY"])]
)
def test_the_planned_size_is_the_real_one(tiny: Path, tmp_path: Path, kind: str, from_gguf: bool) -> None:
    source = tiny
    if from_gguf:
        source = tmp_path / "f16.gguf"
        convert(tiny, source, "f16")
    overrides = [parse_override("general.extra.näme=str:wörd"), parse_override("phi3.context_length=int:7")]
    with open_source(source) as opened:
        more: dict[str, Any] = {"overrides": overrides, "importance": importance_for(opened.tensors)}
        if kind in ("COPY", "Q4_0"):  # without a matrix, for its keys
            more["importance"] = None
        planned = plan_quantize(opened, parse_file_type(kind), tmp_path / "x.gguf", Options(), **more)
    quantize(source, tmp_path / "x.gguf", kind, **more)
    assert planned.size == (tmp_path / "x.gguf").stat().st_size
    found = values(tmp_path / "x.gguf")
    assert (found["general.extra.näme"], found["phi3.context_length"]) == ("wörd", 7)


def test_copy_and_requantization(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "q8.gguf", "Q8_0")
    quantize(tmp_path / "q8.gguf", tmp_path / "copy.gguf", "COPY")
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "q8.gguf").read_bytes()
    quantize(tmp_path / "q8.gguf", tmp_path / "same.gguf", "Q8_0")
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "q8.gguf").read_bytes()
    with pytest.raises(WeightsError, match="--allow-requantize"):
        quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M")
    assert not (tmp_path / "q4.gguf").exists()
    report = quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M", allow_requantize=True)
    tensor = next(tensor for tensor in report.plan.tensors if tensor.name == "blk.3.ffn_up.weight")
    with GGUFFile.open(tmp_path / "q8.gguf") as old, GGUFFile.open(tmp_path / "q4.gguf") as new:
        floats = quants.dequantize(old.data(tensor.name), GGMLType.Q8_0, tensor.shape)
        assert new.data(tensor.name).tobytes() == quants.quantize(floats, GGMLType.Q4_K).tobytes()
    copied = quantize(tiny, tmp_path / "plain.gguf", "COPY")
    assert copied.plan.inventory == {GGMLType.BF16: 33, GGMLType.F32: 17}


def test_output_names(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(tiny).plan.path == Path("phi3-tiny-BF16.gguf")
    assert quantize("phi3-tiny-BF16.gguf", None, "q4_0").plan.path == Path("phi3-tiny-Q4_0.gguf")
    (tmp_path / "phi3-tiny-BF16.gguf").rename(tmp_path / "other.gguf")
    assert quantize(tmp_path / "other.gguf", None, "8").plan.path == tmp_path / "other-Q5_0.gguf"
    (tmp_path / "folder").mkdir()
    assert quantize(tiny, tmp_path / "folder", "Q6_K").plan.path == tmp_path / "folder" / "phi3-tiny-Q6_K.gguf"
    assert (tmp_path / "folder" / "phi3-tiny-Q6_K.gguf").is_file()


class TestBadWeights:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("kind", ["Q4_K_M", "f16", "f32", "bf16", "q8_0"])
    def test_are_named(self, checkpoint: Callable[..., Path], make: Any, tmp_path: Path, bad: float, kind: str) -> None:
        tensors = make.tensors(make.config, "BF16")
        tensors["model.embed_tokens.weight"][1][31_998, 5] = bad
        with pytest.raises(WeightsError, match=r"token_embd\.weight holds NaN or infinity in row 31998.*--keep-nan"):
            convert(checkpoint(tensors=tensors), tmp_path / "x.gguf", kind)
        assert [path.name for path in tmp_path.iterdir()] == ["phi3-small"]

    def test_are_kept_on_request(self, checkpoint: Callable[..., Path], make: Any, tmp_path: Path) -> None:
        tensors = make.tensors(make.config, "BF16")
        tensors["model.layers.1.mlp.down_proj.weight"][1][3, 5] = np.nan
        for kind in ("f16", "bf16", "Q8_0"):
            convert(checkpoint(tensors=tensors), tmp_path / "x.gguf", kind, keep_nan=True)
        convert(checkpoint(tensors=tensors), tmp_path / "x.gguf", "f32", keep_nan=True)
        with GGUFFile.open(tmp_path / "x.gguf") as file:
            found = file.data("blk.1.ffn_down.weight").view("<f4").reshape(64, 96)
        assert np.argwhere(np.isnan(found)).tolist() == [[3, 5]]

    def test_too_large_for_f16(self, checkpoint: Callable[..., Path], make: Any, tmp_path: Path) -> None:
        tensors = make.tensors(make.config, "BF16")
        tensors["model.layers.1.self_attn.o_proj.weight"][1][9, 5] = 1e6
        directory = checkpoint(tensors=tensors)
        with pytest.raises(
            WeightsError, match=r"blk\.1\.attn_output\.weight holds values too large for F16 in row 9.*bf16"
        ):
            convert(directory, tmp_path / "x.gguf", "f16")
        convert(directory, tmp_path / "x.gguf", "bf16")

    def test_in_a_gguf_file(self, tiny: Path, tmp_path: Path) -> None:
        convert(tiny, tmp_path / "q8.gguf", "q8_0")
        with GGUFFile.open(tmp_path / "q8.gguf") as file:
            at = (
                file.data_offset + file.tensors["blk.2.ffn_up.weight"].offset + 34 * 8 * 5
            )  # scale of row 5's first block
        with (tmp_path / "q8.gguf").open("r+b") as raw:
            raw.seek(at)
            raw.write(b"\x00\x7e")
        for kind in ("COPY", "Q4_0"):
            with pytest.raises(WeightsError, match=r"blk\.2\.ffn_up\.weight holds NaN or infinity in row 5"):
                quantize(tmp_path / "q8.gguf", tmp_path / "x.gguf", kind, allow_requantize=True)


@pytest.mark.parametrize(
    "kind",
    [
        GGMLType.F32,
        GGMLType.F16,
        GGMLType.BF16,
        GGMLType.Q4_0,
        GGMLType.Q5_1,
        *(GGMLType[f"Q{i}_K"] for i in range(2, 7)),
    ],
)
def test_every_bad_bit_pattern_is_found(kind: GGMLType) -> None:
    rng = np.random.default_rng(3)
    rows, columns = 7, 512
    good = convert_rows(
        rng.normal(0, 1, (rows, columns)).astype("<f4").view(np.uint8).reshape(-1), GGMLType.F32, kind, rows, columns
    )
    assert first_bad_row(good, kind, rows) is None
    if kind.is_quantized:
        layout = quants.block_dtype(kind)
        names = [name for name in layout.names or () if layout[name].base == np.float16]
        patterns = [(0x7C00, np.uint16), (0xFC00, np.uint16), (0x7E01, np.uint16), (0xFFFF, np.uint16)]
        for name in names:
            for bits, dtype in patterns:
                data = good.copy()
                data.view(layout).reshape(rows, -1)[name].view(dtype)[4, -1] = bits
                assert first_bad_row(data, kind, rows) == 4
        return
    width, infinity = {GGMLType.F32: (32, 0x7F800000), GGMLType.F16: (16, 0x7C00), GGMLType.BF16: (16, 0x7F80)}[kind]
    for bits in (infinity, infinity + 1, infinity | 1 << (width - 1), (1 << width) - 1):
        data = good.copy()
        data.view(f"<u{width // 8}").reshape(rows, -1)[2, 3] = bits
        assert first_bad_row(data, kind, rows) == 2
    data = good.copy()
    data.view(f"<u{width // 8}")[:] = infinity - 1  # the largest number
    assert first_bad_row(data, kind, rows) is None
    data.view(f"<u{width // 8}")[:] |= 1 << (width - 1)
    assert first_bad_row(data, kind, rows) is None


class TestRefusals:
    def test_output_equal_to_input(self, tiny: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
        path = tmp_path / "x.gguf"
        convert(tiny, path)
        before = path.read_bytes()
        (tmp_path / "link.gguf").symlink_to(path)
        for out in (path, tmp_path / "link.gguf"):
            with pytest.raises(OutputError, match="also an input"):
                quantize(path, out, "Q8_0")
        assert path.read_bytes() == before
        directory = checkpoint()
        with pytest.raises(OutputError, match="also an input"):
            quantize(directory, directory / "model.safetensors", "Q8_0")

    def test_unwritable_output(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(OutputError):
            convert(tiny, tmp_path / "no" / "such" / "x.gguf")
        with pytest.raises(OutputError):
            convert(tiny, Path("/dev/full"))

    def test_other_inputs(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="neither a file, a directory nor a repository id"):
            quantize(tmp_path / "no such file.gguf", None, "Q8_0")
        (tmp_path / "x.gguf").write_bytes(b"junk" * 100)
        with pytest.raises(GGUFError):
            quantize(tmp_path / "x.gguf", None, "Q8_0")
        with pytest.raises(RequestError, match="`quantize` a GGUF file"):
            convert(tmp_path / "x.gguf")
        for threads in (-1, 10_000):
            with pytest.raises(RequestError, match="threads"):
                convert(tiny, tmp_path / "y.gguf", threads=threads)

    @pytest.mark.parametrize(
        ("keys", "error"),
        [
            ([("general.architecture", "llama", ValueType.STRING)], GGUFError),
            ([("general.architecture", "falcon", ValueType.STRING)], ArchitectureError),
            ([], ArchitectureError),
            ([("general.architecture", 7, ValueType.UINT32)], ArchitectureError),
            ([("general.architecture", "phi3", ValueType.STRING)], GGUFError),
            (
                [
                    ("general.architecture", "phi3", ValueType.STRING),
                    ("phi3.attention.head_count", 0, ValueType.UINT32),
                ],
                GGUFError,
            ),
            (
                [
                    ("general.architecture", "phi3", ValueType.STRING),
                    ("phi3.attention.head_count", "x", ValueType.STRING),
                ],
                GGUFError,
            ),
            (
                [("general.architecture", "phi3", ValueType.STRING), ("split.count", 3, ValueType.UINT16)],
                GGUFError,
            ),
        ],
    )
    def test_gguf_files_of_another_kind(self, tmp_path: Path, keys: list[Any], error: type[Exception]) -> None:
        with GGUFWriter(tmp_path / "x.gguf") as writer:
            for key, value, kind in keys:
                writer.add(key, value, kind)
            writer.begin()
            writer.commit()
        with pytest.raises(error):
            quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", "Q8_0")


def test_odd_tensors_of_a_gguf_file(tmp_path: Path) -> None:
    """Types that are only copied, tensors without rows; a file without weights is refused."""
    header = [("general.architecture", "phi3", ValueType.STRING), ("general.file_type", 30, ValueType.UINT32)]
    header += [("phi3.block_count", 1, ValueType.UINT32), ("phi3.attention.head_count", 1, ValueType.UINT32)]
    tensors = {
        "blk.0.ffn_up.weight": ((4, 256), GGMLType.Q8_K),
        "blk.0.ffn_down.weight": ((0, 256), GGMLType.F32),
        "blk.0.numbers": ((3,), GGMLType.I32),
    }
    for chosen in (tensors, {"blk.0.ffn_down.weight": tensors["blk.0.ffn_down.weight"]}):
        with GGUFWriter(tmp_path / "x.gguf") as writer:
            for entry in header:
                writer.add(*entry)
            for name, (shape, kind) in chosen.items():
                writer.add_tensor(name, shape, kind)
            writer.begin()
            for name, (shape, kind) in chosen.items():
                writer.write(name, bytes([63]) * (shape[0] * kind.row_bytes(shape[-1]) if len(shape) > 1 else 12))
            writer.commit()
        if chosen is tensors:
            plan = quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", "COPY").plan
            assert {tensor.name: tensor.type for tensor in plan.tensors} == {
                n: kind for n, (_, kind) in tensors.items()
            }
            with GGUFFile.open(tmp_path / "y.gguf") as file:
                assert set(file.data("blk.0.ffn_up.weight").tolist()) == {63}
            with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_up\.weight is Q8_K"):
                quantize(tmp_path / "x.gguf", tmp_path / "z.gguf", "Q8_0", allow_requantize=True)
        else:
            with pytest.raises(WeightsError, match="no weights"):
                quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", "COPY")


def debris(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_full_disk_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def pwrite(descriptor: int, data: Any, offset: int, original: Any = os.pwrite) -> int:
        nonlocal written
        written += len(data)
        if written > 5_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(original(descriptor, data, offset))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="No space left"):
        convert(tiny, tmp_path / "x.gguf", "f16")
    assert debris(tmp_path) == []


def test_a_source_that_fails_midway_leaves_nothing(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = checkpoint(hidden_size=512)
    (tmp_path / "out").mkdir()

    class Cut:
        def planned(self, plan: Any) -> None:
            with (directory / "model.safetensors").open("r+b") as file:
                file.truncate(9_000_000)

        def advanced(self, source_bytes: int, tensor: str) -> None:
            pass

    with pytest.raises(Exception, match="ended at byte"):
        convert(directory, tmp_path / "out" / "x.gguf", progress=Cut())
    assert debris(tmp_path / "out") == []


def test_progress_adds_up(tiny: Path, tmp_path: Path) -> None:
    class Count:
        done = 0

        def planned(self, plan: Any) -> None:
            self.total = sum(t.rows * t.source.row_bytes(t.shape[-1]) for t in plan.tensors)

        def advanced(self, source_bytes: int, tensor: str) -> None:
            self.done += source_bytes

    count = Count()
    convert(tiny, tmp_path / "x.gguf", progress=count)
    assert count.done == count.total > 30_000_000


def test_ctrl_c_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    """SIGINT in the middle of a run: the temporary file goes, the process ends at once."""
    program = f"""
        import os, signal, time
        from phiquant.convert import convert

        class Interrupt:
            def planned(self, plan): pass
            def advanced(self, source_bytes, tensor):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)

        try:
            convert({str(tiny)!r}, {str(tmp_path / "x.gguf")!r}, "q8_0", progress=Interrupt())
        except KeyboardInterrupt:
            raise SystemExit(130)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 130, done.stderr.decode()
    assert debris(tmp_path) == []


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A 130 MB embedding does not show in the process's peak."""
    directory = checkpoint(hidden_size=2048, intermediate_size=256, num_hidden_layers=1)
    program = f"""
        import resource
        from phiquant.convert import quantize
        quantize({str(checkpoint("phi3-other"))!r}, {str(tmp_path / "warm.gguf")!r}, "Q6_K", threads=2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantize({str(directory)!r}, {str(tmp_path / "x.gguf")!r}, "Q6_K", threads=2)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=300, check=True
    )
    assert int(done.stdout) * 1024 < 40e6


def test_targets_say_their_name() -> None:
    assert Target(FileType.Q4_K_M).name == "Q4_K_M"
    assert Target(None).name == "COPY"
