"""Train two small models of other shapes than the bundled one, on which quantization is measured (docs/quality.md).

usage: train_models.py TEXT OUT [--models wide,mixture] [--minutes 3] [--device cuda]
                                                         (needs torch, transformers and sentencepiece)

    wide      Phi-3, 26 million parameters: width 512, grouped queries (8 heads read 2), an output of its own
    mixture   Phi-3.5-MoE, 25 million: width 256, 8 experts of 512, 2 of them for a token, biases, LayerNorm

TEXT is what they read, plain or .xz, some megabytes at least. Each becomes a checkpoint OUT/NAME with a vocabulary of
8,192 pieces that is made of the same text. Seeds are fixed; what comes out depends on how far the minutes reach, and on
the processor. On a graphics card three minutes are enough; two processor cores take a hundred times as long.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch.nn import functional
from transformers import Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

VOCABULARY = 8192
CONTEXT = 2048
LENGTH = 512  # tokens of a training sequence
RATE = 2e-3  # of AdamW, at its highest
SHARD = "14MB"
VOCABULARY_TEXT = 8_000_000  # characters that the vocabulary is made of

SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "original_max_position_embeddings": CONTEXT,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
}


def wide() -> torch.nn.Module:
    """A Phi-3 with grouped queries and an output of its own."""
    return Phi3ForCausalLM(
        Phi3Config(
            **SHARED,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )


def mixture() -> torch.nn.Module:
    """A Phi-3.5-MoE with 8 experts."""
    return PhimoeForCausalLM(
        PhimoeConfig(
            **SHARED,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            attention_bias=True,
            lm_head_bias=True,
            router_jitter_noise=0.01,
            input_jitter_noise=0.0,
        )
    )


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"wide": wide, "mixture": mixture}


def read(path: Path) -> str:
    """The text, unpacked."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")


def vocabulary(text: str, path: Path) -> sentencepiece.SentencePieceProcessor:
    """Pieces made of the beginning of the text, as Llama's are: byte pairs, with bytes for what is unknown."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:VOCABULARY_TEXT].splitlines()),
        model_prefix=str(path.with_suffix("")),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def parts(text: str) -> list[str]:
    """The text in parts of some 100,000 characters, whole paragraphs: a vocabulary puts a space before each part."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if len(found[-1]) > 100_000:
            found.append("")
        found[-1] += line
    return found


def batches(tokens: np.ndarray, count: int, device: str) -> Iterator[torch.Tensor]:
    """Sequences from random places, int64 [count, LENGTH + 1]."""
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(tokens) - LENGTH - 1, count)
        rows = np.stack([tokens[s : s + LENGTH + 1] for s in starts]).astype(np.int64)
        yield torch.from_numpy(rows).to(device, non_blocking=True)


def train(model: torch.nn.Module, tokens: np.ndarray, minutes: float, count: int, device: str) -> None:
    """AdamW for so many minutes: a short warm-up, then a cosine down to nothing."""
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    mean, started, told = None, time.monotonic(), 0.0
    for step, rows in enumerate(batches(tokens, count, device)):
        spent = time.monotonic() - started
        done = spent / (60 * minutes)
        if done >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * done)) / 2
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if spent - told > 10:
            told, value = spent, loss.item()
            mean = value if mean is None else 0.5 * mean + 0.5 * value
            print(f"{spent:6.0f} s  step {step}  loss {mean:.3f}", flush=True)


def save(model: torch.nn.Module, folder: Path) -> None:
    """The checkpoint in bfloat16, beside its vocabulary."""
    model.to("cpu", torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--minutes", type=float, default=3, help="of training, for each model")
    p.add_argument("--batch", type=int, default=64, help="sequences of a step")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = p.parse_args()
    unknown = [name for name in a.models.split(",") if name not in MODELS]
    if unknown:
        p.error(f"there is no model {unknown[0]}; known are {', '.join(MODELS)}")
    text = read(a.text)
    tokens: np.ndarray | None = None
    made: Path | None = None
    for name in a.models.split(","):
        folder = a.out / name
        folder.mkdir(parents=True, exist_ok=True)
        if tokens is None or made is None:
            pieces = vocabulary(text, folder / "tokenizer.model")
            tokens = np.concatenate([np.array(ids, np.uint16) for ids in pieces.encode(parts(text))])
            print(f"{len(tokens):,} tokens", flush=True)
        else:
            (folder / "tokenizer.model").write_bytes((made / "tokenizer.model").read_bytes())
        made = folder
        torch.manual_seed(0)
        model = MODELS[name]()
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        train(model, tokens, a.minutes, a.batch, a.device)
        save(model, folder)


if __name__ == "__main__":
    main()
