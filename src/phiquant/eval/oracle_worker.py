"""Logits of a Hugging Face checkpoint as transformers computes them, in float32.

Run by `oracle.py` as a program, with a Python that has torch and transformers; it imports nothing of phiquant,
and phiquant never imports it.

Standard input: JSON, {"model": folder, "sequences": [[ids]], "rows": rows of a block}. Standard output: a line of JSON,
{"vocabulary", "torch", "transformers", "class"} or {"missing": module} or {"error": message}; then the logits, float32,
[tokens, vocabulary] of one sequence after the other. Whatever libraries print goes to standard error.

Hidden states come first, for all sequences; then the layers are given up, and logits are made as they are read: at no
time is there a whole [tokens, vocabulary], nor, while the reader loads its own form of the model, this one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - as sys.path has it
ALIKE = 1e-4  # of logits: more than rounding in another order gives, less than a factor or an offset


def main() -> None:
    """Read the job and answer it."""
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        sys.path[:] = [folder for folder in sys.path if folder != HERE]  # statistics.py here is not the library's
        job = json.load(sys.stdin)

        def head(**fields: object) -> None:
            out.write(json.dumps(fields).encode() + b"\n")
            out.flush()

        try:
            import torch
            import transformers
        except ImportError as error:
            head(missing=error.name or str(error))
            return
        try:
            with torch.no_grad():
                blocks = logits(torch, transformers, job)
                described = next(blocks)
                head(**described, torch=torch.__version__, transformers=transformers.__version__)
        except Exception as error:
            head(error=f"{type(error).__name__}: {error}")
            return
        with torch.no_grad():
            for block in blocks:
                out.write(block.numpy().tobytes())


def logits(torch: Any, transformers: Any, job: Any) -> Iterator[Any]:
    """First what is known of the model, then blocks of logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    sequences = [torch.tensor([ids]) for ids in job["sequences"]]
    known = {"class": type(model).__name__, "vocabulary": model.get_output_embeddings().weight.shape[0]}
    decoder, output = model.get_decoder(), model.get_output_embeddings()
    few = sequences[0][:, :8]
    apart = output(decoder(few, use_cache=False).last_hidden_state) - model(few, use_cache=False).logits
    if apart.abs().max() > ALIKE:  # something comes after the output matrix
        yield known
        for ids in sequences:
            yield from model(ids, use_cache=False).logits[0].float().split(job["rows"])
        return
    hidden = [decoder(ids, use_cache=False).last_hidden_state[0] for ids in sequences]
    del model, decoder
    gc.collect()
    yield known
    for states in hidden:
        for part in states.split(job["rows"]):
            yield output(part).float()


if __name__ == "__main__":
    main()
