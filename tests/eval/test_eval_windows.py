"""Which tokens are read and which are scored."""

import numpy as np
import pytest

from phiquant.errors import RequestError
from phiquant.eval.windows import Windows, strided_size

IDS = np.arange(100, 123, dtype=np.int32)


def test_halves_lie_side_by_side_and_leave_the_rest() -> None:
    windows = Windows.halves(IDS, 5, bos=1)
    assert len(windows) == 4
    assert windows.read(1).tolist() == [1, 106, 107, 108, 109]
    assert windows.tokens[1].tolist() == [105, 106, 107, 108, 109], "the text's own first token is kept"
    assert (windows.first, windows.scored) == (2, 2), "of 5: positions 2 and 3, which predict tokens 3 and 4"
    assert windows.targets(1, 2, 4).tolist() == [108, 109]
    assert Windows.halves(IDS, 5).read(0)[0] == 100


@pytest.mark.parametrize(("size", "scored"), [(512, 255), (511, 255), (4, 1), (3, 1)])
def test_scored_positions_are_llama_cpp_s(size: int, scored: int) -> None:
    windows = Windows.halves(np.arange(2 * size, dtype=np.int32), size)
    assert windows.scored == scored == size - 1 - size // 2


def test_strided_windows_overlap_and_score_their_end() -> None:
    windows = Windows.strided(IDS, 8, 3)
    assert [w.tolist()[0] for w in windows.tokens] == [100, 103, 106, 109, 112]
    assert (windows.first, windows.scored) == (4, 3)
    scored = [windows.targets(w, 4, 7).tolist() for w in range(len(windows))]
    tokens = [token for part in scored for token in part]
    assert tokens == list(range(105, 120)), "every token after the first window's beginning, once"
    assert windows.bos is None


def test_limits() -> None:
    assert len(Windows.halves(IDS, 5, limit=2)) == 2
    assert len(Windows.halves(IDS, 5, limit=99)) == 4
    assert len(Windows.strided(IDS, 8, 3, limit=2)) == 2


def test_strided_contexts_are_rounded_as_llama_cpp_s() -> None:
    assert [strided_size(c, s) for c, s in ((128, 64), (256, 128), (512, 256), (512, 1))] == [256, 512, 768, 512]


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(RequestError, match="has 23 tokens and must have at least 24, two windows of 12"):
        Windows.halves(IDS, 12)
    with pytest.raises(RequestError, match="0 windows"):
        Windows.halves(IDS, 5, limit=0)
    with pytest.raises(RequestError, match="windows of 2 tokens"):
        Windows.halves(IDS, 2)
    for stride in (0, 8, -1):
        with pytest.raises(RequestError, match="choose 1 to 7"):
            Windows.strided(IDS, 8, stride)
