"""`phiquant serve` under load beside llama.cpp's `llama-server`: the same file, threads, places and requests, in turns.

    python benchmarks/server_load.py MODEL.gguf --against LLAMA_SERVER [--streams 1,4,8,16] [--requests 4] [--rounds 3]
        [--threads 2] [--context 1280] [--seed 0] [--no-results]

One server runs at a time, each with as many places as there are clients. Every client asks for texts one after the
other (/v1/completions, streamed): prompts of 16 to 800 tokens, most of them short, and 16 to 128 tokens of output,
sampled and without an end, so that both servers have the same work. Then a chat with a system prompt of 1,000 tokens,
twice: the second question finds the beginning computed.

    tokens/s         of prompts and outputs, from the first request to the last answer; and of outputs alone
    first            seconds from a request to its first text
    between          seconds between two pieces of a text

Figures are medians of the rounds, ratios medians of neighbouring turns. Rows go to benchmarks/results.csv, tables in
Markdown to the terminal.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from http_stream import post
from phiquant.gguf import open_model
from phiquant.text import Tokenizer
from results import Result, append, commit, processor, today
from served import Served, llama_server, phiquant

TEXT = Path(__file__).resolve().parent.parent / "models" / "phi3-tiny" / "evaluation.txt"
SAMPLING = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "ignore_eos": True}
SHORTEST, LONGEST = 16, 800  # tokens of prompts
LEAST, MOST = 16, 128  # tokens of outputs
SYSTEM = 1000  # tokens of the shared system prompt
QUESTIONS = "What is it about?", "Who is in it, and what do they want?"


@dataclass(frozen=True)
class Asked:
    """A request: text, its tokens, tokens to generate, seed."""

    prompt: str
    tokens: int
    output: int
    seed: int


@dataclass(frozen=True)
class Told:
    """When the answer came: seconds to the first piece and between pieces; what was counted."""

    first: float
    between: tuple[float, ...]
    prompt: int
    output: int


@dataclass(frozen=True)
class Load:
    """A turn of a server: tokens per second, seconds."""

    total: float
    generated: float
    first_50: float
    first_95: float
    between_95: float


class Prompts:
    """Prompts of a wanted number of tokens: words of a text in random order, so that no two begin alike."""

    def __init__(self, model: Path, seed: int) -> None:
        with open_model(model) as opened:
            self._tokenizer = Tokenizer.from_gguf(opened)
        self._words = TEXT.read_text("utf-8").split()
        self._random = random.Random(seed)

    def text(self, tokens: int) -> str:
        """A text of exactly so many tokens."""
        while True:
            text = " ".join(self._random.choices(self._words, k=tokens))
            while (extra := len(self._tokenizer.encode(text)) - tokens) > 0:
                text = text[: -max(1, extra)]
            if extra == 0 and text == text.strip():
                return text

    def requests(self, count: int) -> list[Asked]:
        """Prompts whose lengths' logarithms are uniform, outputs whose lengths are."""
        draw = self._random
        found = []
        for _ in range(count):
            tokens = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
            found.append(Asked(self.text(tokens), tokens, draw.randint(LEAST, MOST), draw.getrandbits(31)))
        return found


async def tell(port: int, path: str, body: dict[str, object]) -> Told:
    """One request, streamed."""
    begun, times, usage = time.perf_counter(), [], None
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with post(port, path, body) as answer:
        if answer.status != 200:
            sys.exit(f"{path}: status {answer.status}: {await answer.json()}")
        async for event in answer.events():
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if choice.get("text") or choice.get("delta", {}).get("content"):
                    times.append(time.perf_counter())
    if usage is None or not times:
        sys.exit(f"{path}: the answer has no text, or no usage")
    between = tuple(b - a for a, b in pairwise(times))
    return Told(times[0] - begun, between, usage["prompt_tokens"], usage["completion_tokens"])


async def load(port: int, asked: Sequence[Asked], streams: int, done: Callable[[], None]) -> Load:
    """`streams` clients share the requests; each sends the next one when it has its answer."""
    left, told = iter(asked), list[Told]()

    async def client(left: Iterator[Asked]) -> None:
        for one in left:
            body = {"prompt": one.prompt, "max_tokens": one.output, "seed": one.seed, **SAMPLING}
            answer = await tell(port, "/v1/completions", body)
            if (answer.prompt, answer.output) != (one.tokens, one.output):
                sys.exit(f"asked for {one.tokens} + {one.output} tokens, got {answer.prompt} + {answer.output}")
            told.append(answer)
            done()

    begun = time.perf_counter()
    await asyncio.gather(*(client(left) for _ in range(streams)))
    seconds = time.perf_counter() - begun
    output = sum(one.output for one in told)
    firsts, gaps = [one.first for one in told], [gap for one in told for gap in one.between]
    return Load(
        (sum(one.prompt for one in told) + output) / seconds,
        output / seconds,
        *(float(np.percentile(firsts, share)) for share in (50, 95)),
        float(np.percentile(gaps, 95)),
    )


async def shared(port: int, system: str) -> tuple[float, float]:
    """Seconds to the first text of two chats with one system prompt."""
    found = []
    for question in QUESTIONS:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = {"messages": messages, "max_tokens": 8, "seed": 1, **SAMPLING}
        found.append((await tell(port, "/v1/chat/completions", body)).first)
    return found[0], found[1]


