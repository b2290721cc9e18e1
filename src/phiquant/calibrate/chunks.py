"""A text in chunks, as models read it for calibration: cut as llama-imatrix cuts it; and a step that reads one."""

import hashlib
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.convert.imatrix import DEFAULT_CHUNK_SIZE
from phiquant.errors import RequestError
from phiquant.kernels.ops import Step
from phiquant.text import Tokenizer, TokenType

__all__ = ["DEFAULT_TOKENS", "DRAWN", "Chunks", "chunk_step", "cut"]

DEFAULT_TOKENS: Final = 16_384
"""Tokens of a text that error feedback reads, if it has as many."""

DRAWN: Final = 1 / 3
"""Part of the chunks that error feedback reads in which tokens are drawn at random."""

_UNSEEN: Final = 1 / 4  # of the tokens that are drawn, those that are not in the text
_FOREIGN: Final = 0.8  # tokens for each byte, above which a vocabulary spells a text out byte by byte
_UNUSUAL: Final = 0.5


@dataclass(frozen=True, eq=False)
class Chunks:
    """What a model reads: `ids` int32 [chunks, context], and the name of the text; `remarks` on the text."""

    ids: NDArray[np.int32]
    dataset: str
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, text: str, tokenizer: Tokenizer, dataset: str, *, tokens: int = DEFAULT_TOKENS, context: int | None = None
    ) -> "Chunks":
        """The first `tokens` tokens of a text, or all if it has fewer, in whole chunks.

        RequestError: the text is too short, or the vocabulary knows so little of it that it is binary data, or in a
        script that the model does not write.
        """
        context = DEFAULT_CHUNK_SIZE if context is None else context
        if tokens < 2 * context:
            raise RequestError(
                f"a calibration of {tokens} tokens is too short: it needs at least {2 * context}, two chunks of "
                f"{context}; ask for more"
            )
        # No token is shorter than a byte, few are longer than 16: what lies far beyond is not tokenized.
        text = text[: 32 * tokens]
        ids = np.array(tokenizer.encode(text, special=False), np.int32)
        share = len(ids) / max(len(text.encode()), 1)
        if len(ids) >= context and share > _FOREIGN:
            raise RequestError(
                f"{dataset} has {share:.2f} tokens for each byte: the model's vocabulary does not know this text, so "
                "it is no prose or code that the model could read; calibrate with text like what it will be used for"
            )
        remarks = []
        if share > _UNUSUAL:
            remarks.append(
                f"{dataset} has {share:.2f} tokens for each byte, and text that the model was trained on about 0.3: "
                "what is learned from it may not hold for other text"
            )
        chunks = cut(ids, context, 0, tokens // context).copy()
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            chunks[:, 0] = tokenizer.bos_id
        return cls(chunks, dataset, tuple(remarks))

    def with_drawn(self, tokenizer: Tokenizer, share: float, of: "Chunks | None" = None) -> "Chunks":
        """The same with every so many-th chunk replaced by tokens drawn at random, in no order: `share` of all.

        What is learned from one text alone holds less for others: words that it does not have, and words beside one
        another that are never so in it, make matrices see more of what they may be given. A token that is in the text
        is drawn with the root of its frequency, one that is not in one case of four.

        `of`: the text; None for these chunks.
        """
        places = [int((k + 1) / share) - 1 for k in range(int(len(self.ids) * share))]
        if not places:
            return self
        chances = _chances((of or self).ids, tokenizer)
        if not chances.any():
            return self
        ids, random = self.ids.copy(), np.random.default_rng(0)
        start = int(tokenizer.add_bos and tokenizer.bos_id is not None)
        for k, place in enumerate(places):
            place -= (place - k) % 2  # so that both halves of a text, every other chunk of it, get as many
            ids[place, start:] = random.choice(len(chances), self.context - start, p=chances)
        return replace(self, ids=ids)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.ids.size

    @property
    def context(self) -> int:
        """Tokens of a chunk."""
        return int(self.ids.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and how they are cut, hexadecimal."""
        return hashlib.sha256(repr(self.ids.shape).encode() + self.ids.astype("<i4").tobytes()).hexdigest()


def _chances(ids: NDArray[np.int32], tokenizer: Tokenizer) -> NDArray[np.float64]:
    """How likely each token is to be drawn; 0 for all in a vocabulary of no plain ones."""
    plain = tokenizer.vocabulary.types == TokenType.NORMAL
    found: NDArray[np.float64] = np.sqrt(np.bincount(ids.reshape(-1), minlength=len(plain))[: len(plain)]) * plain
    unseen = plain & (found == 0)
    seen = found.sum()
    if unseen.any():
        found[unseen] = (seen * _UNSEEN / (1 - _UNSEEN) or 1.0) / unseen.sum()
    return found / (found.sum() or 1.0)


def cut(ids: NDArray[np.int32], context: int, skip: int, chunks: int | None) -> NDArray[np.int32]:
    """The chunks that will be read, int32 [chunks, context].

    RequestError if there are not two of them after the first `skip`, whatever is read of them.
    """
    left = len(ids) - skip * context
    if left < 2 * context:
        after = f" after the {skip} chunks that are skipped" if skip else ""
        raise RequestError(
            f"the text has {max(left, 0)} tokens{after} and must have at least {2 * context}, two chunks of {context}; "
            "give a longer text or a smaller context"
        )
    count = min(left // context, chunks or left)
    return ids[skip * context :][: count * context].reshape(count, context)


def chunk_step(
    tokens: NDArray[np.int32],
    rotation: tuple[NDArray[np.float32], NDArray[np.float32]],
    pages: int,
    outputs: NDArray[np.int32],
    start: int = 0,
) -> Step:
    """The step that reads `tokens`, which begin at position `start` of their chunk, into the pages 0 to `pages` - 1.

    `rotation`: cos and sin of all positions of a chunk; `outputs`: indices of the tokens whose logits are wanted.
    """
    stop = start + len(tokens)
    cos, sin = rotation
    return Step(
        tokens=tokens,
        positions=np.arange(start, stop, dtype=np.int32),
        slots=np.zeros(len(tokens), np.int32),
        pages=np.arange(pages, dtype=np.int32)[None],
        cos=cos[start:stop],
        sin=sin[start:stop],
        outputs=outputs,
    )
