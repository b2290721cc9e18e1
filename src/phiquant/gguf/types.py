"""Tensor types, file types and metadata value types, with the numbers GGUF gives them."""

from enum import IntEnum
from typing import NamedTuple

__all__ = ["FileType", "GGMLType", "ValueType"]


class _Layout(NamedTuple):
    elements: int  # weights in a block
    bytes: int  # bytes of a block


class GGMLType(IntEnum):
    """How a tensor's elements are stored; the value is the number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42

    @property
    def block_elements(self) -> int:
        """Weights in one block; a row's length must be a multiple of it."""
        return _LAYOUT[self].elements

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return _LAYOUT[self].bytes

    @property
    def bits_per_weight(self) -> float:
        """Storage cost of one element, scales included."""
        return 8 * self.block_bytes / self.block_elements

    @property
    def is_quantized(self) -> bool:
        """Whether a block holds more than one element."""
        return self.block_elements > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements; ValueError if it is not a whole number of blocks."""
        blocks, rest = divmod(columns, self.block_elements)
        if rest:
            raise ValueError(f"a row of {columns} is not a multiple of {self.name}'s block of {self.block_elements}")
        return blocks * self.block_bytes


_LAYOUT = {
    GGMLType.F32: _Layout(1, 4),
    GGMLType.F16: _Layout(1, 2),
    GGMLType.Q4_0: _Layout(32, 18),
    GGMLType.Q4_1: _Layout(32, 20),
    GGMLType.Q5_0: _Layout(32, 22),
    GGMLType.Q5_1: _Layout(32, 24),
    GGMLType.Q8_0: _Layout(32, 34),
    GGMLType.Q8_1: _Layout(32, 36),
    GGMLType.Q2_K: _Layout(256, 84),
    GGMLType.Q3_K: _Layout(256, 110),
    GGMLType.Q4_K: _Layout(256, 144),
    GGMLType.Q5_K: _Layout(256, 176),
    GGMLType.Q6_K: _Layout(256, 210),
    GGMLType.Q8_K: _Layout(256, 292),
    GGMLType.IQ2_XXS: _Layout(256, 66),
    GGMLType.IQ2_XS: _Layout(256, 74),
    GGMLType.IQ3_XXS: _Layout(256, 98),
    GGMLType.IQ1_S: _Layout(256, 50),
    GGMLType.IQ4_NL: _Layout(32, 18),
    GGMLType.IQ3_S: _Layout(256, 110),
    GGMLType.IQ2_S: _Layout(256, 82),
    GGMLType.IQ4_XS: _Layout(256, 136),
    GGMLType.I8: _Layout(1, 1),
    GGMLType.I16: _Layout(1, 2),
    GGMLType.I32: _Layout(1, 4),
    GGMLType.I64: _Layout(1, 8),
    GGMLType.F64: _Layout(1, 8),
    GGMLType.IQ1_M: _Layout(256, 56),
    GGMLType.BF16: _Layout(1, 2),
    GGMLType.TQ1_0: _Layout(256, 54),
    GGMLType.TQ2_0: _Layout(256, 66),
    GGMLType.MXFP4: _Layout(32, 17),
    GGMLType.NVFP4: _Layout(64, 36),
    GGMLType.Q1_0: _Layout(128, 18),
    GGMLType.Q2_0: _Layout(64, 18),
}


class FileType(IntEnum):
    """`general.file_type`: the mix a file was made with, by llama.cpp's numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 7
    Q5_0 = 8
    Q5_1 = 9
    Q2_K = 10
    Q3_K_S = 11
    Q3_K_M = 12
    Q3_K_L = 13
    Q4_K_S = 14
    Q4_K_M = 15
    Q5_K_S = 16
    Q5_K_M = 17
    Q6_K = 18
    IQ2_XXS = 19
    IQ2_XS = 20
    Q2_K_S = 21
    IQ3_XS = 22
    IQ3_XXS = 23
    IQ1_S = 24
    IQ4_NL = 25
    IQ3_S = 26
    IQ3_M = 27
    IQ2_S = 28
    IQ2_M = 29
    IQ4_XS = 30
    IQ1_M = 31
    BF16 = 32
    TQ1_0 = 36
    TQ2_0 = 37
    MXFP4_MOE = 38
    NVFP4 = 39
    Q1_0 = 40
    Q2_0 = 41
    GUESSED = 1024


class ValueType(IntEnum):
    """The type of a metadata value; the value is the number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12