class Turns:
    """Both servers' processes; options and threads are those of the command line."""

    def __init__(self, a: argparse.Namespace, folder: Path) -> None:
        self._a, self._folder = a, folder

    def servers(self, streams: int) -> dict[str, Callable[[int], list[str]]]:
        """Commands of both for so many places."""
        a = self._a
        same = ["-t", str(a.threads), "--parallel", str(streams)]
        return {
            "phiquant": phiquant(a.model, *same, "-c", str(a.context), "--quiet", *a.ours.split()),
            "llama-server": llama_server(
                a.against, a.model, *same, "-c", str(streams * a.context), "--cont-batching", *a.theirs.split()
            ),
        }

    def started(self, name: str, streams: int) -> Served:
        """One of them; it has answered a request when the `with` begins."""
        return Served(self.servers(streams)[name], self._folder / f"{name}.log")


def warm(port: int) -> None:
    body: dict[str, object] = {"prompt": "Once upon a time", "max_tokens": 8, "seed": 1, **SAMPLING}
    asyncio.run(tell(port, "/v1/completions", body))


def measure(a: argparse.Namespace, names: Sequence[str]) -> tuple[dict[int, list[list[Load]]], list[list[list[float]]]]:
    """Loads by streams, round and server; seconds of both chats, by round and server, for several system prompts."""
    prompts = Prompts(a.model, a.seed)
    loads: dict[int, list[list[Load]]] = {}
    chats: list[list[list[float]]] = []
    columns = TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    total = a.rounds * len(names) * sum(a.requests * max(n, 2) for n in a.streams)
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar,
    ):
        turns, task = Turns(a, Path(folder)), bar.add_task("", total=total)
        for streams in a.streams:
            asked = prompts.requests(a.requests * max(streams, 2))
            loads[streams] = []
            for turn in range(a.rounds):
                found = {}
                for name in names if turn % 2 == 0 else names[::-1]:
                    bar.update(task, description=f"{name}, {streams} streams, round {turn + 1}")
                    with turns.started(name, streams) as server:
                        warm(server.port)
                        found[name] = asyncio.run(load(server.port, asked, streams, lambda: bar.advance(task)))
                    told = found[name]
                    bar.console.print(
                        f"{name}, {streams} streams, round {turn + 1}: {told.total:.1f} tokens/s, first text "
                        f"{told.first_50:.2f} s, for 95 % {told.first_95:.2f} s",
                        highlight=False,
                        soft_wrap=True,
                    )
                loads[streams].append([found[name] for name in names])
        for turn in range(a.rounds):
            system = prompts.text(SYSTEM)
            seconds = {}
            for name in names if turn % 2 == 0 else names[::-1]:
                bar.update(task, description=f"{name}, shared system prompt, round {turn + 1}")
                with turns.started(name, 2) as server:
                    warm(server.port)
                    seconds[name] = list(asyncio.run(shared(server.port, system)))
            chats.append([seconds[name] for name in names])
    return loads, chats


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Medians of both, and of their ratios."""
    ours, theirs = zip(*pairs, strict=True)
    return statistics.median(ours), statistics.median(theirs), statistics.median(x / y for x, y in pairs)


def report(a: argparse.Namespace, loads: dict[int, list[list[Load]]], chats: list[list[list[float]]]) -> list[Result]:
    """Prints the tables; returns the rows."""
    head, name = (today(), commit(), processor(), a.threads), a.model.name.removesuffix(".gguf")
    peer, rows = ("llama-server", a.build), []

    def row(what: str, unit: str, pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
        mine, its, share = ratio(pairs)
        rows.append(Result(*head, f"{name}: {what}", mine, unit, *peer, its, share))
        return mine, its, share

    figures = (
        ("total", "tokens/s", "tokens/s"),
        ("generated", "generated tokens/s", "tokens/s"),
        ("first_50", "first text, median", "s"),
        ("first_95", "first text, 95 %", "s"),
        ("between_95", "between pieces, 95 %", "s"),
    )
    print("| streams |" + "".join(f" {what} | llama-server | ratio |" for _, what, _ in figures))
    print("| --: |" + " --: |" * 3 * len(figures))
    for streams, rounds in loads.items():
        cells = []
        for field, what, unit in figures:
            pairs = [(getattr(ours, field), getattr(theirs, field)) for ours, theirs in rounds]
            mine, its, share = row(f"serving {streams} streams, {what}", unit, pairs)
            form = ".3f" if unit == "s" else ".1f"
            cells.append(f" {mine:{form}} | {its:{form}} | {share:.2f} |")
        print(f"| {streams} |" + "".join(cells))
    print(
        f"\n| system prompt of {SYSTEM} tokens, shared | phiquant | llama-server | ratio |\n| --- | --: | --: | --: |"
    )
    for at, what in enumerate(("first", "second")):
        mine, its, share = row(f"first text of the {what} chat, s", "s", [(x[at], y[at]) for x, y in chats])
        print(f"| first text, {what} request, s | {mine:.3f} | {its:.3f} | {share:.2f} |")
    gains = [(x[0] / x[1], y[0] / y[1]) for x, y in chats]
    mine, its, share = row("first text of the first chat over the second's", "ratio", gains)
    print(f"| first over second | {mine:.1f} | {its:.1f} | {share:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", type=Path, required=True, help="llama-server")
    parser.add_argument("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=4, help="of each client; of one client alone twice as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=1280, help="of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ours", default="", help="further options of phiquant serve")
    parser.add_argument("--theirs", default="", help="further options of llama-server")
    parser.add_argument("--build", default="native build", help="what to call the peer's build in results.csv")
    parser.add_argument("--no-results", action="store_true")
    a = parser.parse_args()
    rows = report(a, *measure(a, ("phiquant", "llama-server")))
    if not a.no_results:
        append(rows)


if __name__ == "__main__":
    main()
