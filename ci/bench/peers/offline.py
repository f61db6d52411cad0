"""An engine's offline API under loads of token ids: `python peers/offline.py ENGINE OPTIONS`, in its own environment.

OPTIONS is JSON, of `hotplug.LLM` or `vllm.LLM`. Reads a batch a line, {"prompts", "outputs"}, answers {"seconds",
"tokens"}: wall time of one call with all requests, and the tokens that came for each. The first line that it writes is
{"about", "plan_hash", "start_seconds"}: what it is, and how long from here to a first token.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol


class Offline(Protocol):
    """An engine's offline API."""

    about: str
    plan_hash: str | None

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[int]:
        """Greedy, no end before as many tokens as asked for: how many came for each request."""
        ...


class Hotplug:
    """hotplug, its `LLM`."""

    def __init__(self, options: dict[str, Any]) -> None:
        import hotplug

        self._hotplug = hotplug
        self._llm = hotplug.LLM(**options)
        self.plan_hash: str | None = self._llm.core.plan_hash
        self.about = f"hotplug {hotplug.__version__}"

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[int]:
        wanted = [
            self._hotplug.SamplingParams(temperature=0.0, max_tokens=n, min_tokens=n, ignore_eos=True) for n in outputs
        ]
        return [len(found.outputs[0].token_ids) for found in self._llm.generate(prompts, wanted, progress=False)]


class VLLM:
    """vLLM, its `LLM`."""

    plan_hash: str | None = None

    def __init__(self, options: dict[str, Any]) -> None:
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(**options)
        self.about = f"vLLM {vllm.__version__}"

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[int]:
        wanted = [
            self._vllm.SamplingParams(temperature=0.0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
            for n in outputs
        ]
        asked = [self._vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return [len(found.outputs[0].token_ids) for found in self._llm.generate(asked, wanted, use_tqdm=False)]


ENGINES: dict[str, Any] = {"hotplug": Hotplug, "vLLM": VLLM}


def main() -> None:
    begin = time.perf_counter()
    # Engines print as they like: the answers go where their prints do not.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    engine: Offline = ENGINES[sys.argv[1]](json.loads(sys.argv[2]))
    engine.generate([[5, 6, 7]], [1])
    answer({"about": engine.about, "plan_hash": engine.plan_hash, "start_seconds": time.perf_counter() - begin})
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        tokens = engine.generate(asked["prompts"], asked["outputs"])
        answer({"seconds": time.perf_counter() - begin, "tokens": tokens})


if __name__ == "__main__":  # engines start processes that import this module anew
    main()
