"""What users write for a model of the Hub: `owner/name`, a revision, and which of its GGUF files."""

import re
from dataclasses import dataclass
from typing import Final, Self

from phiquant.errors import RequestError

__all__ = ["Reference"]

_REFERENCE: Final = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?P<path>/[^@:]+\.gguf)?"
    r"(?:@(?P<revision>[\w.][\w./-]*))?(?::(?P<which>[\w.][\w. /+-]*))?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class Reference:
    """A model of the Hub by name.

    Attributes:
        repository: owner/name.
        revision: a branch, tag or commit; None for the main branch.
        quant: which GGUF file, by a part of its name such as Q4_K_M, in any capitalisation; None if it is not said.
        file: which GGUF file, by its path in the repository.
    """

    repository: str
    revision: str | None = None
    quant: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `owner/name[@revision][:quant]`, `owner/name[@revision]:file.gguf` or `owner/name/file.gguf[@revision]`.

        RequestError if it is none of them.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None or ".." in text or (match["path"] and match["which"]):
            raise RequestError(
                f"{text[:200]!r} is no model of the Hub; write owner/name, owner/name:QUANT or owner/name@revision."
            )
        which = match["which"]
        file = match["path"][1:] if match["path"] else which if which and which.lower().endswith(".gguf") else None
        return cls(match["repository"], match["revision"], None if file else which, file)

    @classmethod
    def of(cls, repository: str, quant: str | None = None, revision: str | None = None) -> Self:
        """As `parse`, with a quant (or a file) and a revision said apart; RequestError if one is said twice."""
        named = cls.parse(repository)
        if (quant and (named.quant or named.file)) or (revision and named.revision):
            raise RequestError(f"{repository} names a quant or a revision already; leave the argument out.")
        if quant is None and revision is None:
            return named
        revision, which = revision or named.revision, quant or named.quant or named.file
        return cls.parse(named.repository + (f"@{revision}" if revision else "") + (f":{which}" if which else ""))

    def __str__(self) -> str:
        revision, which = self.revision, self.quant or self.file
        return self.repository + (f"@{revision}" if revision else "") + (f":{which}" if which else "")

    @property
    def ref(self) -> str:
        """The revision, spelled out."""
        return self.revision or "main"

    @property
    def folder(self) -> str:
        """The name of the repository's directory in the cache."""
        return "models--" + self.repository.replace("/", "--")
