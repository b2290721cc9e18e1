"""Writes tests/vectors/phi3small_*.npz: what mlx-lm, in float32, says of the models in models_phi3small.py.

    PYTHONPATH=src python tests/parity/make_vectors_phi3small.py        needs mlx and mlx-lm

Of the models that mlx-lm does not know, it is numpy_phi3small.py that says it. The files are those of make_vectors.py,
for the last tokens of each sequence.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.parity import mlx_phi3small, numpy_phi3small
from tests.parity.conftest import KEPT, VECTORS, log_softmax
from tests.parity.models_phi3small import LAST, MODELS, OTHERS


def main() -> None:
    for model in (*MODELS.values(), *OTHERS.values()):
        if model.name in MODELS:
            logits = mlx_phi3small.logits(mlx_phi3small.load(model), model.ids())
        else:
            logits = numpy_phi3small.logits(model, model.weights(), model.ids())
        found = log_softmax(logits)[-LAST:]
        path = VECTORS / f"phi3small_{model.name}.npz"
        np.savez_compressed(
            path, ids=model.ids(), top=found.argmax(axis=1).astype(np.int32), kept=found[:, KEPT].astype(np.float32)
        )
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
