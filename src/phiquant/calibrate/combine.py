"""Several importance matrices of one model as one, and the refusal of those that are not of one model."""

import re
from collections.abc import Mapping, Sequence

from phiquant.convert.imatrix import ImportanceMatrix, merge
from phiquant.errors import ImportanceError

__all__ = ["check_same_model", "combine"]

_BLOCK = re.compile(r"blk\.(\d+)\.")


def combine(parts: Sequence[tuple[str, ImportanceMatrix]], chunk_size: int = 0) -> ImportanceMatrix:
    """Add up matrices, each with the name of where it is from; `chunk_size` as for `convert.imatrix.merge`.

    ImportanceError, which names the first tensor that does not fit, if they are not of one model.
    """
    (first, base), *others = parts
    for name, matrix in others:
        sizes = {tensor: entry.sums.size for tensor, entry in base.entries.items()}
        check_same_model(name, matrix, sizes, first)
    return merge([matrix for _, matrix in parts], chunk_size)


def check_same_model(origin: str, matrix: ImportanceMatrix, sizes: Mapping[str, int], other: str) -> None:
    """ImportanceError if `matrix`, from `origin`, is not of the model of `other`, whose weights have these `sizes`.

    `sizes`: values of each weight's entry, matrices times columns. Either may lack weights that the other has (an
    output that was not observed, experts that no token reached), but not whole blocks.
    """
    theirs, ours = _blocks(sizes), _blocks(matrix.entries)
    for tensor in sorted({*matrix.entries, *sizes}, key=_place):
        entry, size = matrix.entries.get(tensor), sizes.get(tensor)
        block = _block(tensor)
        if entry is not None and size is not None and entry.sums.size != size:
            how = f"it has {entry.sums.size} values where {other} has {size}"
        elif block is not None and (block in theirs) != (block in ours):
            how = f"{origin if size is None else other} alone has its block"
        else:
            continue
        raise ImportanceError(
            f"{origin} is an importance matrix of another model than {other}: the first tensor that does not fit is "
            f"{tensor}; {how}."
        )


def _block(name: str) -> int | None:
    match = _BLOCK.match(name)
    return None if match is None else int(match[1])


def _blocks(names: Mapping[str, object]) -> set[int]:
    return {block for block in map(_block, names) if block is not None}


def _place(name: str) -> tuple[int, str]:
    block = _block(name)
    return (-1 if block is None else block), name
