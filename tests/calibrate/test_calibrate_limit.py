"""Sizes as they are written."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from phiquant.calibrate.limit import Limit
from phiquant.convert.filetypes import COPY
from phiquant.convert.plan import Plan
from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = tmp_path / "in.gguf"
    path.write_bytes(bytes(10_000))
    tensors = [PlannedTensor(name, (5, 32), GGMLType.F32, GGMLType.Q4_0) for name in ("a.weight", "b.weight")]
    source = SimpleNamespace(files=[path])
    return Plan(source, COPY, tmp_path / "out.gguf", tensors, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2.2GB", 2_200_000_000),
        ("2.2 gb", 2_200_000_000),
        ("900MiB", 900 << 20),
        ("1.5GiB", 3 << 29),
        ("3K", 3000),
        ("123456", 123456),
        ("123456 bytes", 123456),
        ("30%", 3000),
        ("12.5 %", 1250),
    ],
)
def test_bytes(plan: Plan, text: str, count: int) -> None:
    assert Limit.parse(text).file_bytes(plan) == count
    assert Limit.parse(text).text == text


def test_bits_per_weight_are_of_the_tensors(plan: Plan) -> None:
    """Two tensors of 160 elements, 90 bytes each at 4.5 bits, which are padded to 96."""
    header = plan.size - 2 * 96
    assert Limit.parse("4.5bpw").file_bytes(plan) == header + 320 * 45 // 80
    assert plan.bits_per_weight == 4.5


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GB", "-1GB", "GB", "1e9", "nan", "inf", "4.25 bits", "2,2GB", "1_000", "1" * 40, "٣GB", "2.GB", "5%%"],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RequestError, match="--budget takes a size such"):
        Limit.parse(text)


@pytest.mark.parametrize(("text", "label"), [("2.2 GB", "2.2GB"), ("4.25bpw", "4.25bpw"), ("30%", "30pct")])
def test_the_name_of_a_file_of_that_size(text: str, label: str) -> None:
    assert Limit.parse(text).label == label
