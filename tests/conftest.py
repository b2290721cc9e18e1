"""What every test needs of the process it runs in, and what tests of several rooms share."""

import copy
import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A shell that starts a job in the background makes it ignore Ctrl-C, and children inherit that: what the tests
# interrupt would not hear it. A handler, unlike being ignored, is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Byte-level vocabularies with the very structure of the published ones, small because they are trained here.

ROOT = Path(__file__).parents[1]
PROSE = ROOT / "models" / "phi3-tiny"
BASE = 1500  # tokens before the added ones

# The regular expressions as the published tokenizer.json files have them.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

SCRIPTS = [
    *(
        "日本語のテキストです。",
        "한국어 문장입니다.",
        "中文，標點符號。",
        "مرحبا بالعالم",
        "שלום עולם",
        "ภาษาไทย",
        "हिन्दी में हिन्दी में हिन्दी हिन्दी",
    ),
    *("🙂", "👩‍👩‍👧‍👦", "🇫🇷🇩🇪", "e\u0301 n\u0303 क्षि", "ÉCOLE Straße Ǆ ǅ ǆ", "Übergrößenträger", "ﬁ ſ K Å İ ı"),
    *("ªº ʰ ⅷ Ⅷ ½ ² ٣ 千", "don't DON'T we'Ll 'S ''s", "1234567890 3.14 1,000", "\x00\x01\x1f\x7f\x85\ufeff\u200b"),
    *(" ", "  ", "   ", " " * 31, " " * 40, "\t" * 9, "\t" * 12, "\n", "\n\n", "\r\n\r\n", " \n \n\n  x", "x  \n"),
    *(
        "def f(x):\n    return x  # no\n\n\tif x:\n\t\tpass\n",
        "a/b//c/// \n/",
        "http://a.b/c?d=e&f",
        "<|",
        "|>",
        "<||>",
    ),
    *("\u3000x\u2003\u2028y", "\x1cx", "▁ ▁▁", "\ufffd", "\U0010ffff", "e" * 50, "=" * 33, "snake_case CamelCase"),
]


def added(index: int, content: str, **attributes: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **plain, **attributes}


def _published_added(kind: str) -> list[dict[str, Any]]:
    if kind == "phi-2":
        runs = [*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1))]
        text = [added(BASE + 1 + i, run, special=False, normalized=True) for i, run in enumerate(runs)]
        return [added(BASE, "<|endoftext|>"), *text]
    if kind == "phi-4":
        names = [
            "<|dummy_0|>",
            "<|endoftext|>",
            "<|fim_prefix|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|im_sep|>",
            "<|dummy_1|>",
        ]
        return [added(BASE + i, name, lstrip=True, rstrip=True) for i, name in enumerate(names)]
    if kind == "phi-3-small":
        names = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        return [added(BASE + i, name) for i, name in enumerate(names)]
    roles = ["<|assistant|>", "<|end|>", "<|user|>", "<|system|>"]
    tools = ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"]
    return [  # with holes, as published
        added(BASE + 1, "<|endoftext|>"),
        added(BASE + 5, "<|endofprompt|>"),
        *(added(BASE + 6 + i, name, rstrip=True) for i, name in enumerate(roles)),
        *(added(BASE + 10 + i, name, rstrip=True, special=False) for i, name in enumerate(tools)),
        added(BASE + 15, "<|tag|>", rstrip=True),
    ]


@functools.cache
def byte_level_json(kind: str) -> dict[str, Any]:
    """A tokenizer.json with the structure of that of "phi-2", "phi-4", "phi-4-mini" or "phi-3-small"."""
    import tokenizers
    from tokenizers import pre_tokenizers, trainers

    pattern = {"phi-2": None, "phi-4-mini": O200K}.get(kind, CL100K)
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = step
    if pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, step])
    trainer = trainers.BpeTrainer(
        vocab_size=BASE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2
    )
    made.train_from_iterator(
        [(PROSE / "page.txt").read_text() * 8, *SCRIPTS * 4, (PROSE / "train.py").read_text() * 4], trainer
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    state: dict[str, Any] = json.loads(made.to_str())
    assert len(state["model"]["vocab"]) == BASE
    state["added_tokens"] = _published_added(kind)
    if kind in ("phi-2", "phi-4-mini"):  # as published: the vocabulary has what is special, too
        state["model"]["vocab"] |= {
            token["content"]: token["id"] for token in state["added_tokens"] if not token["content"].isspace()
        }
    return state


@pytest.fixture(scope="session")
def byte_level() -> Callable[[str], dict[str, Any]]:
    """`byte_level(kind)` is a tokenizer.json of that kind, yours to change."""
    return lambda kind: copy.deepcopy(byte_level_json(kind))


@pytest.fixture(scope="session")
def hard_texts() -> list[str]:
    """All scripts, emoji, combining marks, runs of whitespace, control characters, code."""
    return SCRIPTS
