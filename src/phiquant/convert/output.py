"""What a run writes: one file or several parts, summed up as they are written, and continued where a run ended."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from phiquant.convert.journal import Journal, fingerprint
from phiquant.convert.plan import Plan, checksum_entries, quality_entries
from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import GGUFError, OutputError, WeightsError
from phiquant.gguf import GGUFWriter, keys
from phiquant.gguf.checksum import PREFIX, Checksum, Piece, Summed, pieces
from phiquant.gguf.output import check_space
from phiquant.gguf.quality import Quality

__all__ = ["Output"]


class Output:
    """The files of a plan, written piece by piece from any thread: `begin`, `adopt`, `write`, `readable`, `commit`.

    A context manager: left early, it removes what it wrote; with `resume` it leaves it for a later run, unless weights
    were refused.
    """

    def __init__(self, plan: Plan, *, overwrite: bool = True, resume: bool = False, keep_nan: bool = False) -> None:
        """Declare everything; OutputError if a file could never be written."""
        self._plan = plan
        self._parts = plan.parts
        self._checksum = Checksum([Summed(t.name, t.shape, t.type) for t in plan.tensors])
        self._files: list[GGUFWriter] = []
        self._holders: dict[str, GGUFWriter] = {}
        self.remarks: list[str] = []
        for part in self._parts:
            protected = () if plan.in_place else plan.source.files
            writer = GGUFWriter(part.path, protect=protected, overwrite=overwrite, keep=resume)
            self._files.append(writer)
            for entry in part.entries:
                writer.add(entry.key, entry.value, entry.type, entry.item_type)
            for tensor in part.tensors:
                writer.add_tensor(tensor.name, tensor.shape, tensor.type)
                self._holders[tensor.name] = writer
        self._journal: Journal | None = None
        self._claimed: dict[str, bytes] = {}
        if resume:
            self._journal = Journal(self._files[0].path.resolve(), fingerprint(plan, keep_nan=keep_nan), self._sync)

    def begin(self) -> None:
        """Create the files, or find those of an earlier run; OutputError if the disk cannot hold them."""
        if len(self._files) > 1 and self._journal is None:
            check_space(self._plan.path, self._plan.size)
        done = self._journal.read() if self._journal is not None else {}
        for writer in self._files:
            writer.begin(fresh=not done)
        if self._journal is not None:
            self._journal.begin()
            self._claimed = {name: digest for name, digest in done.items() if name in self._holders}
            if self._journal.found:
                self.remarks.append("an unfinished run had another source or other options, so this one starts anew")

    def adopt(self, advanced: Callable[[PlannedTensor], None] = lambda tensor: None) -> set[str]:
        """The names of the tensors that are complete from an earlier run, each read again to be sure of it."""
        adopted: set[str] = set()
        buffer = np.empty(0, np.uint8)
        for tensor in self._plan.tensors:
            claimed = self._claimed.get(tensor.name)
            writer = self._holders[tensor.name]
            if claimed is None or not writer.kept:
                continue
            found = None
            for piece in pieces(tensor.shape):
                size = piece.nbytes(tensor.type)
                if buffer.size < size:
                    buffer = np.empty(size, np.uint8)
                if not writer.read_into(tensor.name, piece.start(tensor.type, tensor.shape[-1]), buffer[:size]):
                    break
                found = self._checksum.add(tensor.name, piece, buffer[:size])
            if found == claimed:
                writer.adopt(tensor.name)
                adopted.add(tensor.name)
                advanced(tensor)
        if adopted:
            self.remarks.append(f"{len(adopted)} of {len(self._plan.tensors)} tensors are done by an earlier run")
        return adopted

    def read(self, tensor: PlannedTensor) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor that `adopt` named; OutputError if they cannot be read any more."""
        data = np.empty(tensor.nbytes, np.uint8)
        if not self._holders[tensor.name].read_into(tensor.name, 0, data):
            raise OutputError(f"{self._plan.path} cannot be read while it is written; run again without --resume.")
        return data

    def write_whole(self, tensor: PlannedTensor, data: npt.NDArray[np.uint8]) -> None:
        """Write all of a tensor, in its type, uint8 [nbytes]."""
        at = 0
        for piece in pieces(tensor.shape):
            size = piece.nbytes(tensor.type)
            self.write(tensor, piece, data[at : at + size])
            at += size

    def settle(self) -> None:
        """With `resume`: wait until the disk has what was written, and the journal says so."""
        if self._journal is not None:
            self._journal.flush()

    @property
    def kept(self) -> bool:
        """Whether what is done stays for a later run when this one ends early."""
        return self._journal is not None

    @property
    def fingerprint(self) -> str:
        """Of what the bytes of the output depend on; with `resume` only."""
        return self._journal.plan if self._journal is not None else ""

    def write(self, tensor: PlannedTensor, piece: Piece, data: npt.NDArray[np.uint8]) -> None:
        """Write a piece of a tensor, in the tensor's type."""
        self._holders[tensor.name].write(tensor.name, data, piece.start(tensor.type, tensor.shape[-1]))
        whole = self._checksum.add(tensor.name, piece, data)
        if whole is not None and self._journal is not None:
            self._journal.note(tensor.name, whole)

    def _sync(self) -> None:
        for writer in self._files:
            writer.sync()

    @contextlib.contextmanager
    def readable(self) -> Iterator[Path]:
        """A path by which the model can be opened when its tensors are written, before it has its name."""
        if len(self._files) == 1:
            yield self._files[0].unfinished_path
            return
        # Parts are found by their names, which are not theirs yet.
        with tempfile.TemporaryDirectory(prefix="phiquant-parts-") as folder:
            for part, writer in zip(self._parts, self._files, strict=True):
                (Path(folder) / part.path.name).symlink_to(writer.unfinished_path.absolute())
            yield Path(folder) / self._parts[0].path.name

    def commit(self, quality: Quality | None = None) -> None:
        """Record checksum and quality, and give the files their names, the first part last.

        `quality`: what was measured, where the plan only has a place for it. GGUFError if tensors were copied and are
        not what the source's own checksum was made of.
        """
        text, parts = self._checksum.text(), self._checksum.parts()
        quality = quality or self._plan.quality
        if quality is not None:
            for entry in quality_entries(quality, text):
                self._files[0].replace(entry.key, entry.value, entry.type, entry.item_type)
        if self._plan.copied:
            self._compare(text)
        else:
            for entry in checksum_entries(text, parts):
                self._files[0].replace(entry.key, entry.value, entry.type, entry.item_type)
        for writer in reversed(self._files):
            writer.commit()
        if self._journal is not None:
            self._journal.remove()

    def _compare(self, text: str) -> None:
        recorded = next((entry.value for entry in self._plan.entries if entry.key == keys.CHECKSUM), None)
        if not isinstance(recorded, str):
            return
        table, _, data = recorded.removeprefix(PREFIX).partition(":")
        own_table, _, own_data = text.removeprefix(PREFIX).partition(":")
        if table == own_table and data != own_data:
            raise GGUFError(
                f"{self._plan.source.files[0]} is damaged: its tensors are not those its checksum was made of; "
                "`phiquant verify` names them, so fetch it again."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        discard = isinstance(error, WeightsError | GGUFError)
        if self._journal is not None:
            self._journal.remove() if discard else self._journal.close()
        with contextlib.ExitStack() as stack:
            for writer in self._files:
                stack.callback(writer.abort, discard=discard)
