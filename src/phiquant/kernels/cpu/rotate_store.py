"""RotateStore: split rows of queries, keys and values; rotate queries and keys; keep keys and values in the cache.

Nothing here is fused or reassociated, so results equal the NumPy formula to the bit, and what is stored equals
`quants.quantize` of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...errors import KernelError
from .cache import KVCache, StepTables
from .cache_elements import Elements, Place, spans
from .emit import F32, I32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, tickets
from .simd import reduce
from .target import Target, host

__all__ = ["MOST_CHANNELS", "bind"]

MOST_CHANNELS = 256
"""Channels of a head that there is room for."""

_TOKENS = 16
_BETWEEN = 4 * MOST_CHANNELS + 64  # bytes from one key to the next while they wait; more than a power of two

ARGS = Arguments(
    "count", "qkv", "q_out", "cos", "sin", "positions", "slots", "pages", "columns", "cache", "page_bytes",
    "plane_bytes", "page_tokens", "head_size", "rotary", "kv_heads", "group",
)  # fmt: skip


def bind(
    qkv: Region, q_out: Region, tables: StepTables, cache: KVCache, layer: int, target: Target | None = None
) -> NativeOp:
    """Rotate and store the tokens of a step.

    Raises:
        KernelError: a width does not fit the model's heads, or a table has fewer rows than there are tokens.
    """
    shape = cache.shape
    if qkv.width != shape.q_width + 2 * shape.kv_width or q_out.width != shape.q_width:
        raise KernelError(f"rows of {qkv.width} channels cannot be split into the heads of {shape}")
    rows = min(q_out.capacity, *(len(t) for t in (tables.positions, tables.slots, tables.cos, tables.sin)))
    if qkv.capacity > rows or tables.cos.shape[1] != shape.rotary // 2 or tables.sin.shape[1] != shape.rotary // 2:
        raise KernelError(f"the tables of a step have no room for {qkv.capacity} tokens of {shape}")
    if shape.head_size > MOST_CHANNELS:
        raise KernelError(f"heads of {shape.head_size} channels are not supported; up to {MOST_CHANNELS} are")
    if not 0 <= layer < len(cache.layers):
        raise KernelError(f"the cache has {len(cache.layers)} layers, so there is no layer {layer}")
    block = ARGS.pack(
        count=qkv.count, qkv=qkv.address, q_out=q_out.address,
        cos=tables.cos.ctypes.data, sin=tables.sin.ctypes.data,
        positions=tables.positions.ctypes.data, slots=tables.slots.ctypes.data,
        pages=tables.pages.ctypes.data, columns=tables.pages.shape[1],
        cache=cache.layers[layer].ctypes.data, page_bytes=cache.page_bytes, plane_bytes=cache.plane_bytes,
        page_tokens=cache.page_tokens, head_size=shape.head_size, rotary=shape.rotary,
        kv_heads=shape.kv_heads, group=shape.heads // shape.kv_heads,
    )  # fmt: skip
    name = f"rotate_store_{cache.elements.name}{'_neighbours' if shape.neighbours else ''}"
    turn = _turn_neighbours if shape.neighbours else _turn_halves
    kernel = function(name, 4, _emitter(cache.elements, turn), target or host())
    return NativeOp(kernel, block, (qkv, q_out, tables, cache))


def _turn_halves(e: Emitter, source: Value, target: Value, cos: Value, sin: Value, half: Value) -> None:
    for i, lanes in spans(e, e.integer(0), half):
        t = vec(F32, lanes)
        a, b = e.load(source + 4 * i, t), e.load(source + 4 * (half + i), t)
        c, s = e.load(cos + 4 * i, t), e.load(sin + 4 * i, t)
        e.store(a * c - b * s, target + 4 * i)
        e.store(b * c + a * s, target + 4 * (half + i))


def _turn_neighbours(e: Emitter, source: Value, target: Value, cos: Value, sin: Value, half: Value) -> None:
    for i, lanes in spans(e, e.integer(0), half):
        both = e.load(source + 8 * i, vec(F32, 2 * lanes))
        a, b = both.shuffle(range(0, 2 * lanes, 2)), both.shuffle(range(1, 2 * lanes, 2))
        c, s = e.load(cos + 4 * i, vec(F32, lanes)), e.load(sin + 4 * i, vec(F32, lanes))
        turned = (a * c - b * s).shuffle([k for j in range(lanes) for k in (j, lanes + j)], b * c + a * s)
        e.store(turned, target + 8 * i)


_Turn = Callable[[Emitter, Value, Value, Value, Value, Value], None]


def _rotate(
    e: Emitter, turn: _Turn, source: Value, target: Value, cos: Value, sin: Value, half: Value, size: Value
) -> None:
    turn(e, source, target, cos, sin, half)
    for i, lanes in spans(e, 2 * half, size):
        e.store(e.load(source + 4 * i, vec(F32, lanes)), target + 4 * i)


def _emitter(elements: Elements, turn: _Turn) -> Callable[..., None]:
    def body(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        a = dict(zip(ARGS.names, ARGS.read_all(e, block), strict=True))
        n, group, kv_heads, half = a["head_size"], a["group"], a["kv_heads"], a["rotary"] // 2
        tokens = e.load(a["count"], I64)
        q_width, kv_width = kv_heads * group * n, kv_heads * n
        rotated, keys = e.scratch(4 * MOST_CHANNELS), e.scratch(_TOKENS * _BETWEEN)

        def rotate(head: Value, token: Value) -> Value:
            """Queries to where they belong, the key to `rotated`; the address of the key before."""
            row = a["qkv"] + 4 * (q_width + 2 * kv_width) * token
            cos, sin = (a[name] + 4 * half * token for name in ("cos", "sin"))
            with e.loop(head * group, head * group + group) as h:
                _rotate(e, turn, row + 4 * n * h, a["q_out"] + 4 * (q_width * token + n * h), cos, sin, half, n)
            key = row + 4 * (q_width + n * head)
            # The next head of this token, for which its turn comes after that of other tokens, rows away.
            with e.loop(4 * n, 8 * n, 64) as line:
                e.prefetch(key + line)
                e.prefetch(key + 4 * kv_width + line)
            with e.loop(4 * n * group * (head + 1), 4 * n * group * (head + 2), 64) as line:
                e.prefetch(row + line)
                e.prefetch(a["q_out"] + 4 * q_width * token + line, write=True)
            _rotate(e, turn, key, rotated, cos, sin, half, n)
            return key

        def place_of(head: Value, token: Value) -> Place:
            position = e.load(a["positions"] + 4 * token, I32).sext(I64)
            slot = e.load(a["slots"] + 4 * token, I32).sext(I64)
            place, within = position // a["page_tokens"], position % a["page_tokens"]
            page = e.load(a["pages"] + 4 * (slot * a["columns"] + place), I32).sext(I64)
            plane = a["cache"] + page * a["page_bytes"] + 2 * head * a["plane_bytes"]
            return Place(plane, within, n, a["page_tokens"])

        def store(head: Value, token: Value, to: Place, row: Value) -> None:
            """All of a token but its key, whose elements are left at `row`."""
            key = rotate(head, token)
            elements.write(e, rotated, row, to)
            elements.store_value(e, key + 4 * kv_width, replace(to, plane=to.plane + a["plane_bytes"]))

        def alone(head: Value, token: Value) -> None:
            to = place_of(head, token)
            elements.fetch_keys(e, to)
            store(head, token, to, keys)
            elements.store_keys(e, keys, _BETWEEN, 1, to)

        def together(head: Value, first: Value) -> None:
            to = place_of(head, first)
            with e.loop(0, _TOKENS) as i:
                store(head, first + i, replace(to, token=to.token + i), keys + _BETWEEN * i)
            elements.store_keys(e, keys, _BETWEEN, _TOKENS, to)

        def neighbours(first: Value) -> Value:
            """Whether tokens from `first` are one after the other in one page of a sequence."""
            integers = vec(I32, _TOKENS)
            positions, slots = (e.load(a[name] + 4 * first, integers) for name in ("positions", "slots"))
            start = positions.lane(0)
            differ = ((positions - start) ^ e.const(integers, range(_TOKENS))) | (slots ^ slots.lane(0))
            room = start.sext(I64) % a["page_tokens"] + _TOKENS <= a["page_tokens"]
            return (reduce(e, e.where(differ == 0, e.const(integers, 0), 1), "max") == 0) & room

        # A ticket is a few tokens, whose keys are written together where they are neighbours: the elements of one key
        # alone are far apart. Of few tokens a ticket has one head, so that all threads have work.
        chunks = (tokens + (_TOKENS - 1)) // _TOKENS
        pieces = e.where(chunks < 2 * threads, kv_heads, 1)
        with tickets(e, counter, chunks * pieces) as ticket:
            first, piece = ticket // pieces * _TOKENS, ticket % pieces
            heads = kv_heads // pieces
            last = e.min(first + _TOKENS, tokens)
            one_by_one = e.var(1)
            with e.when(last - first == _TOKENS):
                one_by_one.set(e.where(neighbours(first), e.integer(0), 1))
            with e.loop(piece * heads, piece * heads + heads) as head, e.choose(one_by_one.get() == 0) as (yes, no):
                with yes:
                    together(head, first)
                with no, e.loop(first, last) as token:
                    alone(head, token)

    return body
