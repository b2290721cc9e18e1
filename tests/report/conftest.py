"""A small report, made once."""

from pathlib import Path

import pytest
from small_report import HOSTILE, Made, Silent, changed, load

from phiquant.convert import convert, quantize
from phiquant.report import Gathering, gather

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    reference, ours = folder / "tiny-F16.gguf", folder / "tiny-Q4_K_M.gguf"
    convert(TINY, reference, "f16", quiet=True)
    quantize(reference, ours, "Q4_K_M", quiet=True)
    q2 = folder / "q2.gguf"
    quantize(reference, q2, "Q2_K", quiet=True)
    theirs = changed(q2, folder / "tiny-Q2_K.gguf", general_name=HOSTILE)
    same = folder / "tiny-same-<b>.gguf"
    same.write_bytes(reference.read_bytes())
    text = (TINY / "page.txt").read_text("utf-8")
    wanted = Gathering(
        reference=reference,
        files=[ours, theirs, same],
        text=text,
        text_name="page.txt",
        text_sha256="0" * 64,
        folder=folder,
        size=64,
        prompts=["Once upon a time", "<i>The</i> old man"],
        tokens=16,
    )
    progress = Silent()
    report = gather(wanted, load, progress)
    return Made(reference, ours, theirs, same, wanted, report, progress)
