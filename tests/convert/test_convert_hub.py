"""A conversion whose source is a repository of the Hub."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import Hub, run, serving


@pytest.mark.cpu
def test_a_repository_becomes_gguf_in_one_step(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint(shards=2, hidden_size=32).iterdir()}
    out = tmp_path / "out"
    out.mkdir()
    with serving(Hub({"org/Phi-3-test": files})) as hub:
        program = f"from phiquant.convert import quantize\nquantize('org/Phi-3-test', {str(out)!r}, 'Q8_0', quiet=True)"
        done = run("-c", program, endpoint=hub.endpoint, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [path.name for path in out.iterdir()] == ["Phi-3-test-Q8_0.gguf"]
