"""docs/parity.md's table: how far phiquant and llama.cpp are from transformers on the models of the parity tests.

    python scripts/parity_table.py [--models NAME,...] [--oracle PYTHON] [--peer PYTHON] [--page FILE] [--json FILE]

`make parity-table` runs it. The models are those of tests/parity (conftest.py and models_*.py), and the bundled one.
What is right is what transformers says; of PhiMoE and Phi-3-small, which it runs otherwise than they were released or
not at all, what the float64 implementations beside the tests say (numpy_*.py).

Every model is converted here, to F32, and the one file is given to both engines, with caches in float32. What stands
between the two marks of the page is replaced; the rest is written by hand.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from phiquant.convert import convert
from phiquant.errors import PhiquantError
from phiquant.eval.certify import Borders, certify, compared
from phiquant.eval.measure import Block, RowsBase
from phiquant.eval.oracle import Transformers
from phiquant.eval.statistics import Divergence
from phiquant.llm import LLM

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phiquant"
PAGE = ROOT / "docs" / "parity.md"
TINY = ROOT / "models" / "phi3-tiny"
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"

PLAIN = 200  # tokens of a sequence where there is no border
BEYOND = 72  # tokens beyond one
PADDING = 256  # llama.cpp's contexts are a multiple of this
LARGE = 2048  # tokens of a large context of llama.cpp
REFUSED = 3  # exit status of the program below: llama.cpp does not load the file

PEER = """
import ctypes, json, sys
import numpy as np, llama_cpp as L
job = json.load(sys.stdin)
said = []
log = L.llama_log_callback(lambda level, text, data: said.append(text.decode(errors="replace")))
L.llama_log_set(log, ctypes.c_void_p(0))
model = L.llama_model_load_from_file(job["model"].encode(), L.llama_model_default_params())
if not model:
    print("".join(said[-3:]), file=sys.stderr)
    sys.exit(job["refused"])
vocab = L.llama_model_get_vocab(model)
n_vocab = L.llama_vocab_n_tokens(vocab)
for number, (ids, context) in enumerate(job["runs"]):
    cp = L.llama_context_default_params()
    cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_threads, cp.n_threads_batch = context, len(ids), 512, 2, 2
    cp.type_k = cp.type_v = 0
    cp.flash_attn_type = 0
    ctx = L.llama_init_from_model(model, cp)
    assert ctx and L.llama_n_ctx(ctx) == context, "".join(said[-3:])
    batch = L.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert L.llama_decode(ctx, batch) == 0
    rows = [np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), shape=(n_vocab,)) for i in range(len(ids))]
    np.save(f"{job['out']}-{number}.npy", np.stack(rows))
    L.llama_batch_free(batch)
    L.llama_free(ctx)
