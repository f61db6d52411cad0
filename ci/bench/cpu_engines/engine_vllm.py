"""vLLM's CPU build, its engine without its server."""

from __future__ import annotations

import time
from typing import Any

import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt


class VLLM:
    """Options: those of `EngineArgs`, the model a Hugging Face folder."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._engine = LLMEngine.from_engine_args(EngineArgs(**options, disable_log_stats=True))
        self._asked = 0
        self.about = f"vLLM {vllm.__version__}, {options.get('dtype', 'auto')}"

    def generate(self, prompts: list[list[int]], new_tokens: int, *, share: bool) -> list[list[float]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        times: dict[str, list[float]] = {}
        begin = time.perf_counter()
        for prompt in prompts:
            self._asked += 1
            times[str(self._asked)] = []
            self._engine.add_request(str(self._asked), TokensPrompt(prompt_token_ids=prompt), sampling)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                own = times[output.request_id]
                own += [now] * (len(output.outputs[0].token_ids) - len(own))
        return list(times.values())


def start(options: dict[str, Any]) -> VLLM:
    return VLLM(options)
