"""The class `Llama`: llama-cpp-python's constructor and methods over `LLM`."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from phiquant.compat.llama_cpp import constants as c
from phiquant.compat.llama_cpp.chats import Chats
from phiquant.compat.llama_cpp.embeddings import Embeds
from phiquant.compat.llama_cpp.llama_cache import longest_prefix
from phiquant.compat.llama_cpp.llama_grammar import LlamaGrammar
from phiquant.compat.llama_cpp.llama_speculative import LlamaDraftModel
from phiquant.compat.llama_cpp.llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer
from phiquant.compat.llama_cpp.parameters import settings
from phiquant.compat.llama_cpp.pretrained import download
from phiquant.compat.llama_cpp.processors import (
    LogitsProcessor,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    Scores,
    StoppingCriteria,
    StoppingCriteriaList,
)
from phiquant.compat.llama_cpp.state import LlamaState
from phiquant.compat.llama_cpp.steps import Steps
from phiquant.gguf import open_model
from phiquant.gguf.closing import Closing
from phiquant.llm import LLM

__all__ = [
    "Llama",
    "LlamaGrammar",
    "LlamaState",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StoppingCriteria",
    "StoppingCriteriaList",
]


class Llama(Chats, Embeds, Steps, Closing):
    """A model, for scripts that were written for llama-cpp-python 0.3.36.

    Attributes:
        llm: the same model for scripts that were not.
        model_path: of its file.
        metadata: keys of the file and their values as text, but for arrays.
        verbose: tell on standard error what was assumed and what takes its time.
    """

    def __init__(
        self,
        model_path: str,
        *,
        n_gpu_layers: int = 0,
        split_mode: int = c.LLAMA_SPLIT_MODE_LAYER,
        main_gpu: int = 0,
        tensor_split: list[float] | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: Mapping[str, bool | int | float | str] | None = None,
        seed: int = c.LLAMA_DEFAULT_SEED,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | None = c.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,
        pooling_type: int = c.LLAMA_POOLING_TYPE_UNSPECIFIED,
        attention_type: int = c.LLAMA_ATTENTION_TYPE_UNSPECIFIED,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool = False,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: str | None = None,
        lora_scale: float = 1.0,
        lora_path: str | None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: Callable[..., Any] | None = None,
        draft_model: LlamaDraftModel | None = None,
        tokenizer: BaseLlamaTokenizer | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        """Load a GGUF file. `docs/howto/llama-cpp-python.md` says what becomes of every argument.

        Raises:
            ArgumentError (a ValueError): there is no such file, or an argument asks for what there is not.
            FormatError, UnsupportedError: the file is broken, or has what there is not.
        """
        self._given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        found = settings(self._given)
        self.model_path, self.verbose = found.path, verbose
        llm = LLM.load(
            found.path,
            context=found.context,
            threads=found.threads,
            gpu_layers=found.gpu_layers,
            cache_type=found.cache_type,
            batch=found.batch,
            progress=_say if verbose else None,
        )
        if verbose:
            for note in llm.notes:
                _say(note)
        super().__init__(
            llm,
            batch=min(found.batch, llm.context),
            seed=int.from_bytes(os.urandom(4), "little") if seed == -1 else seed or c.LLAMA_DEFAULT_SEED,
            logits_all=logits_all,
            last_n_tokens_size=last_n_tokens_size,
            tokenizer=tokenizer,
            draft_model=draft_model,
        )
        self._embedding, self._pooling = embedding, found.pooling
        self.chat_format = None if chat_handler is not None else "chat_template.default"
        self.chat_handler = chat_handler

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | Path | None = None,
        local_dir_use_symlinks: bool | Literal["auto"] = "auto",
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a file of a repository of the Hugging Face Hub, which is fetched if it is not there.

        Args:
            repo_id: "owner/name".
            filename: of the file, or a pattern that fits it alone; of a model in several parts, the first.
            additional_files: names or patterns of further files to fetch, such as the other parts.
            local_dir: where to put them, instead of huggingface_hub's cache.
            local_dir_use_symlinks: has no effect, as in today's huggingface_hub.
            cache_dir: another place for that cache.
            kwargs: for the constructor.
        """
        additional = list(additional_files or ())
        return cls(download(repo_id, filename, additional, local_dir=local_dir, cache_dir=cache_dir), **kwargs)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Keys of the file."""
        with open_model(self.model_path) as gguf:
            return {key: _written(value) for key, value in gguf.metadata.items() if _is_scalar(value)}

    def n_ctx(self) -> int:
        """Most tokens of prompt and completion."""
        return self.llm.context

    def n_embd(self) -> int:
        """Width of embeddings."""
        return self.llm.config.embedding_length

    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.llm.config.vocab_size

    def tokenizer(self) -> LlamaTokenizer:
        """The model's own tokenizer."""
        return LlamaTokenizer(self.llm.tokenizer)

    def token_eos(self) -> int:
        """The token that ends a text; -1 if there is none."""
        return -1 if self.llm.tokenizer.eos_id is None else self.llm.tokenizer.eos_id

    def token_bos(self) -> int:
        """The token that begins a text; -1 if there is none."""
        return -1 if self.llm.tokenizer.bos_id is None else self.llm.tokenizer.bos_id

    def token_nl(self) -> int:
        """The token of a line end."""
        return self.llm.tokenizer.encode_continuation("\n")[0]

    @staticmethod
    def logits_to_logprobs(logits: Scores | list[Any], axis: int = -1) -> Scores:
        """Log-probabilities of scores, float32, along an axis."""
        scores = np.asarray(logits, np.single)
        peak = scores.max(axis=axis, keepdims=True)
        shifted = scores - np.where(np.isfinite(peak), peak, np.single(0))
        with np.errstate(divide="ignore"):
            found: Scores = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
        return found

    @staticmethod
    def longest_token_prefix(a: Sequence[int], b: Sequence[int]) -> int:
        """How many tokens two sequences have in common from the beginning."""
        return longest_prefix(a, b)

    def close(self) -> None:
        """Free threads and memory, and unmap the file."""
        if hasattr(self, "llm"):  # else it was refused
            self.llm.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """The constructor's arguments: a copy in another process loads the model again."""
        given = dict(self._given)
        return {**given.pop("kwargs"), **given, "seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a copy is made like any other


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | bool | int | float | np.generic)


def _written(value: Any) -> str:
    """A value as llama.cpp writes it."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating):
        return f"{float(value):f}"
    return str(value)
