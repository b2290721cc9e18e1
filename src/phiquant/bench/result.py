"""What was measured, as a table, JSON or CSV."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phiquant.bench.measure import Job

__all__ = ["Result", "ratio", "render"]


@dataclass
class Result:
    """Speeds of a job in tokens per second, and what was measured beside them.

    Attributes:
        size, parameters: bytes of the model's tensors, and weights.
        threads, backend: what it ran with.
        speeds: of each run.
        peer: llama-bench's, each in turn with ours.
        products, bandwidth: limits of the machine beside each run: operations/s of 8-bit dot products, bytes/s read.
    """

    job: Job
    model: str
    size: int
    parameters: int
    backend: str
    threads: int
    speeds: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    @property
    def document(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        setting = self.job.setting
        found: dict[str, Any] = {
            "model": self.model,
            "model_filename": setting.model,
            "model_size": self.size,
            "model_n_params": self.parameters,
            "backend": self.backend,
            "n_threads": self.threads,
            "n_batch": setting.batch,
            "type_kv": setting.cache_type,
            "bf16_dot": setting.bf16_dot,
            "n_prompt": self.job.prompt,
            "n_gen": self.job.generated,
            "n_depth": self.job.depth,
            "test": self.job.name,
            "avg_ts": statistics.fmean(self.speeds),
            "stddev_ts": deviation(self.speeds),
            "samples_ts": self.speeds,
        }
        if self.peer:
            found |= {"peer_avg_ts": statistics.fmean(self.peer), "peer_samples_ts": self.peer, "ratio": ratio(self)}
        if self.products:
            found |= {
                "dot_products_per_second": statistics.median(self.products),
                "read_bytes_per_second": statistics.median(self.bandwidth),
                "dot_products_samples": self.products,
                "read_bytes_samples": self.bandwidth,
            }
        return found


def ratio(result: Result) -> float:
    """The median of the ratios of neighbouring turns, ours by llama-bench's."""
    return statistics.median(a / b for a, b in zip(result.speeds, result.peer, strict=True))


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def render(results: Sequence[Result], form: str) -> str:
    """All results as "md", "json", "jsonl" or "csv"."""
    documents = [result.document for result in results]
    if form == "json":
        return json.dumps(documents, indent=2) + "\n"
    if form == "jsonl":
        return "".join(json.dumps(document) + "\n" for document in documents)
    if form == "csv":
        out = io.StringIO()
        names = dict.fromkeys(name for document in documents for name in document if "samples" not in name)
        writer = csv.DictWriter(out, list(names), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(documents)
        return out.getvalue()
    return _table(results)


def _table(results: Sequence[Result]) -> str:
    columns = ["model", "size", "params", "backend", "threads", "batch", "cache", "test", "t/s"]
    if any(r.peer for r in results):
        columns += ["llama-bench t/s", "ratio"]
    if any(r.products for r in results):
        columns += ["dot GOP/s", "read GB/s"]
    rows = []
    for r in results:
        row = [r.model, f"{r.size / 2**30:.2f} GiB", f"{r.parameters / 1e9:.2f} B", r.backend, str(r.threads)]
        row += [str(r.job.setting.batch), r.job.setting.cache_type, r.job.name, _spread(r.speeds)]
        if r.peer:
            row += [_spread(r.peer), f"{ratio(r):.2f}"]
        if r.products:
            row += [f"{statistics.median(r.products) / 1e9:.0f}", f"{statistics.median(r.bandwidth) / 1e9:.1f}"]
        rows.append(row)
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * (w - 1) + ":" if i > 2 else "-" * w for i, w in enumerate(widths)], *rows]
    text = ""
    for line in lines:
        cells = [
            cell.rjust(w) if i > 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ± {deviation(values):.2f}"
