"""Rows of one type to rows of another, with a check for NaN and infinity.

The compiled quantizers notice bad values as they go; rows that are only copied are checked here, at memory speed.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from phiquant import quants
from phiquant.errors import WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.quantize import FLOATS, dequantize_rows, quantize_rows
from phiquant.quants.iquants import d_iq1_m

__all__ = ["convert_rows", "first_bad_row"]

_Bytes = npt.NDArray[np.uint8]

# The bits of infinity as a number: NaN and infinity are all that reach it. As signed integers, positive values are
# compared; as unsigned ones, negative values: two reductions and no temporary array.
_INFINITY = {
    GGMLType.F32: (4, 0x7F800000),
    GGMLType.F16: (2, 0x7C00),
    GGMLType.BF16: (2, 0x7F80),
    GGMLType.F64: (8, 0x7FF << 52),
}
_HALF_SCALES = (2, 0x7C00)


def convert_rows(
    data: _Bytes,
    source: GGMLType,
    target: GGMLType,
    rows: int,
    columns: int,
    *,
    importance: npt.NDArray[np.float32] | None = None,
    keep_nan: bool = False,
) -> _Bytes:
    """Return the bytes of `rows` rows as `target`, by way of float32; `data` holds them as `source`, contiguous.

    `importance`: float32 [columns], weights of the columns' errors, for types that choose by them.
    WeightsError if a value is NaN, infinite or too large for `target`, unless `keep_nan`.
    """
    if source is target:
        if not keep_nan and first_bad_row(data, source, rows) is not None:
            raise WeightsError(f"the weights hold NaN or infinity as {source.name}")
        return data
    values: npt.NDArray[Any] = data.reshape(rows, -1)
    if source is GGMLType.F64:
        with np.errstate(over="ignore"):
            values, source = data.view("<f8").astype(np.float32).reshape(rows, columns), GGMLType.F32
    elif source not in FLOATS:
        values, source = dequantize_rows(data, source, rows, columns), GGMLType.F32
    nonfinite: Literal["keep", "raise"] = "keep" if keep_nan else "raise"
    return quantize_rows(values, source, target, importance, nonfinite=nonfinite).reshape(-1)


def first_bad_row(data: _Bytes, kind: GGMLType, rows: int) -> int | None:
    """Return the first of `rows` rows that holds NaN or infinity (quantized: as a block's scale), else None.

    All scales of NVFP4 are valid: its readers take the byte of NaN for 0.
    """
    if not data.size or (kind not in _INFINITY and kind not in quants.READABLE):
        return None  # integers, and types that are only ever copied
    if kind in _INFINITY:
        width, infinity = _INFINITY[kind]
        fields = [data.view(f"<u{width}").reshape(rows, -1)]
    else:
        width, infinity = _HALF_SCALES
        layout = quants.block_dtype(kind)
        blocks = data.view(layout).reshape(rows, -1)
        if kind is GGMLType.MXFP4:  # 0xFF is the only byte that is no power of two
            bad = blocks["e"] == 0xFF
            return int(np.argmax(bad.any(axis=1))) if bad.any() else None
        if kind is GGMLType.IQ1_M:
            fields = [d_iq1_m(blocks.reshape(-1)).view("<u2")]
        else:
            fields = [blocks[name].view("<u2") for name in layout.names or () if layout[name].base == np.dtype("<f2")]
    for bits in fields:
        if _has_bad(bits, width, infinity):
            bad = (bits & ((1 << (8 * width - 1)) - 1)) >= infinity
            return int(np.argmax(bad.reshape(rows, -1).any(axis=1)))
    return None


def _has_bad(bits: npt.NDArray[np.unsignedinteger], width: int, infinity: int) -> bool:
    sign = 1 << (8 * width - 1)
    return bool(bits.view(f"<i{width}").max() >= infinity or bits.max() >= sign | infinity)
