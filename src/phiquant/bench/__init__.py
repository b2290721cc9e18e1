"""What `phiquant bench` measures: speeds by llama-bench's definitions, beside the machine's limits and llama-bench."""

from phiquant.bench.measure import Bench, Job, grouped, jobs
from phiquant.bench.peer import Peer
from phiquant.bench.result import Result, ratio, render

__all__ = ["Bench", "Job", "Peer", "Result", "grouped", "jobs", "ratio", "render"]
