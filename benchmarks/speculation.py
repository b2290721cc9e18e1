"""What guessing gives: decoding a text that repeats the prompt, and one that does not, with speculation and without.

    python benchmarks/speculation.py MODEL.gguf [--tokens 400] [--rounds 4] [--draft-model SMALL.gguf] [--no-results]

The model is made to say a given text, so that random weights do: its logits are computed, and a mask leaves one token.
"edit": a page of prose, then the same page with every fortieth token another. "fresh": a page, then another page.
Both ways take turns on the same text, each with a context of its own; medians of speeds and of neighbouring ratios.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phiquant import LLM
from results import Result, append, commit, processor, today

TEXT = Path(__file__).resolve().parent.parent / "models" / "phi3-tiny" / "evaluation.txt"
EDITED = 40


class Script:
    """A mask that leaves one token at a time."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        self.ids, self.at = ids, 0
        self._mask = np.zeros(vocabulary, bool)

    def allowed(self) -> NDArray[np.bool_]:
        self._mask[:] = False
        self._mask[self.ids[self.at]] = True
        return self._mask

    def accept(self, token: int) -> None:
        assert token == self.ids[self.at]
        self.at += 1


def say(llm: LLM, prompt: list[int], text: list[int]) -> tuple[float, int, int]:
    """Tokens per second after the first one, guesses, and right ones."""
    mask = Script(text, llm.config.vocab_size)
    done = llm.generate(prompt, max_tokens=len(text), temperature=0, mask=mask, ignore_eos=True)
    assert list(done.ids) == text
    return done.timings.decode_per_second, done.timings.drafted, done.timings.accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=400, help="of a page")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft-model", type=Path, default=None)
    parser.add_argument("--no-results", action="store_true")
    a = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    options = {"context": 4 * a.tokens, "threads": a.threads}
    with (
        LLM.load(a.model, speculate=False, **options) as plain,
        LLM.load(a.model, draft_model=a.draft_model, **options) as guessing,
    ):
        ids = plain.tokenize(TEXT.read_text(encoding="utf-8"))
        for what in ("edit", "fresh"):
            without, with_guesses, drafted, accepted = [], [], 0, 0
            for turn in range(a.rounds + 1):  # the first warms up
                start = turn * 2 * a.tokens
                page, other = ids[start : start + a.tokens], ids[start + a.tokens : start + 2 * a.tokens]
                text = list(page) if what == "edit" else other
                if what == "edit":
                    for i in range(EDITED // 2, len(text), EDITED):
                        text[i] = int(rng.integers(100, 30000))
                speeds = {}
                for llm in (plain, guessing) if turn % 2 else (guessing, plain):
                    speeds[llm], guesses, right = say(llm, page, text)
                    drafted, accepted = drafted + guesses, accepted + right
                if turn:
                    without.append(speeds[plain])
                    with_guesses.append(speeds[guessing])
            ratio = statistics.median(x / y for x, y in zip(with_guesses, without, strict=True))
            mine, its = statistics.median(with_guesses), statistics.median(without)
            print(f"{what}: {mine:.1f} tokens/s, without {its:.1f}, ratio {ratio:.3f}; {accepted} of {drafted} right")
            label = f"{a.model.stem}: decoding with guesses, {what}"
            rows.append(
                Result(today(), commit(), processor(), a.threads, label, mine, "tokens/s", "no guesses", "", its, ratio)
            )
    if not a.no_results:
        append(rows)


if __name__ == "__main__":
    main()
