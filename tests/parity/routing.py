"""Which experts a file's routers choose, seen from outside: by what calibration counts, token by token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phiquant import arch
from phiquant.calibrate.observe import observe
from phiquant.gguf import GGMLType, GGUFFile
from phiquant.kernels.ops import Capacity, Step
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record


def chosen_experts(path: Path, ids: Sequence[int], count: int, backend: str) -> NDArray[np.int64]:
    """Of the first `count` tokens of a sequence, [layers, tokens, 2], ascending. Asserts that they are two."""
    made = []
    with GGUFFile.open(path) as gguf:
        config = arch.load(gguf)
        program, seen = observe(record(config, load_weights(gguf, config)), lambda name: "ffn_gate_exps" in name)
        capacity = Capacity(tokens=1, outputs=1, cache_type=GGMLType.F32)
        executable = select(backend, None).prepare(program, capacity)
        try:
            rope = Rope(config.rotary)
            regime = rope.regime(len(ids))
            before = np.stack([observation.counts for observation in seen])
            for position, token in enumerate(ids[:count]):
                positions = np.array([position], np.int32)
                executable.run(
                    Step(
                        np.array([token], np.int32),
                        positions,
                        np.zeros(1, np.int32),
                        np.arange(capacity.pages, dtype=np.int32)[None],
                        *rope.rotation(positions, regime),
                        np.zeros(0, np.int32),
                    )
                )
                now = np.stack([observation.counts for observation in seen])
                layers, experts = np.nonzero(now - before)
                assert np.array_equal(layers, np.repeat(np.arange(len(seen)), 2)), (token, now - before)
                made.append(experts.reshape(len(seen), 2))
                before = now
        finally:
            executable.close()
    return np.stack(made, axis=1)