"""


class Refused(Exception):  # noqa: N818 - an answer
    """llama.cpp does not load a file; its own words."""


@dataclass(frozen=True)
class Bundled:
    """The bundled model, which is trained, on a text that it has not seen."""

    name: str = TINY.name

    def ids(self, length: int) -> list[int]:
        tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        return tokenizer.encode((TINY / "evaluation.txt").read_text(encoding="utf-8")).ids[:length]


@dataclass(frozen=True)
class Row:
    """One sequence of one model: divergence of both engines; of llama.cpp by its context, or why there is none."""

    model: str
    borders: Borders
    tokens: int
    ours: Divergence
    theirs: dict[int, Divergence] | str


@dataclass(frozen=True)
class Subject:
    """A model of the table: how its checkpoint is written and, where transformers is not asked, what is right."""

    label: str
    model: Any
    write: Callable[[Any, Path], Path]
    truth: Callable[[Any, Sequence[int]], np.ndarray] | None = None


def subjects() -> list[Subject]:
    """All models, by architecture."""
    conftest = module("conftest")
    found = [Subject(TINY.name, Bundled(), lambda _, folder: Path(shutil.copytree(TINY, folder)))]
    write = conftest.write_checkpoint
    found += [Subject(f"phi3 {name}", model, write) for name, model in conftest.MODELS.items()]
    for family in ("phi2", "llama"):
        found += [Subject(f"{family} {name}", model, write) for name, model in conftest.FAMILIES[family].items()]
    phimoe, moe = module("models_phimoe"), module("numpy_phimoe")
    small, wide = module("models_phi3small"), module("numpy_phi3small")
    found += [
        Subject(
            f"phimoe {name}",
            model,
            phimoe.write_checkpoint,
            lambda m, ids: moe.PhiMoE(m.config(), m.weights()).logits(ids),
        )
        for name, model in phimoe.MODELS.items()
    ]
    found += [
        Subject(f"phi3small {name}", model, write, lambda m, ids: wide.logits(m, m.weights(), list(ids)))
        for name, model in (small.MODELS | small.OTHERS).items()
    ]
    return found


def module(name: str) -> Any:
    """A file of tests/parity."""
    folder = ROOT / "tests" / "parity"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # they import one another by name
    return importlib.import_module(name)


def lengths(borders: Borders, plain: int = PLAIN) -> list[int]:
    """Below, at and beyond every border; `plain` where there is none."""
    there = [border for border in (borders.original, borders.window) if border]
    found = {min(length, borders.context) for border in there for length in (border, border + 1, border + BEYOND)}
    if borders.original:
        found.add(borders.original // 2)
    return sorted(found) or [plain]


def contexts(borders: Borders, tokens: int) -> list[int]:
    """llama.cpp's: the smallest that holds a sequence, and, where the size of the context tells, a large one."""
    small = -(-tokens // PADDING) * PADDING
    return [small, LARGE] if small <= borders.original else [small]


def blocks_of(logits: Sequence[np.ndarray]) -> Iterator[Block]:
    return ((index, 0, rows) for index, rows in enumerate(logits))


def measured(subject: Subject, oracle: Path, peer: Path, folder: Path) -> Iterator[Row]:
    model = subject.model
    checkpoint = subject.write(model, folder / "checkpoint")
    borders = Borders.of_checkpoint(checkpoint)
    tokens = lengths(borders, getattr(model, "length", PLAIN))
    file = folder / "model.gguf"
    convert(checkpoint, file, "f32", quiet=True)
    sequences = [model.ids(count) for count in tokens]
    truth = expected(subject, checkpoint, sequences, oracle)
    with LLM.load(file, context=max(tokens), cache_type="f32", speculate=False) as llm:
        found = compared(RowsBase(blocks_of(truth)), llm.stream_logits(sequences), tokens)
    certificate = certify({"checkpoint": subject.label}, borders, found)
    runs = [(i, context) for i, count in enumerate(tokens) for context in contexts(borders, count)]
    theirs: dict[int, dict[int, Divergence]] | str = {i: {} for i in range(len(tokens))}
    try:
        answers = peer_logits(peer, file, [(sequences[i], context) for i, context in runs], folder)
    except Refused as refused:
        theirs = str(refused)
    else:
        for (i, context), logits in zip(runs, answers, strict=True):
            ((values, same),) = compared(RowsBase(iter([(0, 0, truth[i])])), iter([(0, 0, logits)]), [tokens[i]])
            theirs[i][context] = Divergence.of(values, same)
    for i, part in enumerate(certificate.parts):
        yield Row(
            subject.label, borders, part.tokens, part.divergence, theirs if isinstance(theirs, str) else theirs[i]
        )


def expected(subject: Subject, checkpoint: Path, sequences: list[list[int]], python: Path) -> list[np.ndarray]:
    """Logits that are right, of each sequence."""
    if subject.truth is not None:
        return [subject.truth(subject.model, ids).astype(np.float32) for ids in sequences]
    with Transformers(checkpoint, sequences, python) as oracle:
        groups = itertools.groupby(oracle.blocks(), key=lambda block: block[0])
        return [np.concatenate([rows for _, _, rows in group]) for _, group in groups]


def peer_logits(python: Path, file: Path, runs: list[tuple[list[int], int]], folder: Path) -> list[np.ndarray]:
    """llama.cpp's, of each run; Refused if it does not load the file."""
    out = folder / "theirs"
    job = {"model": str(file), "runs": runs, "out": str(out), "refused": REFUSED}
    done = subprocess.run(
        [python, "-c", PEER], input=json.dumps(job), capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode == REFUSED:
        raise Refused(done.stderr.strip())
    if done.returncode:
        sys.exit(f"parity_table: error: llama.cpp failed, by {python}: {done.stderr.strip()[-500:]}")
    return [np.load(f"{out}-{number}.npy") for number in range(len(runs))]


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | tokens | phiquant | largest | same top | llama.cpp's context | llama.cpp | largest | same top |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    before = ""
    for row in rows:
        name = "" if row.model == before else f"`{row.model}`"
        before = row.model
        cells = [f"{row.tokens}{where(row)}", *figures(row.ours)]
        if isinstance(row.theirs, str):
            lines.append("| " + " | ".join([name, *cells, "refuses the file", "", "", ""]) + " |")
            continue
        for context, found in row.theirs.items():
            lines.append("| " + " | ".join([name, *cells, str(context), *figures(found)]) + " |")
            name, cells = "", ["", "", "", ""]
    return "\n".join(lines)


def where(row: Row) -> str:
    """How a sequence lies to the borders of its model."""
    borders, notes = row.borders, []
    if borders.original:
        notes.append("short factors" if row.tokens <= borders.original else "long factors")
    if borders.window:
        notes.append("within the window" if row.tokens <= borders.window else f"window {borders.window}")
    return "".join(f", {note}" for note in notes)


def figures(found: Divergence) -> list[str]:
    return [f"{found.mean:.1e}", f"{found.maximum:.1e}", f"{100 * found.top1:.1f} %"]


def replaced(page: str, rows: str) -> str:
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not rest or END not in rest:
        sys.exit(f"parity_table: error: the page has no marks {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{rows}\n\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The table of docs/parity.md.")
    parser.add_argument("--models", help="names, separated by commas; all by default")
    parser.add_argument("--oracle", type=Path, default=CACHE / "parity/bin/python", help="a Python with transformers")
    parser.add_argument("--peer", type=Path, default=CACHE / "interop/bin/python", help="a Python with llama_cpp")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--json", type=Path, help="write all figures there as well")
    arguments = parser.parse_args()
    found = {subject.label: subject for subject in subjects()}
    wanted = arguments.models.split(",") if arguments.models else list(found)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        sys.exit(f"parity_table: error: there is no model {unknown[0]!r}; there are {', '.join(found)}")
    rows: list[Row] = []
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="phiquant-parity-") as temporary:
            for row in measured(found[name], arguments.oracle, arguments.peer, Path(temporary)):
                rows.append(row)
                print(*table([row]).splitlines()[2:], sep="\n", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    page = arguments.page
    page.write_text(replaced(page.read_text(encoding="utf-8"), table(rows)), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except PhiquantError as error:
        sys.exit(f"parity_table: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
