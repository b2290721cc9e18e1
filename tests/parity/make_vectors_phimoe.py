"""Writes tests/vectors/phimoe_*.npz: what transformers, in float32, says of the models in models_phimoe.py.

    PYTHONPATH=src python tests/parity/make_vectors_phimoe.py        needs torch and transformers

Beyond LongRoPE's border it is what numpy_phimoe.py says. Each file holds the tokens, the likeliest next token after
each, the log-probabilities of 24 fixed tokens, and the experts that every layer chooses for each token.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.parity.conftest import VECTORS, log_softmax
from tests.parity.models_phimoe import KEPT, MODELS, VECTORS_OF, beyond
from tests.parity.numpy_phimoe import PhiMoE
from tests.parity.transformers_phimoe import asked, saved


def main() -> None:
    for model in (MODELS[name] for name in VECTORS_OF):
        if beyond(model):
            wide = PhiMoE(model.config(), model.weights())
            found, chosen = log_softmax(wide.logits(model.ids())), np.stack(wide.chosen)
        else:
            with TemporaryDirectory() as directory:
                logits, chosen = asked(saved(model, Path(directory)), model.ids())
            found = log_softmax(logits)
        path = VECTORS / f"phimoe_{model.name}.npz"
        np.savez_compressed(
            path,
            ids=np.array(model.ids(), np.int32),
            top=found.argmax(axis=1).astype(np.int32),
            kept=found[:, KEPT].astype(np.float32),
            chosen=chosen.astype(np.uint8),
        )
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
