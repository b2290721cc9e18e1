"""Which bytes cannot be weights: NaN and infinity, in values or in the scales of blocks.

Only scales can be wrong. Levels fill their bits whole, and so do the indices into lattices (2048 points for the 11 bits
of IQ1, 256, 512 and 1024 for the 8, 9 and 10 of IQ2, 256 and 512 for the 8 and 9 of IQ3) and signs; all 256 bytes of
TQ1_0 decode to digits, and code 3 of TQ2_0 to a value, though no quantizer writes it. MXFP4's scale 0xFF is the NaN of
E8M0, NVFP4's 0x7F that of E4M3 (the sign bit does not count). Integers are always good.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Bytes
from phiquant.quants.iquants import d_iq1_m

__all__ = ["bad_blocks"]

_Bits = npt.NDArray[np.integer[Any]]

# Width in bytes and the bits of infinity as a number: NaN and infinity are all that have these bits.
_FLOATS: Final = {
    GGMLType.F32: (4, 0x7F800000),
    GGMLType.F16: (2, 0x7C00),
    GGMLType.BF16: (2, 0x7F80),
    GGMLType.F64: (8, 0x7FF << 52),
}
# Types without a layout in this room, as they are for activations only: position and width of their scales.
_ACTIVATIONS: Final = {
    GGMLType.Q8_1: np.dtype({"names": ["d", "s"], "formats": ["<f2", "<f2"], "offsets": [0, 2], "itemsize": 36}),
    GGMLType.Q8_K: np.dtype({"names": ["d"], "formats": ["<f4"], "offsets": [0], "itemsize": 292}),
}
_MASKS: Final = {np.dtype("<f2"): ("<u2", 0x7C00), np.dtype("<f4"): ("<u4", 0x7F800000)}
_INTEGERS: Final = frozenset({GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64})


def bad_blocks(data: Bytes, kind: GGMLType) -> npt.NDArray[np.int64] | None:
    """Indices of the blocks (of plain types: elements) in contiguous bytes that hold no numbers; None if all do."""
    if kind in _INTEGERS or not data.size:
        return None
    if kind in _FLOATS:
        width, infinity = _FLOATS[kind]
        bits = data.view(f"<u{width}")
        if not _reaches(bits, width, infinity):
            return None
        return np.flatnonzero((bits & infinity) == infinity)
    bad: npt.NDArray[np.bool_] | None = None
    for field, mask in _scales(data, kind):
        wrong = (field & mask) == mask
        wrong = wrong if wrong.ndim == 1 else wrong.any(axis=1)
        bad = wrong if bad is None else bad | wrong
    return np.flatnonzero(bad) if bad is not None and bad.any() else None


def _reaches(bits: _Bits, width: int, infinity: int) -> bool:
    """Whether NaN or infinity is among floats: signed, positive values are compared, unsigned, negative ones.

    Two reductions and no temporary array.
    """
    sign = 1 << (8 * width - 1)
    return bool(bits.view(f"<i{width}").max() >= infinity or bits.max() >= sign | infinity)


def _scales(data: Bytes, kind: GGMLType) -> list[tuple[_Bits, int]]:
    """The scales of all blocks, [n] or [n, several], each with the bits that all are set in what is no number."""
    from phiquant.quants import block_dtype

    layout = _ACTIVATIONS.get(kind) or block_dtype(kind)
    blocks = data.view(layout)
    if kind in _SPECIAL:
        return [_SPECIAL[kind](blocks)]
    found = []
    for name in layout.names or ():
        if layout[name] in _MASKS:
            width, mask = _MASKS[layout[name]]
            found.append((blocks[name].view(width), mask))
    if not found:
        raise ValueError(f"{kind.name} has no scale that is known here")
    return found


_SPECIAL: Final[dict[GGMLType, Callable[[npt.NDArray[np.void]], tuple[_Bits, int]]]] = {
    GGMLType.IQ1_M: lambda blocks: (d_iq1_m(blocks).view("<u2"), 0x7C00),
    GGMLType.MXFP4: lambda blocks: (blocks["e"], 0xFF),
    GGMLType.NVFP4: lambda blocks: (blocks["d"], 0x7F),
}
