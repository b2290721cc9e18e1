"""Models by name: repositories of the Hugging Face Hub, and the cache on this machine that all of its tools share.

    reference.py   owner/name[@revision][:quant], what users write
    naming.py      which files of a repository are one model, and which model a quant means
    transfer.py    one large file: continued where it broke off, checked against its SHA-256
    fetch.py       name -> path: listing, choosing, what is missing fetched, the cache where there is no network
    files.py       single files, by the library alone, to wherever they are wanted
    shown.py       who is told how a download goes
    cached.py      what is in the cache, and taking it out
    sentences.py   whatever the library raises, as one sentence

`huggingface_hub` is imported inside functions: programs that never leave the machine do not pay for it.
"""

from phiquant.hub.cached import CachedModel, Removal, Unfinished, cached_models, removal, unfinished
from phiquant.hub.fetch import gguf, is_cached, local, pull, resolve
from phiquant.hub.files import fetched, names
from phiquant.hub.reference import Reference
from phiquant.hub.shown import Download

__all__ = [
    "CachedModel",
    "Download",
    "Reference",
    "Removal",
    "Unfinished",
    "cached_models",
    "fetched",
    "gguf",
    "is_cached",
    "local",
    "names",
    "pull",
    "removal",
    "resolve",
    "unfinished",
]
