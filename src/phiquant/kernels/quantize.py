"""Quantizing rows with compiled code: the bytes of `quants`, at the speed of the processor.

All functions run without the interpreter lock and keep no state, so that a caller may run them on chunks of rows from
as many threads as it likes. Kernels are compiled on first use and cached.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from phiquant import quants
from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu.emit import Emitter, Value
from phiquant.kernels.cpu.quantize_iq1 import emit_iq1, iq1_tables
from phiquant.kernels.cpu.quantize_kquants import emit_kquant
from phiquant.kernels.cpu.quantize_lanes import INFINITE_INPUT, Arguments, Quantizer
from phiquant.kernels.cpu.quantize_lattice import emit_lattice
from phiquant.kernels.cpu.quantize_legacy import emit_legacy, emit_mean_squares
from phiquant.kernels.cpu.quantize_neighbours import lattice_tables
from phiquant.kernels.cpu.quantize_nonlinear import emit_nonlinear
from phiquant.kernels.cpu.quantize_small import emit_small
from phiquant.kernels.dequantize import FLOATS, convert_floats, dequantize_rows, layout, native
from phiquant.quants.lattice import LATTICES

__all__ = ["quantize_rows"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_QUANTIZERS: dict[GGMLType, Quantizer] = {
    **dict.fromkeys(
        (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1), Quantizer(emit_legacy, row_mean=True)
    ),
    GGMLType.Q8_0: Quantizer(emit_legacy),
    **dict.fromkeys(
        (GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K), Quantizer(emit_kquant)
    ),
    **dict.fromkeys(
        (GGMLType.Q1_0, GGMLType.Q2_0, GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.MXFP4, GGMLType.NVFP4),
        Quantizer(emit_small),
    ),
    **dict.fromkeys((GGMLType.IQ4_NL, GGMLType.IQ4_XS), Quantizer(emit_nonlinear)),
    **dict.fromkeys((GGMLType.IQ1_S, GGMLType.IQ1_M), Quantizer(emit_iq1, tables=iq1_tables)),
    **{type: Quantizer(emit_lattice, tables=partial(lattice_tables, type)) for type in LATTICES},
}
"""The compiled quantizer of every blocked type."""


def quantize_rows(
    x: npt.NDArray[Any],
    source: GGMLType,
    type: GGMLType,
    importance: Floats | None = None,
    *,
    nonfinite: Literal["raise", "keep"] = "raise",
) -> Bytes:
    """Rows of floats as blocks of `type`, byte for byte those of `quants.quantize`.

    Args:
        x: [rows, n] values of the type `source`, contiguous; or the bytes of such rows, uint8 [rows, n * size]. For
            BF16 an array of any 16-bit type.
        source: F32, F16 or BF16.
        type: any of `quants.QUANTIZABLE`; to a float type the values are converted, rounded to nearest even.
        importance: float32 [n], weight of each column's squared error; types that take none ignore it.
        nonfinite: whether NaN, infinity or values too large for half-precision scales are an error. With "keep",
            blocks that hold any become unspecified bytes.

    Returns:
        uint8 [rows, row_bytes].

    Raises:
        WeightsError: a shape does not fit; the type needs an importance and has none; or a row holds NaN, infinity or
            too large values.
        UnsupportedError: a type that this version does not read or write.
    """
    entry = quants.format_of(type)
    if entry.quantize is None:
        raise UnsupportedError(f"weights cannot be quantized to {type.name} by this version")
    if source not in FLOATS:
        raise UnsupportedError(f"{source.name} weights are not quantized directly; dequantize them to F32 first")
    if x.ndim != 2 or not x.flags.c_contiguous:
        raise WeightsError(f"rows to quantize must be a contiguous matrix, not of shape {x.shape}")
    rows, n = x.shape[0], x.shape[1] * x.itemsize // source.block_bytes
    if x.itemsize not in (1, source.block_bytes) or n * source.block_bytes != x.shape[1] * x.itemsize:
        raise WeightsError(f"an array of {x.dtype} of shape {x.shape} does not hold rows of {source.name}")
    if n % type.block_elements:
        raise WeightsError(f"rows of {n} values do not fill {type.name} blocks of {type.block_elements}")
    weights = quants.check_importance(type, importance, n)
    out = np.empty((rows, type.row_bytes(n)), np.uint8)
    if not out.size:
        return out
    flags = ctypes.c_int64(0)
    at = ctypes.addressof(flags)
    if not type.is_quantized:
        convert_floats(source, type)(x.ctypes.data, out.ctypes.data, rows * n, at)
    else:
        how = _QUANTIZERS[type]
        squares = np.empty(rows if weights is not None and how.row_mean else 0, np.float32)
        if squares.size:
            _mean_squares(source)(x.ctypes.data, squares.ctypes.data, rows, n)
        per_row = n // type.block_elements
        column_weights = 0 if weights is None else weights.ctypes.data
        # Held while the kernel runs: of threads that make them at the same time, only one's are kept by the cache.
        tables = how.tables() if how.tables else np.empty(0, np.int32)
        kernel = _quantizer(type, source, weights is not None)
        kernel(
            x.ctypes.data,
            out.ctypes.data,
            rows * per_row,
            per_row,
            column_weights,
            squares.ctypes.data,
            at,
            tables.ctypes.data,
        )
    if flags.value and nonfinite == "raise":
        raise WeightsError(_complaint(x, source, type, int(flags.value)))
    return out


def _complaint(x: npt.NDArray[Any], source: GGMLType, type: GGMLType, flags: int) -> str:
    values = dequantize_rows(x, source, len(x), x.shape[1] * x.itemsize // source.block_bytes)
    bad = ~np.isfinite(values).all(axis=1)
    if flags & INFINITE_INPUT and bad.any():
        return f"row {int(bad.argmax())} of the weights holds NaN or infinity; repair it or keep them by force"
    row = int(np.abs(values).max(axis=1).argmax())
    return f"row {row} of the weights holds values too large for {type.name} (up to {np.abs(values[row]).max():g})"


@cache
def _quantizer(type: GGMLType, source: GGMLType, weighted: bool) -> Any:
    entry = quants.format_of(type)
    how = _QUANTIZERS[type]

    def body(e: Emitter, *values: Value) -> None:
        how.emit(e, entry, source, weighted, Arguments(*values))

    name = f"quantize.{type.name}.{source.name}.{'weighted' if weighted else 'plain'}.{layout(type)}"
    return native(name, Arguments.COUNT, body)


@cache
def _mean_squares(source: GGMLType) -> Any:
    return native(f"mean_squares.{source.name}", 4, lambda e, *values: emit_mean_squares(e, source, *values))
