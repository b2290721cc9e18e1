"""What a block format consists of: a structured dtype, bit planes, and the two directions of the conversion."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType

__all__ = ["Blocks", "Bytes", "Floats", "Format", "Levels", "Plane", "Write", "join", "split"]

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Blocks = npt.NDArray[np.void]  # of a format's structured dtype
Write = Callable[[Floats, Floats | None], Blocks]  # rows [rows, columns] and importance [columns] to blocks


@dataclass(frozen=True)
class Plane:
    """Some bits of every level of a block, packed into the bytes of one field.

    `run` bytes hold `run * 8 // bits` consecutive elements: the first `run` elements in the lowest bits of the bytes,
    the next `run` elements in the bits above, and so on. Two bits in runs of 4 bytes, elements 0 to 15:

        byte     0            1            2            3
        bits  7 6|5 4|3 2|1 0  ...
              12 | 8 | 4 | 0   13|9|5|1     14|10|6|2    15|11|7|3
    """

    field: str
    bits: int
    run: int
    shift: int = 0  # position in the level of the lowest of these bits

    def place(self, element: int) -> tuple[int, int]:
        """Byte within the field and lowest bit within the byte that hold the given element's bits."""
        per_byte = 8 // self.bits
        group, rest = divmod(element, self.run * per_byte)
        turn, byte = divmod(rest, self.run)
        return group * self.run + byte, turn * self.bits


@dataclass(frozen=True)
class Format:
    """A tensor type: how a block is laid out, read and written.

    `dequantize` turns blocks [n] into float32 [n, elements]; `quantize` turns float32 rows [rows, columns] and an
    optional importance [columns] into blocks [rows, columns / elements]; None: this version does not write the type.
    """

    type: GGMLType
    dtype: np.dtype[np.void]
    dequantize: Callable[[Blocks], Floats]
    quantize: Write | None
    planes: tuple[Plane, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.dtype.itemsize != self.type.block_bytes:
            raise ValueError(
                f"{self.type.name} is laid out in {self.dtype.itemsize} bytes, not {self.type.block_bytes}"
            )
        for plane in self.planes:
            held = self.dtype[plane.field].itemsize * 8 // plane.bits
            if held != self.type.block_elements:
                raise ValueError(f"{self.type.name}: {plane} holds {held} elements, not {self.type.block_elements}")


def split(blocks: Blocks, planes: tuple[Plane, ...]) -> Levels:
    """The levels [n, elements] of blocks [n], their bits brought together from all planes."""
    levels: Levels | None = None
    for plane in planes:
        elements = blocks.dtype[plane.field].itemsize * 8 // plane.bits
        data = np.ascontiguousarray(blocks[plane.field]).view(np.uint8).reshape(-1, 1, plane.run)
        turns = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
        part = ((data >> turns) & (2**plane.bits - 1)).reshape(len(blocks), elements).astype(np.int32) << plane.shift
        levels = part if levels is None else levels | part
    if levels is None:
        raise ValueError("a format without planes has no levels")
    return levels


def join(blocks: Blocks, planes: tuple[Plane, ...], levels: Levels) -> None:
    """Write levels [n, elements], each below 2 ** (sum of bits), into the planes of blocks [n]."""
    for plane in planes:
        part = (levels.astype(np.uint32) >> plane.shift) & (2**plane.bits - 1)
        turns = np.arange(0, 8, plane.bits, dtype=np.uint32)[:, None]
        data = np.bitwise_or.reduce(part.reshape(-1, 8 // plane.bits, plane.run) << turns, axis=1)
        packed = np.ascontiguousarray(data, np.uint8).reshape(-1)
        blocks[plane.field] = packed.view(blocks.dtype[plane.field].base).reshape(blocks[plane.field].shape)
