"""One measurement of phiquant, for compare_llama_cpp.py: reads a job (JSON) and prints tokens/s as JSON."""

from __future__ import annotations

import json
import sys

import numpy as np

from phiquant.llm import LLM


def main() -> None:
    job = json.loads(sys.argv[1])
    rng = np.random.default_rng(job["seed"])
    with LLM.load(job["model"], context=1024, threads=job["threads"]) as llm:
        prompts, decodes = [], []
        for turn in range(3):  # the first warms up
            ids = rng.integers(100, 31000, job["prompt"]).tolist()
            done = llm.generate(ids, max_tokens=1, temperature=0)
            assert done.usage.cached_tokens == 0, "a prompt that the cache knows is not measured"
            prompts += [done.timings.prompt_per_second] if turn else []
        while len(decodes) < 2:
            ids = rng.integers(100, 31000, 4).tolist()
            done = llm.generate(ids, max_tokens=job["decode"] + 1, temperature=0)
            if done.usage.completion_tokens > job["decode"] // 2:  # random weights may say the end token early
                decodes.append(done.timings.decode_per_second)
    print(json.dumps({"prompt": max(prompts), "decode": max(decodes)}))


if __name__ == "__main__":
    main()
