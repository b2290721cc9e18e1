"""`phiquant serve` for a long time under everything that clients do: nothing wrong, nothing lost, nothing left.

    python benchmarks/soak.py [--requests 10000] [--concurrency 20] [--seed 0] [--only N] [--model FILE.gguf]

The bundled model, as Q8_0, is served with too few pages and a short queue by the real process. Requests are checked
against what the same server says to each of them alone; in between clients leave, in the midst of answers and before
them, and send what is malformed. Every tenth part of the requests the server is left alone and looked at.

    answers      equal those computed alone: greedy ones, sampled ones with a seed, grammars, tools, embeddings
    statuses     429 where the queue is full, and what each malformed request must get; none from 500 on
    left over    no sequence runs or waits, and no page is used, when nobody asks
    memory       at most GROWTH more bytes after the last part than after the third; no more threads, nor descriptors
    the end      the process ends with 0, and has no traceback in its log

Any violation is printed with the request's number, and the exit status is 1; `--only N` sends that request alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from http_stream import ask, post
from served import Served, Usage, phiquant
from soak_cases import CONTEXT, Case, Malformed, cases, malformed

BUNDLED = Path(__file__).resolve().parent.parent / "models" / "phi3-tiny"
PARTS: Final = 10
GROWTH: Final = 16 << 20  # bytes of memory
PATIENCE: Final = 120.0  # seconds for an answer
AGAIN: Final = 0.1  # seconds until who was refused asks again
QUIET: Final = 20.0  # seconds until nothing is left over
SHARES: Final = {"whole": 30, "streamed": 34, "left midway": 14, "left at once": 8, "malformed": 14}
SERVER: Final = ("--alias", "tiny", "-c", str(CONTEXT), "-t", "2", "--embeddings", "--metrics", "--slots")
UNCACHED: Final = ("/v1/completions", "/v1/chat/completions", "/completion")
CROWDED: Final = (*SERVER, "--parallel", "8", "--cache-tokens", "768", "--queue", "8", "--log-format", "json")


class Violation(Exception):  # noqa: N818 - it is what is looked for
    """Something that must not be."""


class Refused(Exception):  # noqa: N818
    """The queue is full: to be asked again."""


@dataclass
class Soak:
    """The state of a run."""

    port: int
    seed: int
    cases: Sequence[Case]
    expected: dict[str, Any]
    done: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    async def one(self, number: int) -> None:
        """Request `number`, until it is not refused; what is wrong with it is noted."""
        draw = random.Random(f"{self.seed}/{number}")
        kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
        what: Case | Malformed = draw.choice(malformed() if kind == "malformed" else self.cases)
        state = draw.getstate()
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    draw.setstate(state)
                    try:
                        await self._send(kind, what, draw)
                        break
                    except Refused:
                        self.done["refused"] += 1
                        await asyncio.sleep(AGAIN)
            self.done[kind] += 1
        except (Violation, TimeoutError, OSError, EOFError, ValueError, KeyError) as error:
            told = f"no answer in {PATIENCE:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
            self.violations.append(f"request {number} ({kind}, {what.name}): {told}")

    async def _send(self, kind: str, what: Case | Malformed, draw: random.Random) -> None:
        if isinstance(what, Malformed):
            await self._malformed(what)
        elif kind == "whole" or (kind == "streamed" and what.streamed is None):
            self._check(what, await whole(self.port, what))
        elif kind == "streamed":
            self._check(what, await streamed(self.port, what))
        elif kind == "left midway" and what.streamed is not None:
            await leave(self.port, what, draw.randint(1, 6), abruptly=draw.random() < 0.5)
        else:
            await leave_at_once(self.port, what, draw.choice((0.0, 0.0, 0.002, 0.02, 0.1)))

    def _check(self, case: Case, found: Any) -> None:
        if found != self.expected[case.name]:
            raise Violation(f"the answer is {found!r:.600}, and alone it was {self.expected[case.name]!r:.600}")

    async def _malformed(self, what: Malformed) -> None:
        request = what.request(self.port)
        if what.status is None:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request)
            await writer.drain()
            writer.close()
            return
        async with ask(self.port, request) as answer:
            if answer.status != what.status:
                raise Violation(f"status {answer.status}, and it must be {what.status}")
            async for _ in answer.pieces():
                pass


async def whole(port: int, case: Case) -> Any:
    """What counts of an answer in one piece."""
    async with post(port, case.path, case.body) as answer:
        found = await answer.json()
        _look(answer.status, answer.headers, found)
        return case.whole(found)


async def streamed(port: int, case: Case) -> Any:
    """What counts of a streamed answer."""
    assert case.streamed is not None
    async with post(port, case.path, {**case.body, "stream": True}) as answer:
        if answer.status != 200:
            _look(answer.status, answer.headers, await answer.json())
        events = [event async for event in answer.events()]
    for event in events:
        if "error" in event:
            if event["error"].get("code") in ("queue_full", 429):
                raise Refused
            raise Violation(f"an error in the midst of the answer: {event['error']}")
    return case.streamed(events)


def _look(status: int, headers: dict[str, str], found: Any) -> None:
    if status == 429:
        if "retry-after" not in headers:
            raise Violation("status 429 without Retry-After")
        raise Refused
    if status != 200:
        raise Violation(f"status {status}: {found!r:.300}")


async def leave(port: int, case: Case, events: int, *, abruptly: bool) -> None:
    """Read so many events and go."""
    async with post(port, case.path, {**case.body, "stream": True}) as answer:
        if answer.status not in (200, 429):
            raise Violation(f"status {answer.status}")
        if answer.status == 200:
            async for _ in answer.events():
                events -= 1
                if events == 0:
                    break
        if abruptly:
            answer.writer.transport.abort()


async def leave_at_once(port: int, case: Case, seconds: float) -> None:
    """Send a request and go before the answer."""
    data = json.dumps(case.body).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {case.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    await asyncio.sleep(seconds)
    writer.close()


def alone(model: Path, known: Sequence[Case], folder: Path) -> dict[str, Any]:
    """What a server says to every request that comes alone; where it can be told so, it takes over nothing computed."""
    found = {}

    async def run(port: int) -> None:
        for case in known:
            body = case.body | ({"cache_prompt": False} if case.path in UNCACHED else {})
            found[case.name] = await whole(port, replace(case, body=body))

    with Served(phiquant(model, *SERVER, "--parallel", "3"), folder / "alone.log") as server:
        asyncio.run(run(server.port))
    return found


def gauges(port: int) -> dict[str, float]:
    """Numbers of /metrics that have no label but the model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.endswith(tuple("0123456789")) and "{model=" in line)
    return {name.partition("{")[0].removeprefix("phiquant_"): float(value) for name, value in pairs}


