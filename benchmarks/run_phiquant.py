"""phiquant's side of compare_llama_cpp.py: loads a model, then answers requests, one JSON object a line.

{"prompt": 256}  ->  {"speed": tokens/s}      a prompt of so many random tokens, the last logits wanted
{"decode": 32}   ->  {"speed": tokens/s}      so many tokens after a prompt of 4, the likeliest each time
"""

from __future__ import annotations

import json
import sys

import numpy as np

from phiquant.llm import LLM


def prompt(llm: LLM, rng: np.random.Generator, count: int) -> float:
    done = llm.generate(rng.integers(100, 31000, count).tolist(), max_tokens=1, temperature=0)
    assert done.usage.cached_tokens == 0, "a prompt that the cache knows is not measured"
    return done.timings.prompt_per_second


def decode(llm: LLM, rng: np.random.Generator, count: int) -> float:
    while True:
        done = llm.generate(rng.integers(100, 31000, 4).tolist(), max_tokens=count + 1, temperature=0)
        if done.usage.completion_tokens > count // 2:  # random weights may say the end token early
            return done.timings.decode_per_second


def main() -> None:
    job = json.loads(sys.argv[1])
    rng = np.random.default_rng(job["seed"])
    with LLM.load(job["model"], context=1024, threads=job["threads"]) as llm:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            measure, count = (prompt, request["prompt"]) if "prompt" in request else (decode, request["decode"])
            print(json.dumps({"speed": measure(llm, rng, count)}), flush=True)


if __name__ == "__main__":
    main()
