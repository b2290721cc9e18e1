"""llama-bench, run in turns with us on the same file."""

import json
import os
import subprocess
from pathlib import Path

from phiquant.bench.measure import Job
from phiquant.errors import RequestError

__all__ = ["Peer"]


class Peer:
    """A llama-bench program.

    Args:
        path: of the program; its folder is searched for its libraries.

    Raises:
        RequestError: there is no such program.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        if not self.path.is_file() or not os.access(self.path, os.X_OK):
            raise RequestError(f"{path} is not a program; --against takes llama-bench=PATH of llama.cpp's llama-bench")
        libraries = os.pathsep.join(filter(None, [str(self.path.parent), os.environ.get("LD_LIBRARY_PATH")]))
        self._environment = os.environ | {"LD_LIBRARY_PATH": libraries}
        self.version = ""

    def speed(self, job: Job, threads: int) -> float:
        """Tokens per second of a job, after a run that is not counted; RequestError if the program fails."""
        setting = job.setting
        if job.prompt and job.generated:
            test = ["-p", "0", "-n", "0", "-pg", f"{job.prompt},{job.generated}"]
        else:
            test = ["-p", str(job.prompt), "-n", str(job.generated)]
        command = [str(self.path), "-m", setting.model, *test, "-d", str(job.depth), "-r", "1", "-o", "json"]
        command += ["-t", str(threads), "-b", str(setting.batch), "-ub", str(setting.batch)]
        command += ["-ctk", setting.cache_type, "-ctv", setting.cache_type]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        try:
            (row,) = json.loads(done.stdout)
            self.version = f"llama.cpp {row['build_commit']} ({row['build_number']})"
            return float(row["avg_ts"])
        except (ValueError, KeyError, TypeError):
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            said = lines[-1] if lines else f"status {done.returncode}"
            raise RequestError(f"{self.path.name} gave no result for {job.name} of {setting.model}: {said}") from None
