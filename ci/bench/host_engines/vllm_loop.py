"""vLLM's engine with all requests decoding, timed, in its own environment: `python vllm_loop.py OPTIONS`.

OPTIONS is JSON: model (a folder with a config alone), rows, steps (of a run), repeat. Offline, its defaults, random
weights; what its small model takes to compute is in the figure. Prints {"step_ms": [of each run], "about"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import psutil

SETTLE = 10
PROMPT = 64


def measure(model: str, rows: int, steps: int, repeat: int) -> dict[str, Any]:
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt

    wanted = SETTLE + steps * repeat
    engine = LLMEngine.from_engine_args(EngineArgs(
        model=model, load_format="dummy", dtype="float32", max_model_len=PROMPT + wanted + 64, max_num_seqs=rows,
        max_num_batched_tokens=8192, skip_tokenizer_init=True, disable_log_stats=True,
    ))  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=wanted + 40, ignore_eos=True, detokenize=False)
    for i in range(rows):
        prompt = [5 + (i * 7919 + j) % 2000 for j in range(PROMPT)]
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), sampling)
    while len(engine.step()) < rows:  # prompts of 8,192 tokens a step first
        pass
    times: list[float] = []
    while len(times) <= wanted:
        engine.step()
        times.append(time.perf_counter())
    times = times[SETTLE:]
    runs = [(times[(i + 1) * steps] - times[i * steps]) * 1e3 / steps for i in range(repeat)]
    return {"step_ms": runs, "about": f"vLLM {vllm.__version__}"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # it prints as it likes
    print(json.dumps(measure(**json.loads(sys.argv[1]))), file=answers, flush=True)
    for child in psutil.Process().children(recursive=True):  # they would outlive us, and hold our caller's pipes
        child.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
