"""Every exception the package raises on purpose.

    PhiquantError
    ├── FormatError            a file's bytes are not what its format promises
    │   ├── GGUFError          ... a GGUF file
    │   ├── CheckpointError    ... a Hugging Face checkpoint (config.json, safetensors, index)
    │   ├── ImportanceError    ... an importance matrix (imatrix.gguf, or the older .dat)
    │   ├── LogitsError        ... saved logits of a base model
    │   ├── CacheError         ... a saved cache of a conversation
    │   ├── TokenizerError     ... a vocabulary or tokenizer file
    │   └── TemplateError      ... a chat template: syntax, run time, time or memory limit
    ├── UnsupportedError       well-formed, but not something this version does
    │   ├── ArchitectureError  an unknown model architecture
    │   └── TypeNameError      an unknown tensor or file type
    ├── RequestError           an argument, an option or a prompt that cannot be served
    │   ├── TokenError         a token id outside the vocabulary
    │   ├── ContextError       more tokens than the context holds
    │   ├── QueueFull          too many requests wait already; it says when to try again
    │   └── GrammarError       a grammar that is malformed, cannot be expressed, or costs too much
    ├── WeightsError           NaN or infinity in weights, shapes that do not fit, requantization not allowed
    ├── OutputError            an output cannot be written: path, permission, disk full
    └── KernelError            a kernel was not compiled, was refused at binding, or reported a failure

Messages are one sentence that names the thing and the remedy; the command line prints them as they are.
"""

__all__ = [
    "ArchitectureError",
    "CacheError",
    "CheckpointError",
    "ContextError",
    "FormatError",
    "GGUFError",
    "GrammarError",
    "ImportanceError",
    "KernelError",
    "LogitsError",
    "OutputError",
    "PhiquantError",
    "QueueFull",
    "RequestError",
    "TemplateError",
    "TokenError",
    "TokenizerError",
    "TypeNameError",
    "UnsupportedError",
    "WeightsError",
]


class PhiquantError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user."""


class FormatError(PhiquantError):
    """A file's bytes are not what its format promises."""


class GGUFError(FormatError):
    """A GGUF file is truncated, corrupt or contradictory."""


class CheckpointError(FormatError):
    """A Hugging Face checkpoint is incomplete, corrupt or contradictory."""


class ImportanceError(FormatError):
    """An importance matrix is truncated, corrupt, empty or does not belong to the model."""


class LogitsError(FormatError):
    """A file of saved logits is truncated, corrupt or does not belong to the model."""


class CacheError(FormatError):
    """A saved cache is truncated, corrupt, or was made by another model, cache type or version."""


class TokenizerError(FormatError):
    """A vocabulary or a tokenizer file cannot be used."""


class TemplateError(FormatError):
    """A chat template failed or exceeded its limits."""


class UnsupportedError(PhiquantError):
    """Well-formed input that this version does not support."""


class ArchitectureError(UnsupportedError):
    """The model architecture is not a known one."""


class TypeNameError(UnsupportedError):
    """The name or number of a tensor type or file type is not known."""


class RequestError(PhiquantError):
    """An argument, an option or a prompt cannot be served."""


class GrammarError(RequestError):
    """A grammar is malformed, cannot be expressed, or costs too much."""


class TokenError(RequestError):
    """A token id lies outside the vocabulary."""


class ContextError(RequestError):
    """A sequence does not fit the context."""


class QueueFull(RequestError):  # noqa: N818  a name that says what happened
    """Too many requests wait already; one may be accepted in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WeightsError(PhiquantError):
    """Weights hold NaN or infinity, do not fit their shape, or may not be converted as asked."""


class OutputError(PhiquantError):
    """An output file cannot be written."""


class KernelError(PhiquantError):
    """A kernel could not be compiled, was refused when bound, or reported a failure."""
