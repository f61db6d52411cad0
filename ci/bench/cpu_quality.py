"""What formats of the weights cost: perplexity of a fixed text and greedy tokens, against the shipped ones in float32.

    python ci/bench/cpu_quality.py [--tokens 4096] [--prompts 20] [--json FILE]

The shipped file is Q4_1; Q8_0 and Q4_0 are made from its values (`cpu_engines/variants.py`). "kept" runs the groups as
they are stored, with activations rounded to eight bits; the first form is dequantized as it loads.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from cpu import prepare
from cpu_engines.workloads import Source
from prompts import PROMPTS

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams
from hotplug.core.text.tokenizer_files import load_tokenizer

WINDOW = 512
"""Tokens that are scored together; the first of them has no score."""
OUTPUTS = 64
FORMS = (("Q4_1", "float32"), ("Q4_1", "kept"), ("Q8_0", "kept"), ("Q4_0", "kept"))
"""What is measured, the first being what others are compared with."""


def perplexity(core: EngineCore, windows: list[list[int]]) -> float:
    """Of each window's tokens after its first."""
    loss = scored = 0.0
    for i, window in enumerate(windows):
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        core.add(Request(id=f"text-{i}", prompt_token_ids=window, sampling=sampling))
        while core.has_work:
            for delta in core.step():
                entries = [entry for entry in delta.prompt_logprobs or () if entry is not None]
                loss -= sum(entry.logprobs[0] for entry in entries)
                scored += len(entries)
    assert scored == sum(len(window) - 1 for window in windows)
    return math.exp(loss / scored)


def continuations(core: EngineCore, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of each prompt alone."""
    found = []
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUTS, ignore_eos=True)
        core.add(Request(id=f"prompt-{i}", prompt_token_ids=prompt, sampling=sampling))
        tokens: list[int] = []
        while core.has_work:
            for delta in core.step():
                tokens += delta.token_ids
        found.append(tokens)
    return found


def agreement(found: list[list[int]], wanted: list[list[int]]) -> float:
    """Share of tokens up to the first that differs."""
    same = sum(next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), OUTPUTS)
               for pair in zip(found, wanted, strict=True))  # fmt: skip
    return same / (OUTPUTS * len(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="to continue")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()

    folder = prepare()
    tokenizer = load_tokenizer(folder / "Q4_1" / "model.gguf")
    source = Source(tokenizer.encode)
    windows = [source.take(i * WINDOW, WINDOW) for i in range(max(options.tokens // WINDOW, 1))]
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[: options.prompts]]
    rows, first, wanted = [], 0.0, [[0]]
    for kind, form in FORMS:
        core = EngineCore(EngineConfig(
            model=str(folder / kind / "model.gguf"), device="cpu", dtype="float32", max_model_len=1024,
            kv_cache_memory="128MiB", quantization="packed" if form == "kept" else "none", enable_prefix_cache=False,
        ))  # fmt: skip
        value, tokens = perplexity(core, windows), continuations(core, prompts)
        if not rows:
            first, wanted = value, tokens
        rows.append({"weights": kind, "form": form, "perplexity": round(value, 4), "loss": value / first - 1,
                     "agreement": agreement(tokens, wanted)})  # fmt: skip
        print(f"{kind:6} {form:8} perplexity {value:8.4f}  {value / first - 1:+7.2%}  greedy tokens before the first "
              f"other one {rows[-1]['agreement']:.0%}", flush=True)  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
