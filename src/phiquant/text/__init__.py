"""Tokenizer, chat template, incremental detokenizer, stop strings. Token texts live here and nowhere else."""

from phiquant.text import chat
from phiquant.text.added import ADDED_TOKENS_KEY, AddedToken, added_tokens_from_hf, added_tokens_to_json
from phiquant.text.detokenizer import Detokenizer
from phiquant.text.stops import StopStrings
from phiquant.text.template import ChatTemplate, Message
from phiquant.text.tokenizer import Tokenizer
from phiquant.text.vocabulary import TokenType, Vocabulary

__all__ = [
    "ADDED_TOKENS_KEY",
    "AddedToken",
    "ChatTemplate",
    "Detokenizer",
    "Message",
    "StopStrings",
    "TokenType",
    "Tokenizer",
    "Vocabulary",
    "added_tokens_from_hf",
    "added_tokens_to_json",
    "chat",
]
