"""Options that several verbs have."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

__all__ = [
    "CACHE_TYPES",
    "MIX_TOKENS",
    "BFloatDot",
    "CacheType",
    "Checkpoint",
    "GivenCacheType",
    "GivenCheckpoint",
    "HfCheckpoint",
    "HfRepo",
    "HfRepos",
    "Json",
    "KeepNan",
    "MaxMemory",
    "NoTensorFirstSplit",
    "Quiet",
    "Resume",
    "SplitMaxSize",
    "SplitMaxTensors",
    "TextFile",
    "Threads",
]

CACHE_TYPES = "f16, f32, q8_0, q4_0"  # `kernels.cache_types` is imported by verbs that run models alone

MIX_TOKENS = 1536  # as in `mixes`, which loads the converter

_checkpoint = Argument(metavar="MODEL", help="A checkpoint's folder, or a repository: owner/name[@revision].")
Checkpoint = Annotated[str, _checkpoint]
GivenCheckpoint = Annotated[str | None, _checkpoint]
HfCheckpoint = Annotated[
    str | None,
    Option(
        "--hf-repo",
        "-hf",
        "-hfr",
        metavar="OWNER/REPO[@REVISION]",
        help="Instead of MODEL a checkpoint of the Hugging Face Hub, also where a folder has that name.",
    ),
]
HfRepo = Annotated[
    str | None,
    Option(
        "--hf-repo",
        "-hf",
        "-hfr",
        metavar="OWNER/REPO[:QUANT]",
        help="Instead of a file a GGUF model of the Hugging Face Hub, Q4_K_M if there is; fetched if it is not here.",
    ),
]
HfRepos = Annotated[
    list[str] | None,
    Option(
        "--hf-repo",
        "-hf",
        "-hfr",
        metavar="OWNER/REPO[:QUANT]",
        help="A GGUF model of the Hugging Face Hub; may be given several times.",
    ),
]
TextFile = Annotated[Path | None, Option("--file", "-f", metavar="FILE", help="The text that the model reads.")]
_cache_type = Option(
    "--cache-type",
    "--kv-type",
    "--cache-type-k",
    "-ctk",
    metavar="TYPE",
    help=f"Of the key-value cache: {CACHE_TYPES}.",
)
CacheType = Annotated[str, _cache_type]
GivenCacheType = Annotated[str | None, _cache_type]
Threads = Annotated[
    int, Option("--threads", "-t", metavar="N", min=0, help="Processor threads; 0: all that the process may use.")
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Nothing on stderr but errors.")]
KeepNan = Annotated[bool, Option("--keep-nan", help="Accept NaN and infinity in weights instead of refusing them.")]
SplitMaxTensors = Annotated[
    int | None,
    Option("--split-max-tensors", metavar="N", help="Write parts of at most N tensors: PREFIX-00001-of-0000M.gguf."),
]
SplitMaxSize = Annotated[
    str | None,
    Option("--split-max-size", metavar="N(M|G)", help="Write parts with at most so many bytes of tensors."),
]
NoTensorFirstSplit = Annotated[bool, Option("--no-tensor-first-split", help="Put metadata only into the first part.")]
Resume = Annotated[
    bool,
    Option("--resume", help="Keep what is done if interrupted, and continue what an interrupted run with it left."),
]
MaxMemory = Annotated[
    str | None, Option("--max-memory", metavar="SIZE", help="Memory to stay within, such as 500M; 1.5G by default.")
]
Json = Annotated[bool, Option("--json", help="Print JSON instead of text.")]
BFloatDot = Annotated[
    bool,
    Option(
        "--bf16-dot/--no-bf16-dot",
        help="Round activations that meet BF16 weights to BF16: twice as fast on processors with AVX512_BF16, at the "
        "price of a mean KL divergence of 1.2e-5 nats per token (measured on the bundled model).",
    ),
]
