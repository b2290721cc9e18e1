"""Hugging Face checkpoints and GGUF files to GGUF files of any type, streamed."""

from phiquant.convert.filetypes import Target, parse_file_type, parse_tensor_type
from phiquant.convert.plan import Plan
from phiquant.convert.recipes import Options, TypePattern
from phiquant.convert.run import Progress, Report, convert, execute, quantize
from phiquant.convert.weighing import Importance

__all__ = [
    "Importance",
    "Options",
    "Plan",
    "Progress",
    "Report",
    "Target",
    "TypePattern",
    "convert",
    "execute",
    "parse_file_type",
    "parse_tensor_type",
    "quantize",
]
