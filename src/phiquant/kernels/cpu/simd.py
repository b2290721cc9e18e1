"""Vector operations that kernels share; those that have one lowering per instruction set are all here.

Everything else in a kernel is generic vector arithmetic of `emit`, which LLVM lowers to any processor. Vectors are as
wide as the algorithm wants (16 lanes as a rule), whatever the registers' width: LLVM splits them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .emit import F16, F32, I8, I16, I32, Emitter, Value, vec

__all__ = [
    "bfloat_to_float",
    "choose_of_four",
    "dot_bfloats",
    "dot_pairs",
    "dot_quads",
    "exp",
    "float_to_bfloat",
    "float_to_half",
    "half_to_float",
    "has_float_table",
    "lookup",
    "lookup_floats",
    "multiply_add",
    "multiply_pairs",
    "nearest_int",
    "reduce",
    "round_away",
    "transpose",
]


def dot_quads(e: Emitter, total: Value, unsigned: Value, signed: Value, *, below: int) -> Value:
    """total[i] + the sum over j < 4 of unsigned[4 i + j] * signed[4 i + j].

    Args:
        total: i32 × n, n a multiple of 4.
        unsigned: i8 × 4n, read as unsigned, every element less than `below`.
        signed: i8 × 4n, in -127..127.
        below: bound of `unsigned`: AVX2's instruction saturates a sum of two products at 32767, so 129 to 256 take
            another way there, and Arm's signed instruction, all that "neon" has, is used up to 128.
    """
    lowering, lanes = e.target.lowering, total.lanes
    if lowering == "avx512vnni":
        return _split(e, 16, _vnni512, total, unsigned, signed)
    if lowering == "avxvnni":
        return _split(e, 8, _vnni256, total, unsigned, signed)
    if lowering == "avx2" and below <= 129:
        return _split(e, 8, _maddubs256, total, unsigned, signed)
    if lowering == "sse41" and below <= 129:
        return _split(e, 4, _maddubs128, total, unsigned, signed)
    if lowering == "i8mm":
        return _split(e, 4, _usdot128, total, unsigned, signed)
    if lowering == "neon" and below <= 128:
        return _split(e, 4, _sdot128, total, unsigned, signed)
    # 16-bit products of widened bytes are added by pairs (one instruction on x86), then once more.
    u, s = unsigned.zext(I16), signed.sext(I16)
    pairs = dot_pairs(e, e.const(vec(I32, 2 * lanes), 0), u, s)
    even, odd = pairs.shuffle(range(0, 2 * lanes, 2)), pairs.shuffle(range(1, 2 * lanes, 2))
    return total + even + odd


def dot_pairs(e: Emitter, total: Value, a: Value, b: Value) -> Value:
    """total[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]; i32 × n, i16 × 2n, i16 × 2n (signed, not both -32768)."""
    lowering, lanes = e.target.lowering, total.lanes
    if lowering == "avx512vnni" and lanes % 16 == 0:
        return _split(e, 16, _vnni512_pairs, total, a, b)
    if lowering in ("avx512vnni", "avxvnni", "avx2") and lanes % 8 == 0:
        return _split(e, 8, _madd256, total, a, b)
    if lowering == "sse41":
        return _split(e, 4, _madd128, total, a, b)
    x, y = a.sext(I32), b.sext(I32)
    product = x * y
    return total + product.shuffle(range(0, 2 * lanes, 2)) + product.shuffle(range(1, 2 * lanes, 2))


def dot_bfloats(e: Emitter, total: Value, a: Value, b: Value) -> Value:
    """total[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]; float32 × 16, pairs of bfloat16 as i32 × 16 twice.

    For targets with `has_bfloat_dot`. Numbers too small to be normal count as zero, in operands and results.
    """
    # As with the dot products of bytes, LLVM upgrades this form, older than vectors of bfloat, by itself.
    return e.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", vec(F32, 16), total, a, b)


def _split(
    e: Emitter, width: int, f: Callable[[Emitter, Value, Value, Value], Value], total: Value, a: Value, b: Value
) -> Value:
    """Apply an instruction of `width` i32 lanes to every part of wider vectors."""
    lanes, ratio = total.lanes, a.lanes // total.lanes
    if lanes % width:
        raise TypeError(f"{lanes} lanes are not a multiple of {width}")
    if lanes == width:
        return f(e, total, a, b)
    parts = [
        f(
            e,
            total.shuffle(range(i, i + width)),
            a.shuffle(range(ratio * i, ratio * (i + width))),
            b.shuffle(range(ratio * i, ratio * (i + width))),
        )
        for i in range(0, lanes, width)
    ]
    return concatenate(e, parts)


def concatenate(e: Emitter, parts: Sequence[Value]) -> Value:
    """Vectors of one type joined in order; their number is a power of two."""
    items = list(parts)
    while len(items) > 1:
        items = [e.join(items[i], items[i + 1]) for i in range(0, len(items), 2)]
    return items[0]


def _vnni512(e: Emitter, t: Value, u: Value, s: Value) -> Value:
    # LLVM 22 takes i8 vectors and upgrades this older form, with i32 operands, by itself.
    return _dpbusd(e, "llvm.x86.avx512.vpdpbusd.512", 16, t, u, s)


def _vnni256(e: Emitter, t: Value, u: Value, s: Value) -> Value:
    return _dpbusd(e, "llvm.x86.avx512.vpdpbusd.256", 8, t, u, s)


def _dpbusd(e: Emitter, name: str, lanes: int, t: Value, u: Value, s: Value) -> Value:
    operand = vec(I32, lanes)
    return e.intrinsic(name, operand, t, u.bits(operand), s.bits(operand))


def _vnni512_pairs(e: Emitter, t: Value, a: Value, b: Value) -> Value:
    return e.intrinsic("llvm.x86.avx512.vpdpwssd.512", vec(I32, 16), t, a.bits(_PAIR), b.bits(_PAIR))


_PAIR = vec(I32, 16)


def _madd256(e: Emitter, t: Value, a: Value, b: Value) -> Value:
    return t + e.intrinsic("llvm.x86.avx2.pmadd.wd", vec(I32, 8), a, b)


def _madd128(e: Emitter, t: Value, a: Value, b: Value) -> Value:
    return t + e.intrinsic("llvm.x86.sse2.pmadd.wd", vec(I32, 4), a, b)


def _maddubs256(e: Emitter, t: Value, u: Value, s: Value) -> Value:
    pairs = e.intrinsic("llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), u, s)
    return _madd256(e, t, pairs, e.const(vec(I16, 16), 1))


def _maddubs128(e: Emitter, t: Value, u: Value, s: Value) -> Value:
    pairs = e.intrinsic("llvm.x86.ssse3.pmadd.ub.sw.128", vec(I16, 8), u, s)
    return _madd128(e, t, pairs, e.const(vec(I16, 8), 1))


def _sdot128(e: Emitter, t: Value, u: Value, s: Value) -> Value:
    return e.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", vec(I32, 4), t, u, s)


def multiply_pairs(e: Emitter, total: Value, unsigned: Value, signed: Value) -> Value:
    """Arm's i8mm: products of 2 × 8 by 8 × 2 matrices of bytes, added to 2 × 2 matrices of i32, rows first.

    Args:
        total: i32 × n, n a multiple of 4: every 4 are a matrix.
        unsigned: i8 × 4n, read as unsigned: every 16 are two rows of 8.
        signed: i8 × 4n: every 16 are two columns of 8.
    """
    return _split(e, 4, _usmmla128, total, unsigned, signed)


def _usmmla128(e: Emitter, t: Value, u: Value, s: Value) -> Value:
    return e.intrinsic("llvm.aarch64.neon.usmmla.v4i32.v16i8", vec(I32, 4), t, u, s)


def _usdot128(e: Emitter, t: Value, u: Value, s: Value) -> Value:
    return e.intrinsic("llvm.aarch64.neon.usdot.v4i32.v16i8", vec(I32, 4), t, u, s)


def lookup(e: Emitter, table: Sequence[int], index: Value) -> Value:
    """table[index[i]] for every byte of `index`, each less than the number of entries, which is 2, 4, 8 or 16.

    Args:
        table: bytes, 0..255.
        index: i8 × n, n a multiple of 16.
    """
    if e.target.lowering not in _SHUFFLES:
        return _selected(e, table, index)
    name, width = _SHUFFLES[e.target.lowering]
    if index.lanes % width:
        name, width = _SHUFFLES["sse41"]  # every processor with a wider one has it
    kind = vec(I8, width)
    values = e.const(kind, [table[i % len(table)] for i in range(16)] * (width // 16))
    parts = [index.shuffle(range(i, i + width)) for i in range(0, index.lanes, width)]
    return concatenate(e, [e.intrinsic(name, kind, values, part) for part in parts])


# Lowering: the instruction that picks bytes of every 16 by the low four bits of others, and its bytes.
_SHUFFLES = {
    "avx512vnni": ("llvm.x86.avx512.pshuf.b.512", 64),
    "avxvnni": ("llvm.x86.avx2.pshuf.b", 32),
    "avx2": ("llvm.x86.avx2.pshuf.b", 32),
    "sse41": ("llvm.x86.ssse3.pshuf.b.128", 16),
    "i8mm": ("llvm.aarch64.neon.tbl1.v16i8", 16),
    "neon": ("llvm.aarch64.neon.tbl1.v16i8", 16),
}


def _selected(e: Emitter, table: Sequence[int], index: Value) -> Value:
    """A tree of choices by the bits of the index: no instruction is needed but comparing and masking."""
    values = [e.const(index.type, v) for v in table]
    bit = 1
    while len(values) > 1:
        set_ = ((index & bit) == bit).sext(I8)
        values = [a ^ ((a ^ b) & set_) for a, b in zip(values[::2], values[1::2], strict=True)]
        bit *= 2
    return values[0]


def half_to_float(e: Emitter, bits: Value) -> Value:
    """IEEE half precision, given as i16, to float32; exact, subnormals and infinities included."""
    if e.target.has_half:
        half = vec(F16, bits.lanes) if bits.lanes > 1 or _is_vector(bits) else F16
        return bits.bits(half).fpext(F32)
    # Without the instruction: shift the fields into place and let one exact multiplication mend the exponent.
    wide = bits.zext(I32)
    sign = (wide & 0x8000) << 16
    magnitude = wide & 0x7FFF
    scaled = (magnitude << 13).bits(_like(bits, F32)) * 2.0**112
    special = (magnitude << 13) | 0x7F800000
    body = e.where(magnitude >= 0x7C00, special, scaled.bits(_like(bits, I32)))
    return (body | sign).bits(_like(bits, F32))


def float_to_half(e: Emitter, x: Value) -> Value:
    """float32 to IEEE half precision as i16, rounded to nearest even; NaN stays NaN, overflow is infinity."""
    if e.target.has_half:
        return x.fptrunc(F16).bits(_like(x, I16))
    wide = x.bits(_like(x, I32))
    sign = wide & -0x80000000
    magnitude = wide ^ sign
    # Subnormal halves: adding 0.5 lets the float adder round at the half's last bit.
    small = (magnitude.bits(_like(x, F32)) + 0.5).bits(_like(x, I32)) - 0x3F000000
    odd = magnitude.lsr(13) & 1
    normal = (magnitude - 0x37FFF001 + odd).lsr(13)
    big = e.where(magnitude > 0x7F800000, e.const(wide.type, 0x7E00), e.const(wide.type, 0x7C00))
    out = e.where(magnitude < 0x38800000, small, e.where(magnitude >= 0x47800000, big, normal))
    return (out | sign.lsr(16)).trunc(I16)


def bfloat_to_float(e: Emitter, bits: Value) -> Value:
    """bfloat16, given as i16, to float32."""
    return (bits.zext(I32) << 16).bits(_like(bits, F32))


def float_to_bfloat(e: Emitter, x: Value) -> Value:
    """float32 to bfloat16 as i16, rounded to nearest even; NaN is made quiet, as ggml does."""
    wide = x.bits(_like(x, I32))
    rounded = (wide + 0x7FFF + (wide.lsr(16) & 1)).lsr(16)
    quiet = wide.lsr(16) | 64
    return e.where((wide & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).trunc(I16)


def _is_vector(v: Value) -> bool:
    return hasattr(v.type, "count")


def _like(v: Value, element: object) -> object:
    return vec(element, v.lanes) if _is_vector(v) else element


def nearest_int(e: Emitter, x: Value) -> Value:
    """float32 to i32, halves to even, for magnitudes up to 2**22: the float adder rounds, the bits are read back."""
    return ((x + 12582912.0).bits(_like(x, I32)) & 0x007FFFFF) - 0x00400000


def round_away(e: Emitter, x: Value) -> Value:
    """float32 to i32, halves away from zero (C's roundf), for magnitudes below 2**23."""
    whole = x.to_int()
    rest = x - whole.to_float()
    return whole + e.where(rest >= 0.5, e.const(whole.type, 1), e.where(rest <= -0.5, e.const(whole.type, -1), 0))


def has_float_table(e: Emitter, entries: int) -> bool:
    """Whether `lookup_floats` in a table of that many float32 entries is a few instructions."""
    return e.target.lowering in ("avx512vnni", "avxvnni", "avx2") and entries <= 16


def lookup_floats(e: Emitter, table: Sequence[float], index: Value) -> Value:
    """table[index] for int32 lanes, all below len(table), a power of two; where `has_float_table`, up to 16 of float32.

    Elsewhere it is a tree of choices, one for each entry.
    """
    lowering, lanes = e.target.lowering, index.lanes
    entries = [float(v) for v in table]
    if has_float_table(e, len(entries)):
        width = 16 if lowering == "avx512vnni" else 8
        register = e.const(vec(F32, 16), (entries * 16)[:16])

        def part(i: Value) -> Value:
            if width == 16:
                return e.intrinsic("llvm.x86.avx512.permvar.sf.512", vec(F32, 16), register, i)
            halves = [register.shuffle(range(start, start + 8)) for start in (0, 8)]
            low, high = (e.intrinsic("llvm.x86.avx2.permps", vec(F32, 8), half, i) for half in halves)
            return low if len(entries) <= 8 else e.where(i > 7, high, low)

        if lanes == width:
            return part(index)
        return concatenate(e, [part(index.shuffle(range(i, i + width))) for i in range(0, lanes, width)])
    found = [e.const(vec(F32, lanes), v) for v in entries]
    bit = 1
    while len(found) > 1:
        odd = (index & bit) != 0
        found = [e.where(odd, found[i + 1], found[i]) for i in range(0, len(found), 2)]
        bit *= 2
    return found[0]


def choose_of_four(e: Emitter, table: Value, index: Value) -> Value:
    """table[index & 3] for int32 lanes, of a vector of four float32 of which the last is never asked for.

    The number of lanes is a multiple of 16.
    """
    lowering, lanes = e.target.lowering, index.lanes
    if lowering in ("avx512vnni", "avxvnni", "avx2"):
        width = 16 if lowering == "avx512vnni" else 8
        name = "llvm.x86.avx512.vpermilvar.ps.512" if width == 16 else "llvm.x86.avx.vpermilvar.ps.256"
        register = table.shuffle([0, 1, 2, 3] * (width // 4))
        parts = [index.shuffle(range(i, i + width)) for i in range(0, lanes, width)] if lanes > width else [index]
        return concatenate(e, [e.intrinsic(name, vec(F32, width), register, part) for part in parts])
    low, middle, high = (table.shuffle([i] * lanes) for i in range(3))
    return e.where((index & 2) != 0, high, e.where((index & 1) != 0, middle, low))


def multiply_add(e: Emitter, a: Value, b: Value | float, c: Value | float) -> Value:
    """a * b + c: with one rounding where that is an instruction, else with two. One processor always does the same."""
    return e.fma(a, b, c) if e.target.has_fma else a * b + c


# exp(r) = 1 + r + r² q(r) on [-ln2/2, ln2/2]: its series to degree 7, highest first; the next term is below 5e-9.
_EXP = (1.9841270e-4, 1.3888889e-3, 8.3333338e-3, 4.1666668e-2, 1.6666667e-1, 0.5)


def exp(e: Emitter, x: Value) -> Value:
    """e to the power x, float32 lanes, within 1 ulp; 0 below -87.3 (and for -inf), infinity above 88.7; not for NaN."""
    low = e.max(x, -104.0)
    clamped = e.min(low, 89.0)
    n = e.rint(clamped * 1.4426950408889634)
    r = multiply_add(e, n, -0.693145751953125, clamped)
    r = multiply_add(e, n, -1.428606765330187e-06, r)
    q = e.const(x.type, _EXP[0])
    for c in _EXP[1:]:
        q = multiply_add(e, q, r, c)
    p = 1.0 + multiply_add(e, q, r * r, r)
    # 2**n in two factors, so that n = 128 and subnormal results do not wrap the exponent field.
    i = n.to_int()
    half = i >> 1
    one = (half + 127) << 23
    two = (i - half + 127) << 23
    y = p * one.bits(x.type) * two.bits(x.type)
    return e.where(x < -87.33654, 0.0, y)


def reduce(e: Emitter, v: Value, op: str = "add") -> Value:
    """All lanes combined ("add", "max", "min") in a fixed tree: lane i with lane i + n/2, and so on."""
    while v.lanes > 1:
        half = v.lanes // 2
        a, b = v.shuffle(range(half)), v.shuffle(range(half, 2 * half))
        v = a + b if op == "add" else e.max(a, b) if op == "max" else e.min(a, b)
        if half == 1:
            return v.lane(0)
    return v


def transpose(e: Emitter, rows: Sequence[Value]) -> list[Value]:
    """n vectors of n lanes each, n a power of two: result i holds lane i of every row (n log n shuffles)."""
    n = len(rows)
    out, step = list(rows), n // 2
    while step:
        following = list(out)
        for i in range(n):
            if i & step:
                continue
            a, b = out[i], out[i + step]
            low = [j if not j & step else n + (j ^ step) for j in range(n)]
            high = [(j | step) if not j & step else n + j for j in range(n)]
            following[i], following[i + step] = a.shuffle(low, b), a.shuffle(high, b)
        out, step = following, step // 2
    return out
