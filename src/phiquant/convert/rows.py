"""Rows of one type to rows of another, with a check for NaN and infinity.

The compiled quantizers notice bad values as they go; rows that are only copied are checked here, at memory speed.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from phiquant.errors import WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.dequantize import FLOATS, dequantize_rows
from phiquant.kernels.quantize import quantize_rows
from phiquant.quants.validity import bad_blocks

__all__ = ["convert_rows", "first_bad_row"]

_Bytes = npt.NDArray[np.uint8]


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

    NVFP4 is never refused: its readers take the scale of NaN for 0.
    """
    bad = None if kind is GGMLType.NVFP4 else bad_blocks(data, kind)
    return None if bad is None else int(bad[0]) // (data.size // kind.block_bytes // rows)
