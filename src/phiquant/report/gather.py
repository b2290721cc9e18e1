"""Running all models of a report, one after the other: the memory is that of the largest, whatever their number.

The reference reads the text once and its log-probabilities are kept in a file, in 16 bits each, as llama-perplexity
keeps them; each file then reads the text beside it.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError, RequestError
from ..eval.continuations import Continuation, continued
from ..eval.measure import Measurement
from ..eval.quality import check_vocabularies, token_windows
from ..eval.saved import SavedLogits, SavedWriter
from ..eval.windows import Windows
from ..gguf import GGUFFile, keys, open_model, parameter_count
from ..gguf.describe import file_type_name, made_here
from ..llm import LLM
from ..text import Tokenizer
from .figures import FileFigures, ReferenceFigures, Report, labels
from .weights import weight_errors

__all__ = ["Gathering", "Progress", "gather"]

Load = Callable[[Path], AbstractContextManager[LLM]]


class Progress(Protocol):
    """Told what happens."""

    def reading(self, what: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """A model begins to read: windows done, windows in all, what was found so far."""

    def weighing(self, what: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Weights begin to be compared: bytes done since the last call."""


@dataclass(frozen=True)
class Gathering:
    """What a report is to be made of.

    Attributes:
        reference, files: GGUF files; of a model in several parts, the first.
        text, text_name, text_sha256: what is read, its name, and the hash of its file.
        size, chunks: tokens of a window, and how many windows at most.
        prompts: what all continue; none: the beginning of the text.
        chat: prompts are messages of a chat.
        tokens: of a continuation, at most.
        importance: by tensor, [matrices, columns]; weighs errors of weights.
        weighted_by: what the importance is called.
        folder: where the reference's log-probabilities are kept meanwhile.
    """

    reference: Path
    files: Sequence[Path]
    text: str
    text_name: str
    text_sha256: str
    folder: Path
    size: int = 512
    chunks: int | None = None
    prompts: Sequence[str] = ()
    chat: bool = False
    tokens: int = 64
    importance: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    weighted_by: str | None = None
    threads: int = 0


_BEGINNING = 24  # tokens of the text that are continued if there is no prompt


def gather(wanted: Gathering, load: Load, progress: Progress) -> Report:
    """Run everything. RequestError if a file has another vocabulary than the reference; else as `LLM` and `open_model`.

    `load` loads a model with room for the windows and the continuations.
    """
    tokenizer = _checked(wanted)
    prompts = [*wanted.prompts] or [tokenizer.decode(tokenizer.encode(wanted.text, special=False)[:_BEGINNING])]
    try:
        folder = tempfile.TemporaryDirectory(prefix=".phiquant-report-", dir=wanted.folder)
    except OSError as error:
        raise OutputError(f"{wanted.folder} cannot hold a temporary file: {error.strerror or error}.") from error
    with folder as name:
        saved = Path(name) / "reference.kld"
        with load(wanted.reference) as llm:
            windows = token_windows(llm, wanted.text, wanted.size, limit=wanted.chunks)
            with SavedWriter(saved, windows, llm.config.vocab_size) as writer:
                measured = Measurement(llm, windows, save=writer)
                with progress.reading(wanted.reference.name) as advanced:
                    for done in measured.run():
                        advanced(done.windows, len(windows), f"perplexity {done.perplexity:.4f}")
                writer.commit()
            samples = _samples(llm, prompts, wanted)
        with open_model(wanted.reference) as gguf:
            reference = ReferenceFigures(
                wanted.reference, _title(gguf), file_type_name(gguf) or "", gguf.size, measured.perplexity, samples
            )
            files = [
                _file(path, label, gguf, saved, windows, prompts, wanted, load, progress)
                for path, label in zip(wanted.files, labels(wanted.files), strict=True)
            ]
    return Report(
        reference,
        tuple(files),
        wanted.text_name,
        wanted.text_sha256,
        windows.size,
        len(windows),
        windows.first,
        wanted.weighted_by,
        tuple(prompts),
        tuple(_remarks(files)),
    )


def _checked(wanted: Gathering) -> Tokenizer:
    """What would be refused after hours is refused at once; the reference's tokenizer."""
    if not wanted.files:
        raise RequestError("there is no file to report on")
    with open_model(wanted.reference) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf)
    for path in wanted.files:
        with open_model(path) as gguf:
            check_vocabularies(Tokenizer.from_gguf(gguf), tokenizer, (str(path), str(wanted.reference)))
    return tokenizer


def _file(
    path: Path,
    label: str,
    reference: GGUFFile,
    saved: Path,
    windows: Windows,
    prompts: Sequence[str],
    wanted: Gathering,
    load: Load,
    progress: Progress,
) -> FileFigures:
    with load(path) as llm, SavedLogits(saved) as base:
        own = token_windows(llm, wanted.text, wanted.size, limit=wanted.chunks)
        if own.bos != windows.bos or not np.array_equal(own.tokens, windows.tokens):
            raise RequestError(f"{path} reads the text as other tokens than the reference; choose another reference")
        measured = Measurement(llm, windows, base=base)
        with progress.reading(path.name) as advanced:
            for done in measured.run():
                advanced(done.windows, len(windows), f"KL divergence {done.divergence:.6f}")
        samples = _samples(llm, prompts, wanted)
    with open_model(path) as gguf:
        total = sum(info.nbytes for info in gguf.tensors.values())
        with progress.weighing(path.name, total) as weighed:
            weights = weight_errors(gguf, reference, wanted.importance, weighed, wanted.threads)
        return FileFigures(
            path=path,
            label=label,
            title=_title(gguf),
            file_type=file_type_name(gguf) or "",
            made_here=made_here(gguf),
            size=gguf.size,
            bits=8 * total / max(1, parameter_count(gguf.tensors.values())),
            comparison=measured.comparison,
            by_position=tuple(measured.by_position.tolist()),
            weights=tuple(weights),
            samples=samples,
        )


def _samples(llm: LLM, prompts: Sequence[str], wanted: Gathering) -> tuple[Continuation, ...]:
    found = []
    for prompt in prompts:
        if wanted.chat:
            messages: list[Any] = [{"role": "user", "content": prompt}]
            ids = llm.requests.chat_ids(messages)
        else:
            ids = llm.tokenize(prompt)
        found.append(continued(llm, ids, options={"max_tokens": wanted.tokens, "temperature": 0.0}))
    return tuple(found)


def _title(gguf: GGUFFile) -> str:
    name = gguf.fields.get(keys.NAME)
    return name.value if name is not None and isinstance(name.value, str) else ""


def _remarks(files: Sequence[FileFigures]) -> list[str]:
    remarks = []
    for file in files:
        missing = [weight.name for weight in file.weights if weight.error is None]
        if missing:
            remarks.append(
                f"{file.label}: {len(missing)} tensors have no counterpart in the reference and no error, the first is "
                f"{missing[0]}."
            )
    return remarks
