"""llama.cpp's side of compare_llama_cpp.py: runs in its own environment, reads a job (JSON).

A job with "source" quantizes a file. One with "model" loads it and answers requests as run_phiquant.py does.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

import llama_cpp as L
import numpy as np


def speed(job: dict) -> None:
    """The same work as run_phiquant.py: only the last logits of a prompt, the likeliest token when decoding."""
    mp = L.llama_model_default_params()
    mp.n_gpu_layers = 0
    model = L.llama_model_load_from_file(job["model"].encode(), mp)
    assert model, "llama.cpp refuses the file"
    cp = L.llama_context_default_params()
    cp.n_ctx, cp.n_batch, cp.n_ubatch = 1024, 512, 512
    cp.n_threads = cp.n_threads_batch = job["threads"]
    ctx = L.llama_init_from_model(model, cp)
    vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    memory = L.llama_get_memory(ctx)
    rng = np.random.default_rng(job["seed"])

    def evaluate(ids: list[int]) -> int:
        array = (L.llama_token * len(ids))(*ids)
        assert L.llama_decode(ctx, L.llama_batch_get_one(array, len(ids))) == 0
        logits = np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, -1), shape=(vocabulary,))
        return int(logits.argmax())

    def prompt(count: int) -> float:
        ids = rng.integers(100, 31000, count).tolist()
        L.llama_memory_clear(memory, True)
        begun = time.perf_counter()
        evaluate(ids)
        return count / (time.perf_counter() - begun)

    def decode(count: int) -> float:
        L.llama_memory_clear(memory, True)
        token = evaluate(rng.integers(100, 31000, 4).tolist())
        begun = time.perf_counter()
        for _ in range(count):
            token = evaluate([token])
        return count / (time.perf_counter() - begun)

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        value = prompt(request["prompt"]) if "prompt" in request else decode(request["decode"])
        print(json.dumps({"speed": value}), flush=True)


def quantize(job: dict) -> None:
    """llama-quantize, by its library call."""
    p = L.llama_model_quantize_default_params()
    name = f"LLAMA_FTYPE_MOSTLY_{job['type'].upper()}"
    p.ftype, p.nthread = getattr(L, name), job["threads"]
    assert L.llama_model_quantize(job["source"].encode(), job["out"].encode(), ctypes.byref(p)) == 0


if __name__ == "__main__":
    quiet = L.llama_log_callback(lambda level, text, data: None)
    L.llama_log_set(quiet, ctypes.c_void_p(0))
    job = json.loads(sys.argv[1])
    quantize(job) if "source" in job else speed(job)
