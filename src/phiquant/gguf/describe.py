"""What a file is, in words that several programs show."""

from phiquant.gguf import keys
from phiquant.gguf.checksum import PREFIX, Summed, table_hash
from phiquant.gguf.reader import GGUFFile
from phiquant.gguf.types import FileType, ValueType

__all__ = ["file_type_name", "made_here", "table_of"]


def file_type_name(gguf: GGUFFile) -> str | None:
    """The file type that a file states, "unknown (NUMBER)" if it is none of those known; None if it states none."""
    number = gguf.fields.get(keys.FILE_TYPE)
    if number is None or number.type not in (ValueType.UINT32, ValueType.INT32):
        return None
    known = FileType.__members__.values()
    return next((kind.name for kind in known if kind == number.value), f"unknown ({number.value})")


def made_here(gguf: GGUFFile) -> bool:
    """Whether phiquant wrote the file: its checksum is of these tensors; other programs copy it to other ones."""
    checksum = gguf.fields.get(keys.CHECKSUM)
    return (
        checksum is not None
        and isinstance(checksum.value, str)
        and checksum.value.startswith(f"{PREFIX}{table_of(gguf)}:")
    )


def table_of(gguf: GGUFFile) -> str:
    """The hash of the file's tensor table, as checksums have it."""
    return table_hash([Summed(info.name, info.shape, info.type) for info in gguf.tensors.values()])