def slots(port: int) -> int:
    """How many are busy, by /slots."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/slots", timeout=30) as answer:
        return sum(slot["is_processing"] for slot in json.load(answer))


def settled(server: Served, most: Usage | None) -> tuple[Usage, str]:
    """What the server has when nobody asks it any more, and what is left over; empty if nothing is.

    Connections take a moment to end: descriptors are looked at until there are no more than `most` has.
    """
    deadline = time.monotonic() + QUIET
    while True:
        found = gauges(server.port)
        left = {name: found[name] for name in ("running", "waiting", "pages_used") if found[name]}
        busy, usage = slots(server.port), server.usage()
        if not left and not busy and (most is None or usage.descriptors <= most.descriptors):
            return usage, ""
        if time.monotonic() > deadline:
            over = f"{usage.descriptors} descriptors" if not left and not busy else f"{left}, {busy} busy slots"
            return usage, f"{over} are left over after {QUIET:g} s"
        time.sleep(0.1)


def grown(usages: Sequence[Usage]) -> list[str]:
    """What is wrong with the memory, threads and descriptors after each part."""
    if len(usages) < 4:
        return []
    first, last, found = usages[2], usages[-1], []
    if last.resident - first.resident > GROWTH:
        found.append(f"memory grew from {first.resident >> 20} to {last.resident >> 20} MB")
    for name in ("threads", "descriptors"):
        before, after = getattr(first, name), getattr(last, name)
        if after > before:
            found.append(f"{name} grew from {before} to {after}")
    return found


class Rate(ProgressColumn):
    """Requests per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f}/s")


def soak(a: argparse.Namespace, model: Path, folder: Path) -> list[str]:
    """The whole; returns the violations."""
    console, known, usages = Console(stderr=True), cases(a.seed), list[Usage]()
    expected = alone(model, known, folder)
    log = folder / "crowded.log"
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()
    numbers = range(a.requests) if a.only is None else range(a.only, a.only + 1)
    parts = [numbers[len(numbers) * i // PARTS : len(numbers) * (i + 1) // PARTS] for i in range(PARTS)]
    begun = time.monotonic()
    with Served(phiquant(model, *CROWDED), log) as server:
        run = Soak(server.port, a.seed, known, expected)
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("requests", total=len(numbers))

            async def part(chosen: Sequence[int]) -> None:
                left = iter(chosen)

                async def client() -> None:
                    for number in left:
                        await run.one(number)
                        bar.advance(task)

                await asyncio.gather(*(client() for _ in range(a.concurrency)))

            for chosen in parts:
                asyncio.run(part(chosen))
                usage, left = settled(server, usages[-1] if usages else None)
                usages.append(usage)
                if left:
                    run.violations.append(f"after request {chosen.stop - 1}: {left}")
        preempted = gauges(server.port).get("preempted", 0)
        status = server.end()
    if status:
        run.violations.append(f"the server's exit status is {status}")
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if entry.get("status", 0) >= 500 or "Traceback" in entry.get("message", ""):
                run.violations.append(f"the log has: {line[:2000]}")
            continue
        if "Traceback" in line or "Error" in line:
            run.violations.append(f"the log has: {line[:2000]}")
    run.violations += grown(usages) if a.only is None else []
    seconds = time.monotonic() - begun
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(run.done.items()))
    print(f"{len(numbers)} requests in {seconds:.0f} s ({len(numbers) / seconds:.1f}/s): {counts}")
    print(f"pages ran out {preempted:.0f} times")
    print("after each tenth: " + "; ".join(f"{u.resident >> 20} MB" for u in usages))
    print(f"threads {[u.threads for u in usages]}, descriptors {[u.descriptors for u in usages]}")
    if a.log is not None:
        a.log.write_bytes(log.read_bytes())
    return run.violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="send this request alone")
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the bundled model as Q8_0")
    parser.add_argument("--log", type=Path, help="keep the server's log there")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = a.model
        if model is None:
            from phiquant.convert import convert

            model = Path(name) / "tiny.gguf"
            convert(BUNDLED, model, "q8_0")
        violations = soak(a, model, Path(name))
    for violation in violations[:20]:
        print(f"VIOLATION: {violation}")
    if violations:
        again = f"--requests {a.requests} --concurrency {a.concurrency} --seed {a.seed}"
        print(f"{len(violations)} violations; again: python benchmarks/soak.py {again}; one alone: --only N")
        sys.exit(1)
    print("no violation")


if __name__ == "__main__":
    main()
