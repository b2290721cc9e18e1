"""Ids that a model's own code forbids: rows of the embedding that were never trained, and must never be sampled.

Phi-3-small sets their logits to minus infinity. The list is a property of its tokenizer's code and stands in no file of
the released models, whose vocabularies are all the same; a config.json may name it as `dummy_token_indices`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from phiquant.convert.entries import Entry
from phiquant.convert.fields import short
from phiquant.errors import CheckpointError
from phiquant.gguf import keys
from phiquant.text import TokenType

__all__ = ["RELEASED", "dummy_tokens", "without_dummies"]

RELEASED: Final = (100256, 100258, 100259, 100260, 100264, 100265, *range(100267, 100352))
"""Those of Phi-3-small's vocabulary of 100,352."""


def dummy_tokens(config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids by config.json or, for the released models, by their code. CheckpointError for what is no list of ids."""
    value = config.get("dummy_token_indices")
    if value is None:
        small = config.get("model_type") == "phi3small" or config.get("architectures") == ["Phi3SmallForCausalLM"]
        return RELEASED if small and vocab_size == RELEASED[-1] + 1 else ()
    if not isinstance(value, list):
        raise CheckpointError(f"config.json: dummy_token_indices is {short(value)}, not a list of ids.")
    for index in value:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocab_size:
            raise CheckpointError(
                f"config.json: dummy_token_indices holds {short(index)}, which is no id below {vocab_size}."
            )
    return tuple(value)


def without_dummies(entries: Sequence[Entry], config: Mapping[str, Any], vocab_size: int) -> list[Entry]:
    """The keys of a tokenizer with these ids as tokens of type UNUSED, which no reader ever samples."""
    ids = dummy_tokens(config, vocab_size)
    return [_marked(entry, ids) if ids and entry.key == keys.TOKEN_TYPE else entry for entry in entries]


def _marked(types: Entry, ids: Sequence[int]) -> Entry:
    marked = np.array(types.value, np.int32)
    marked[list(ids)] = TokenType.UNUSED
    return types._replace(value=marked)
