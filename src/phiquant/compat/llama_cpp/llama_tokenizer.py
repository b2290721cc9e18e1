"""Tokenizers by llama-cpp-python's names: bytes to ids and back."""

from __future__ import annotations

import abc
import os
from typing import TYPE_CHECKING

from phiquant.compat.llama_cpp.refusals import ArgumentError
from phiquant.gguf import open_model
from phiquant.text import Tokenizer

if TYPE_CHECKING:
    from phiquant.compat.llama_cpp.llama import Llama

__all__ = ["BaseLlamaTokenizer", "LlamaTokenizer"]


class BaseLlamaTokenizer(abc.ABC):
    """What a tokenizer for `Llama` must do."""

    @abc.abstractmethod
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Ids of a text in UTF-8; `special` parses special tokens, `add_bos` begins with the token for that."""

    @abc.abstractmethod
    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Bytes of ids, which come after `prev_tokens`; `special` writes special tokens."""


class LlamaTokenizer(BaseLlamaTokenizer):
    """The model's own."""

    def __init__(self, llama: Llama | Tokenizer) -> None:
        self._tokenizer = llama if isinstance(llama, Tokenizer) else llama.llm.tokenizer

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """See `BaseLlamaTokenizer`. Only a vocabulary that asks for a token at the beginning gets one."""
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise ArgumentError(f"the text is not valid UTF-8: {error}") from error
        except AttributeError:
            raise ArgumentError(f"a text is bytes here, not {type(text).__name__}; encode it") from None
        return self._tokenizer.encode(decoded, special=special, add_bos=add_bos and self._tokenizer.add_bos)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """See `BaseLlamaTokenizer`. The space of a first word stays, but after the token that begins a text."""
        tokens = [int(token) for token in tokens]
        written = b"".join(self._piece(token, special) for token in tokens)
        begins = bool(tokens) and tokens[0] == self._tokenizer.bos_id
        return written.removeprefix(b" ") if begins else written

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        """The same for a str."""
        return self.tokenize(text.encode("utf-8", errors="ignore"), add_bos, special)

    def decode(self, tokens: list[int]) -> str:
        """The same to a str, without bytes that are not UTF-8."""
        return self.detokenize(tokens).decode("utf-8", errors="ignore")

    @classmethod
    def from_ggml_file(cls, path: str | os.PathLike[str]) -> LlamaTokenizer:
        """The tokenizer of a GGUF file, without its weights."""
        with open_model(path) as gguf:
            return cls(Tokenizer.from_gguf(gguf))

    def _piece(self, token: int, special: bool) -> bytes:
        plain = self._tokenizer.token_bytes(token)
        if plain or not special:
            return plain
        return self._tokenizer.decode([token], skip_special=False).encode()
