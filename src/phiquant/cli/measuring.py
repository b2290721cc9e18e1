"""A file measured beside the model that it was made from, as `measure` and `quantize` show it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from phiquant.calibrate import held_out
from phiquant.cli.loaded import WINDOW, reading_model
from phiquant.cli.notices import Notices
from phiquant.cli.reading import ReadingBar, text_of
from phiquant.errors import RequestError
from phiquant.eval.quality import beside, check_vocabularies, quality_of, token_windows
from phiquant.gguf import open_model
from phiquant.gguf.quality import Quality
from phiquant.text import Tokenizer

__all__ = ["MeasureText", "measured"]

_METHOD = "KL(reference || file) in nats, second half of each window"


@dataclass(frozen=True)
class MeasureText:
    """What is read to measure.

    Attributes:
        path: of the text, for messages.
        text: what it says.
        sha256: of the file's bytes.
        held_out: read only the end that `calibrate.held_out` keeps from calibrations.
    """

    path: Path
    text: str
    sha256: str
    held_out: bool = False

    @classmethod
    def read(cls, path: Path, *, held_out: bool = False) -> "MeasureText":
        """RequestError if the file is no text."""
        return cls(path, text_of(path), hashlib.sha256(path.read_bytes()).hexdigest(), held_out)

    @property
    def method(self) -> str:
        """What is recorded of how it was measured; of a length that is known beforehand."""
        return f"{_METHOD}; {'the end of the calibration text, held out' if self.held_out else 'a text of its own'}"

    def unknown(self, reference: str) -> Quality:
        """The place for what will be measured."""
        return Quality.unknown(text_sha256=self.sha256, reference=reference, method=self.method)

    def check(self, reference: Path) -> int | None:
        """How many of its first tokens a calibration may read, None for all of what is not measured on.

        RequestError if it is too short, before anything is done that takes long.
        """
        with open_model(reference) as opened:
            tokenizer = Tokenizer.from_gguf(opened)
        count = len(tokenizer.encode(self.text, special=False))
        if self.held_out:
            return held_out(count, WINDOW)[0] * WINDOW
        if count < 2 * WINDOW:
            raise RequestError(
                f"{self.path} has {count} tokens and must have at least {2 * WINDOW} to be measured on; "
                "give a longer text"
            )
        return None


def measured(
    file: Path,
    reference: Path,
    text: MeasureText,
    *,
    called: str,
    size: int = WINDOW,
    first: int = 0,
    chunks: int | None = None,
    threads: int = 0,
    cache_type: str = "f16",
    quiet: bool = False,
) -> Quality:
    """Run both models on a text, in windows of `size` tokens.

    Args:
        file: what is measured.
        reference: what it is measured beside.
        text: what both read.
        called: what the reference is called in the result.
        size: tokens of a window.
        first: windows left out at the beginning; of what is held out, all before it.
        chunks: read at most this many.
        threads: native threads; 0 for as many as the process may use.
        cache_type: of the key-value caches.
        quiet: show nothing.
    """
    notices = Notices(quiet=quiet)
    with (
        reading_model(reference, size, notices, threads=threads, cache_type=cache_type) as base,
        reading_model(file, size, notices, threads=threads, cache_type=cache_type) as model,
    ):
        check_vocabularies(model.tokenizer, base.tokenizer, (str(file), str(reference)))
        if text.held_out:
            first, chunks = held_out(len(base.tokenize(text.text, special=False)), size)
        windows = token_windows(base, text.text, size, first=first, limit=chunks)
        found, course = beside(model, base, windows)
        with ReadingBar("measuring", size, quiet=quiet) as bar:
            for done in course:
                bar.advanced(done.windows, len(windows), f"KL divergence {done.divergence:.6f}")
        return quality_of(
            found.comparison, windows, first=first, text_sha256=text.sha256, reference=called, method=text.method
        )
