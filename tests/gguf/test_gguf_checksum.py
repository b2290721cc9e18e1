"""The checksum's tree: pieces cover a tensor once, order and threads do not matter, every byte does."""

import hashlib
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from phiquant.gguf import GGMLType
from phiquant.gguf.checksum import DIGITS, PIECE, Checksum, Summed, pieces, table_hash

RNG = np.random.default_rng(4)
SHAPES = [
    (7,),
    (3, 4, 5),
    (PIECE,),
    (PIECE + 256,),
    (2, 3 * PIECE),
    (PIECE // 1024 * 3 + 1, 1024),
    (5, PIECE // 2 + 256),
    (0, 256),
    (4, 0),
    (),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16])
def test_pieces_cover_a_tensor_once_and_in_order(shape: tuple[int, ...], kind: GGMLType) -> None:
    columns = shape[-1] if shape else 1
    end = 0
    for piece in pieces(shape):
        assert piece.start(kind, columns) == end
        assert 0 < piece.rows * piece.columns <= PIECE
        assert piece.rows == 1 or piece.columns == columns
        end += piece.nbytes(kind)
    assert end == kind.block_bytes * int(np.prod(shape))


def test_pieces_of_blocks_are_whole_blocks() -> None:
    for kind in GGMLType:
        assert PIECE % kind.block_elements == 0
    found = list(pieces((2, PIECE + 256)))
    assert [(piece.row, piece.column, piece.columns) for piece in found] == [
        (0, 0, PIECE),
        (0, PIECE, 256),
        (1, 0, PIECE),
        (1, PIECE, 256),
    ]
    assert found[-1].start(GGMLType.Q4_K, PIECE + 256) == 144 * (2 * PIECE // 256 + 1)


TENSORS = [
    Summed("a", (PIECE // 512 * 2 + 5, 512), GGMLType.F16),
    Summed("b", (9,), GGMLType.F32),
    Summed("c", (0, 4), GGMLType.F32),
    Summed("d", (2, PIECE + 64), GGMLType.Q8_0),
]
DATA = {
    t.name: RNG.integers(0, 256, t.type.row_bytes(t.shape[-1]) * int(np.prod(t.shape[:-1])), np.uint8) for t in TENSORS
}


def jobs(data: dict[str, np.ndarray]) -> list[tuple[str, object, np.ndarray]]:
    found = []
    for t in TENSORS:
        for piece in pieces(t.shape):
            start = piece.start(t.type, t.shape[-1])
            found.append((t.name, piece, data[t.name][start : start + piece.nbytes(t.type)]))
    return found


def summed(data: dict[str, np.ndarray] = DATA) -> Checksum:
    checksum = Checksum(TENSORS)
    for job in jobs(data):
        checksum.add(*job)
    return checksum


def test_the_tree_is_the_documented_one() -> None:
    def sha(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    def crc(data: bytes) -> bytes:
        return struct.pack("<I", zlib.crc32(data))

    step = PIECE // 512 * 1024
    a = DATA["a"].tobytes()
    wide = PIECE // 32 * 34
    row = wide + 2 * 34
    d = DATA["d"].tobytes()
    digests = [
        sha(crc(a[:step]) + crc(a[step : 2 * step]) + crc(a[2 * step :])),
        sha(crc(DATA["b"].tobytes())),
        sha(b""),
        sha(b"".join(map(crc, (d[:wide], d[wide:row], d[row : row + wide], d[row + wide :])))),
    ]
    checksum = summed()
    assert checksum.text() == f"crc32:{table_hash(TENSORS)}:{sha(b''.join(digests)).hex()}"
    assert len(checksum.text()) == DIGITS
    assert checksum.parts().tolist() == [struct.unpack_from("<Q", digest)[0] for digest in digests]


def test_order_and_threads_do_not_matter() -> None:
    mixed = jobs(DATA)
    random.Random(1).shuffle(mixed)
    checksum = Checksum(TENSORS)
    with ThreadPoolExecutor(8) as pool:
        whole = [digest for digest in pool.map(lambda job: checksum.add(*job), mixed) if digest is not None]
    assert checksum.text() == summed().text()
    assert len(whole) == 3, "each tensor with data is complete once"


@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_every_byte_counts(name: str) -> None:
    good = summed()
    for at in (0, len(DATA[name]) // 2, -1):
        bad = {**DATA, name: DATA[name].copy()}
        bad[name][at] ^= 1
        checksum = summed(bad)
        assert checksum.text() != good.text()
        differing = np.flatnonzero(checksum.parts() != good.parts())
        assert [TENSORS[i].name for i in differing] == [name]


def test_adopted_tensors_count_as_summed() -> None:
    checksum, digests = Checksum(TENSORS), {}
    for name, piece, data in jobs(DATA):
        digest = checksum.add(name, piece, data)
        if digest is not None:
            digests[name] = digest
    other = Checksum(TENSORS)
    for name, digest in digests.items():
        other.adopt(name, digest)
    assert other.text() == checksum.text()


def test_a_missing_piece_is_noticed() -> None:
    checksum = Checksum(TENSORS)
    for job in jobs(DATA)[:-1]:
        checksum.add(*job)
    with pytest.raises(ValueError, match="1 tensors"):
        checksum.text()
    with pytest.raises(ValueError, match="1 tensors"):
        checksum.parts()


@pytest.mark.parametrize(
    "other",
    [
        [*TENSORS[:3], Summed("d", (2, PIECE + 64), GGMLType.Q4_0)],
        [*TENSORS[:3], Summed("d", (PIECE + 64, 2), GGMLType.Q8_0)],
        [*TENSORS[:3], Summed("e", (2, PIECE + 64), GGMLType.Q8_0)],
        TENSORS[::-1],
        TENSORS[:3],
    ],
)
def test_the_table_tells_other_tensors(other: list[Summed]) -> None:
    assert table_hash(other) != table_hash(TENSORS)
    assert len(table_hash(other)) == 32
