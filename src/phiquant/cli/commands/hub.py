"""Models of the Hugging Face Hub: `pull`, `list`, `rm`."""

import builtins
from typing import Annotated

from typer import Argument, Option

from .options import Json, Quiet

__all__ = ["list", "pull", "rm"]


def pull(
    name: Annotated[
        str,
        Argument(
            metavar="OWNER/REPO[:QUANT]",
            help="A repository of the Hub, and which of its GGUF models; by default Q4_K_M, else Q8_0, else the first. "
            "OWNER/REPO@REVISION[:QUANT] is another revision, OWNER/REPO:FILE.gguf a file.",
        ),
    ],
    quiet: Quiet = False,
) -> int:
    """Fetch a GGUF model, or a checkpoint, of the Hugging Face Hub into the cache, and print its path."""
    from .. import hub as body

    return body.pull(name, quiet=quiet)


def list(as_json: Json = False) -> int:
    """List the GGUF models and checkpoints in the cache of the Hugging Face Hub."""
    from .. import hub as body

    return body.list_models(as_json=as_json)


def rm(
    names: Annotated[
        builtins.list[str],
        Argument(
            metavar="NAME...",
            help="A model as list names it, such as OWNER/REPO:QUANT; OWNER/REPO is all that is there of a repository.",
        ),
    ],
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: Quiet = False,
) -> int:
    """Remove models from the cache of the Hugging Face Hub, and free what nothing else uses."""
    from .. import hub as body

    return body.remove(names, yes=yes, quiet=quiet)
