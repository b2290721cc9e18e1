"""Ids that a model's own code forbids: rows of the embedding that were never trained, and must never be sampled.

Phi-3-small sets their logits to minus infinity. The list is a property of its tokenizer's code and stands in no file of
the released models, whose vocabularies are all the same; a config.json may name it as `dummy_token_indices`.
"""

from collections.abc import Mapping
from typing import Any, Final

from phiquant.convert.fields import short
from phiquant.errors import CheckpointError

__all__ = ["RELEASED", "dummy_tokens"]

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
