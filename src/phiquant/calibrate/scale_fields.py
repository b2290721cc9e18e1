"""The float16 scales of blocks: the fields in which the values of a block are linear.

    value of an element = sum over the fields f of scale[f] * what the other bits of the block make of it

`d` of most types, `d` and `dmin` of Q2_K, Q4_K and Q5_K, `d` and `m` of Q4_1 and Q5_1. Types whose scales are of other
kinds (IQ1_M, MXFP4, NVFP4) have none here.
"""

import numpy as np
from numpy.typing import NDArray

from phiquant.gguf import GGMLType
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.quants import block_dtype

__all__ = ["scale_fields", "scales_of", "values_of_field", "with_scales"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def scale_fields(type: GGMLType) -> tuple[str, ...]:
    """Names of the fields of a block that are one float16 each; none for types of plain floats."""
    dtype = block_dtype(type)
    return tuple(name for name in dtype.names or () if type.is_quantized and dtype[name] == np.dtype("<f2"))


def scales_of(data: Bytes, type: GGMLType) -> Floats:
    """The scales of blocks, float32 [fields, blocks], from their bytes."""
    blocks = data.reshape(-1).view(block_dtype(type))
    return np.stack([blocks[name].astype(np.float32) for name in scale_fields(type)])


def with_scales(data: Bytes, type: GGMLType, scales: Floats) -> Bytes:
    """Bytes, in the shape of `data`, of the same blocks with other scales [fields, blocks], rounded to float16."""
    changed: Bytes = data.copy()
    blocks = changed.reshape(-1).view(block_dtype(type))
    for name, values in zip(scale_fields(type), scales, strict=True):
        blocks[name] = values
    return changed


def values_of_field(data: Bytes, type: GGMLType, field: str, rows: int, columns: int) -> Floats:
    """Derivative of the values of blocks by one of their scales, float32 [rows, columns]: widened with this one 1."""
    fields = scale_fields(type)
    ones = np.zeros((len(fields), rows * columns // type.block_elements), np.float32)
    ones[fields.index(field)] = 1
    return dequantize_rows(with_scales(data, type, ones), type, rows, columns)
