"""Dequantizing rows with compiled code: the values of `quants`, at the speed of the processor.

Apart from `quantize`, so that who only runs a model loads none of its kernels.
"""

from __future__ import annotations

import ctypes
import zlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant import quants
from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import library
from phiquant.kernels.cpu.dequantize import DEQUANTIZABLE, emit_dequantize
from phiquant.kernels.cpu.quantize_legacy import emit_floats

__all__ = ["FLOATS", "convert_floats", "dequantize_rows", "layout", "native"]

FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
"""The types that `quantize_rows` reads and both convert."""

Floats = npt.NDArray[np.float32]


def dequantize_rows(data: npt.NDArray[Any], type: GGMLType, rows: int, columns: int) -> Floats:
    """Values float32 [rows, columns] of `rows` rows of blocks, from their bytes (contiguous); equal to `quants`'s.

    Raises:
        WeightsError: the bytes are not that many.
        UnsupportedError: a type that this version does not read.
    """
    if type not in FLOATS and type not in DEQUANTIZABLE:
        raise UnsupportedError(f"weights of type {type.name} are not dequantized by this version")
    if columns % type.block_elements or data.nbytes != rows * (columns // type.block_elements) * type.block_bytes:
        raise WeightsError(f"{data.nbytes} bytes are not {rows} rows of {columns} {type.name} weights")
    if not data.flags.c_contiguous:
        raise WeightsError("rows to dequantize must be contiguous")
    out = np.empty((rows, columns), np.float32)
    if out.size:
        if type.is_quantized:
            _dequantizer(type)(data.ctypes.data, out.ctypes.data, out.size // type.block_elements)
        else:
            flags = ctypes.c_int64(0)  # what is stored is returned, infinities too
            convert_floats(type, GGMLType.F32)(data.ctypes.data, out.ctypes.data, out.size, ctypes.addressof(flags))
    return out


def native(name: str, arguments: int, body: Any) -> Any:
    """A compiled kernel as a function of integers."""
    address = library.function(name, arguments, body)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)


@cache
def convert_floats(source: GGMLType, to: GGMLType) -> Any:
    """The kernel between two types of floats, of (source, target, count, flags)."""
    return native(f"convert.{source.name}.{to.name}", 4, lambda e, *values: emit_floats(e, source, to, *values))


@cache
def _dequantizer(type: GGMLType) -> Any:
    entry = quants.format_of(type)
    return native(f"dequantize.{type.name}.{layout(type)}", 3, lambda e, *values: emit_dequantize(e, entry, *values))


def layout(type: GGMLType) -> str:
    """The layout, which lives outside the sources that the kernel cache watches, as part of a kernel's name."""
    entry = quants.format_of(type)
    return f"{zlib.crc32(f'{entry.dtype.descr}{entry.planes}'.encode()):08x}"
