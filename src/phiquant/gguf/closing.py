"""Context managers that close what they hold."""

from types import TracebackType
from typing import Self

__all__ = ["Closing"]


class Closing:
    """What has a `close`, as a context manager: it is closed when the context ends, however it does."""

    def close(self) -> None:
        """Give back what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
