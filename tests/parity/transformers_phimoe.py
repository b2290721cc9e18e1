"""What transformers says of a random PhiMoE, and which experts it chooses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .models_phimoe import Model, write_checkpoint


def saved(model: Model, directory: Path) -> Any:
    """The model as transformers reads it from a checkpoint in the released layout."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_checkpoint(model, directory)
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def asked(made: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The logits and the experts that its routers choose, in evaluation, where nothing is jittered."""
    torch = pytest.importorskip("torch")
    chosen: list[np.ndarray] = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda module, given, out: chosen.append(out[2].numpy()))
        for layer in made.model.layers
    ]
    with torch.no_grad():
        logits = made(torch.tensor([ids])).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return logits, np.stack(chosen)
