"""Writes tests/vectors/*.npz: what transformers, in float32, says of the models in conftest.py and models_*.py.

    PYTHONPATH=src python tests/parity/make_vectors.py [phi2 ...]        needs torch and transformers

With names, of these architectures only.

Each model's file holds the tokens, the likeliest next token after each, and the log-probabilities of 64 fixed tokens.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import FAMILIES, KEPT, MODELS, TINY, VECTORS, log_softmax, vector_file, write_checkpoint

PROMPT = [9038, 2501, 263, 931, 727, 471, 263, 2217, 7826]  # Once upon a time there was a little girl
GENERATED = 64


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0].numpy()


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    made = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    return made[0, len(ids) :].tolist()


def main(wanted: list[str]) -> None:
    VECTORS.mkdir(exist_ok=True)
    families = {"phi3": MODELS, **FAMILIES}
    for model in [model for family in wanted or families for model in families[family].values()]:
        with TemporaryDirectory() as directory:
            found = log_softmax(logits(load(write_checkpoint(model, Path(directory))), model.ids()))
        path = vector_file(model)
        np.savez_compressed(
            path, ids=model.ids(), top=found.argmax(axis=1).astype(np.int32), kept=found[:, KEPT].astype(np.float32)
        )
        print(path.name, path.stat().st_size)
    if not wanted or "phi3" in wanted:
        np.savez_compressed(VECTORS / "phi3_tiny.npz", prompt=PROMPT, generated=greedy(load(TINY), PROMPT, GENERATED))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
