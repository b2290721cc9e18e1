"""The file of saved logits: its bytes, what is lost in it, and what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from phiquant.errors import LogitsError, OutputError
from phiquant.eval.rows import LogitRows, compare, log_softmax
from phiquant.eval.saved import SavedLogits, SavedWriter, pack
from phiquant.eval.windows import Windows

VOCABULARY, SIZE = 301, 8  # an odd vocabulary is padded
WINDOWS = Windows.halves(np.random.default_rng(1).integers(0, VOCABULARY, 40).astype(np.int32), SIZE)
LOGITS = np.random.default_rng(2).normal(0, 5, (len(WINDOWS), WINDOWS.scored, VOCABULARY)).astype(np.float32)


def write(path: Path, logits: np.ndarray = LOGITS) -> Path:
    with SavedWriter(path, WINDOWS, VOCABULARY) as writer:
        for window in (2, 0, 4, 1, 3):  # as they come
            writer.add(window, WINDOWS.first + 1, logits[window, 1:])
            writer.add(window, WINDOWS.first, logits[window, :1])
        writer.commit()
    return path


def packed_by_hand(row: np.ndarray) -> bytes:
    """One record, a number at a time in float32."""
    f = np.float32
    top = max(row)
    floor = max(min(row), f(top - f(16)))
    total = sum(float(np.exp(f(x - top))) for x in row)
    scale = f(f(top - floor) / f(65535))
    inverse = f(f(1) / scale)
    quants = [round(float(inverse * f(x - floor))) if x > floor else 0 for x in row]
    lowest = f(f(floor - top) - f(np.log(total)))
    return struct.pack(f"<ff{VOCABULARY + 1}H", scale, lowest, *quants, 0)


def test_bytes_are_llama_cpp_s(tmp_path: Path) -> None:
    raw = write(tmp_path / "base.kld").read_bytes()
    assert raw[:20] == b"_logits_" + struct.pack("<3i", SIZE, VOCABULARY, 5)
    assert np.frombuffer(raw[20 : 20 + 160], "<i4").tolist() == WINDOWS.tokens.reshape(-1).tolist()
    expected = b"".join(packed_by_hand(row) for row in LOGITS.reshape(-1, VOCABULARY))
    assert raw[180:] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["base.kld"]


def test_what_is_read_is_what_was_written_but_for_rounding(tmp_path: Path) -> None:
    with SavedLogits(write(tmp_path / "base.kld")) as saved:
        assert (saved.vocabulary, len(saved.windows), saved.windows.scored) == (VOCABULARY, 5, WINDOWS.scored)
        np.testing.assert_array_equal(saved.windows.tokens, WINDOWS.tokens)
        for window in range(5):
            log, p = saved.take(window, WINDOWS.first, WINDOWS.scored).part(slice(None))
            exact = log_softmax(LOGITS[window])
            floor = exact.max(axis=1, keepdims=True) - 16
            step = (exact.max(axis=1) - np.maximum(exact.min(axis=1), floor[:, 0])) / 65535
            assert (np.abs(log - np.maximum(exact, floor)) <= 0.51 * step[:, None] + 2e-6).all()
            assert (p[log <= -16] == 0).all()
            assert (p[log > -16] > 0).all()
        one = saved.take(1, WINDOWS.first + 1, 1).part(slice(None))[0]
        assert (one[0] == saved.take(1, WINDOWS.first, 3).part(slice(None))[0][1]).all()


def test_divergence_from_saved_logits_is_that_from_the_logits(tmp_path: Path) -> None:
    other = LOGITS + np.random.default_rng(3).normal(0, 0.3, LOGITS.shape).astype(np.float32)
    with SavedLogits(write(tmp_path / "base.kld")) as saved:
        for window in range(5):
            rounded = compare(saved.take(window, WINDOWS.first, WINDOWS.scored), other[window])
            exact = compare(LogitRows(LOGITS[window]), other[window])
            np.testing.assert_allclose(rounded.divergence, exact.divergence, atol=3e-4)
            assert (rounded.same == exact.same).all()


def test_rows_without_range(tmp_path: Path) -> None:
    flat = np.full((1, VOCABULARY), 3.5, np.float32)
    record = pack(flat)
    assert record["scale"] == 0
    assert not record["q"].any()
    assert record["lowest"] == pytest.approx(-np.log(VOCABULARY))


def test_an_unfinished_file_leaves_nothing(tmp_path: Path) -> None:
    with SavedWriter(tmp_path / "base.kld", WINDOWS, VOCABULARY) as writer:
        writer.add(0, WINDOWS.first, LOGITS[0])
        assert not (tmp_path / "base.kld").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "base.kld").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        SavedWriter(tmp_path / "base.kld", WINDOWS, VOCABULARY)


def changed(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda raw: raw[:-1], "ends after 4 of 5 windows"),
        (lambda raw: raw[:181], "ends after 0 of 5 windows"),
        (lambda raw: raw[:100], "ends after 0 of 5 windows"),
        (lambda raw: raw + b"x", "1 bytes longer"),
        (lambda raw: raw[:19], "not a file of saved logits"),
        (lambda raw: b"GGUF" + raw[4:], "not a file of saved logits"),
        (lambda raw: b"", "not a file of saved logits"),
        (lambda raw: changed(raw, 8, b"\x02\0\0\0"), "tells of 5 windows of 2 tokens"),
        (lambda raw: changed(raw, 12, b"\xff\xff\xff\xff"), "out of -1"),
        (lambda raw: changed(raw, 8, b"\xff\xff\xff\x7f"), "ends after 0 of 5 windows"),
        (lambda raw: changed(raw, 16, b"\xff\xff\xff\x7f"), "ends after 0 of 2147483647 windows"),
        (lambda raw: changed(raw, 20, b"\xff\xff\xff\xff"), "not of its vocabulary"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, what: str) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "base.kld")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LogitsError, match=what):
        SavedLogits(path)


def test_records_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "base.kld")
    path.write_bytes(changed(path.read_bytes(), 180, struct.pack("<f", np.nan)))
    with SavedLogits(path) as saved:
        with pytest.raises(LogitsError, match="window 1"):
            saved.take(0, WINDOWS.first, 1)
        saved.take(1, WINDOWS.first, 1)
        path.write_bytes(b"")
        with pytest.raises(LogitsError, match="shorter"):
            saved.take(4, WINDOWS.first, WINDOWS.scored)
