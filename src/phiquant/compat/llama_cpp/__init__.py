"""llama-cpp-python's interface over phiquant: `from llama_cpp import Llama` becomes
`from phiquant.compat.llama_cpp import Llama`, and the rest of a script stays as it is.

The modules have the names that scripts import from there: `llama`, `llama_grammar`, `llama_cache`, `llama_tokenizer`,
`llama_speculative`, `llama_types`.
"""

from phiquant.compat.llama_cpp import constants, llama_types
from phiquant.compat.llama_cpp.constants import *  # noqa: F403  constants of llama.cpp, by their names
from phiquant.compat.llama_cpp.llama import Llama
from phiquant.compat.llama_cpp.llama_cache import BaseLlamaCache, LlamaCache, LlamaDiskCache, LlamaRAMCache
from phiquant.compat.llama_cpp.llama_grammar import LlamaGrammar
from phiquant.compat.llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from phiquant.compat.llama_cpp.llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer
from phiquant.compat.llama_cpp.llama_types import *  # noqa: F403  types of results, by their names
from phiquant.compat.llama_cpp.processors import (
    LogitsProcessor,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from phiquant.compat.llama_cpp.refusals import ArgumentError, StateError
from phiquant.compat.llama_cpp.state import LlamaState

__version__ = "0.3.36"
"""Of llama-cpp-python: the version whose interface this is."""

__all__ = [
    "ArgumentError",
    "BaseLlamaCache",
    "BaseLlamaTokenizer",
    "Llama",
    "LlamaCache",
    "LlamaDiskCache",
    "LlamaDraftModel",
    "LlamaGrammar",
    "LlamaPromptLookupDecoding",
    "LlamaRAMCache",
    "LlamaState",
    "LlamaTokenizer",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StateError",
    "StoppingCriteria",
    "StoppingCriteriaList",
]
__all__ += constants.__all__
__all__ += llama_types.__all__
