"""Route: chooses the experts of each token, and puts what is routed in the order of the experts.

The comparisons are those of float64 arithmetic on float32 logits, so that what is chosen, and what its weight is a
share of, is the same on every processor. The weights themselves are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import F32, F64, I32, I64, Emitter, Value
from .library import function
from .operation import Arguments, NativeOp, Region, tickets
from .simd import exp
from .target import Target, host

__all__ = ["Routes", "bind"]

ARGS = Arguments("tokens", "logits", "chosen", "weights", "starts", "next", "order", "experts", "used", "limit")


@dataclass(frozen=True, eq=False)
class Routes:
    """What a Route chose in the present step, in memory that it and the operations after it share.

    Route r = token * used + choice. Those of expert i are order[starts[i]], ..., order[starts[i + 1] - 1], ascending.

    Attributes:
        experts: among which is chosen.
        used: experts of a token.
        count: address of the int64 that says how many routes the present step has.
        chosen: int32 [capacity], the expert of each route.
        weights: float32 [capacity], of each route.
        starts: int64 [experts + 1].
        order: int32 [capacity], routes.
    """

    experts: int
    used: int
    count: int
    chosen: NDArray[np.int32]
    weights: NDArray[np.float32]
    starts: NDArray[np.int64]
    order: NDArray[np.int32]

    @classmethod
    def of(cls, experts: int, used: int, tokens: int, count: int) -> Routes:
        """Room for the routes of so many tokens; `count` as above."""
        if not 1 <= used <= experts:
            raise KernelError(f"{used} of {experts} experts cannot be chosen")
        room = tokens * used
        return cls(
            experts,
            used,
            count,
            chosen=np.zeros(room, np.int32),
            weights=np.zeros(room, np.float32),
            starts=np.zeros(experts + 1, np.int64),
            order=np.zeros(room, np.int32),
        )

    @property
    def capacity(self) -> int:
        """Routes there is room for."""
        return len(self.order)


def bind(logits: Region, routes: Routes, jitter: float, target: Target | None = None) -> NativeOp:
    """Choose by logits float32 [tokens, experts]. Errors: KernelError if they do not fit the routes."""
    if logits.width != routes.experts or logits.capacity * routes.used > routes.capacity or not jitter >= 0:
        raise KernelError(
            f"{logits.width} logits cannot route to {routes.experts} experts with a jitter of {jitter}, or there is no "
            f"room for {logits.capacity} tokens in {routes.capacity} routes"
        )
    following = np.zeros(routes.experts, np.int64)
    block = ARGS.pack(
        tokens=logits.count,
        logits=logits.address,
        chosen=routes.chosen.ctypes.data,
        weights=routes.weights.ctypes.data,
        starts=routes.starts.ctypes.data,
        next=following.ctypes.data,
        order=routes.order.ctypes.data,
        experts=routes.experts,
        used=routes.used,
        limit=int(np.float64(2 * jitter).view(np.int64)),
    )
    return NativeOp(function("route", 4, _emit, target or host()), block, (logits, routes, following))


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    a = dict(zip(ARGS.names, ARGS.read_all(e, block), strict=True))
    tokens = e.load(a["tokens"], I64)
    # A fifth of a microsecond a token, and the grouping needs all: not worth sharing out.
    with tickets(e, counter, e.integer(1)):
        with e.loop(0, tokens) as token:
            row = a["logits"] + token * a["experts"] * 4
            first = token * a["used"]
            with e.loop(0, a["used"]) as choice:
                _choose(e, a, row, a["chosen"] + 4 * first, a["weights"] + 4 * first, choice)
        _group(e, a, tokens * a["used"])


def _choose(e: Emitter, a: dict[str, Value], row: Value, chosen: Value, weights: Value, choice: Value) -> None:
    """One choice of a token, whose earlier ones are in `chosen`."""

    def left(expert: Value) -> Value:
        """Whether it was not chosen yet."""
        free = e.var(1)
        with e.loop(0, choice) as i:
            free.set(free.get() & (e.load(chosen + 4 * i, I32).sext(I64) != expert).zext(I64))
        return free.get() != 0

    best, top = e.var(-1), e.var(e.const(F32, 0.0))
    with e.loop(0, a["experts"]) as i:
        s, held = e.load(row + 4 * i, F32), top.get()
        # What is not a number is chosen first, as by NumPy, and makes the weight none.
        larger = (best.get() < 0) | (s > held) | (s.unordered() & ~held.unordered())
        with e.when(left(i) & larger):
            best.set(i)
            top.set(s)
    highest, total = top.get().fpext(F64), e.var(e.const(F32, 0.0))
    limit = a["limit"].bits(F64)
    with e.loop(0, a["experts"]) as i:
        s = e.load(row + 4 * i, F32).fpext(F64)
        far = (highest - s) / e.max(e.abs(s), highest) > limit
        with e.when(left(i) & ~far):
            below = (s - highest).fptrunc(F32)
            share = exp(e, e.splat(e.min(below, 0.0), 1)).lane(0)
            total.set(total.get() + e.where(below.unordered(), below, share))
    e.store(best.get().trunc(I32), chosen + 4 * choice)
    e.store(1.0 / total.get(), weights + 4 * choice)


def _group(e: Emitter, a: dict[str, Value], count: Value) -> None:
    """Sort the routes by expert: count, add up, place."""
    with e.loop(0, a["experts"]) as i:
        e.store(e.integer(0), a["next"] + 8 * i)

    def place(route: Value) -> Value:
        return a["next"] + 8 * e.load(a["chosen"] + 4 * route, I32).sext(I64)

    with e.loop(0, count) as route:
        at = place(route)
        e.store(e.load(at, I64) + 1, at)
    start = e.var(0)
    with e.loop(0, a["experts"]) as i:
        mine = e.load(a["next"] + 8 * i, I64)
        e.store(start.get(), a["next"] + 8 * i)
        e.store(start.get(), a["starts"] + 8 * i)
        start.set(start.get() + mine)
    e.store(start.get(), a["starts"] + 8 * a["experts"])
    with e.loop(0, count) as route:
        at = place(route)
        e.store(route.trunc(I32), a["order"] + 4 * e.load(at, I64))
        e.store(e.load(at, I64) + 1, at)
