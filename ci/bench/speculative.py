"""Decoding with and without speculation: tokens a second and a step, on texts that repeat and texts that do not.

    python ci/bench/speculative.py [--repeat 3] [--tokens 128] [--ids FILE] [--isa avx2] [ENGINE OPTION=VALUE ...]

Every prompt is answered by one engine in turn without and with speculation, `--repeat` times; the figures are the
best of each, since other work on the machine only ever slows one down. Outputs must be equal. `--ids` adds
continuations of 128-token stretches of a JSON list of token ids. `--isa` takes another instruction set of the native
CPU library than the best.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from hotplug import LLM, SamplingParams
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request

TEXT = (
    "The Amazon rainforest covers most of the Amazon basin of South America. The basin covers seven million square "
    "kilometres, of which five and a half million are covered by the rainforest. This region includes territory "
    "belonging to nine nations. The majority of the forest is contained within Brazil, with sixty percent of the "
    "rainforest, followed by Peru with thirteen percent, and Colombia with ten percent."
)
TASKS = {
    "repeat": f"Repeat the following text exactly:\n\n{TEXT}",
    "correct": "Fix the spelling of the following text and print the whole text again:\n\n"
    + TEXT.replace("rainforest", "rain forrest"),
    "summarize": f"Summarize the following text:\n\n{TEXT}",
    "explain": "Explain how a hash table works.",
    "story": "Write a short story about a lighthouse keeper.",
}
STRETCH, STRETCHES = 128, 6


@dataclass
class Answer:
    """Output tokens, decode steps and seconds after the first token."""

    tokens: list[int]
    steps: int
    seconds: float


def answer(core: EngineCore, prompt: list[int], params: SamplingParams) -> Answer:
    before = core.stats().steps
    core.add(Request(id="a", prompt_token_ids=prompt, sampling=params))
    found, first = Answer([], 0, 0.0), 0.0
    while core.has_work:
        for delta in core.step():
            first = first or time.perf_counter()
            found.tokens += delta.token_ids
    found.seconds, found.steps = time.perf_counter() - first, core.stats().steps - before - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="ENGINE OPTION=VALUE")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--isa")
    parser.add_argument("--only", action="append", help="this task; repeatable")
    args = parser.parse_args()
    if args.isa:
        from hotplug.platforms.cpu.native import library

        library.load().use(args.isa)
    options = dict(option.split("=", 1) for option in args.options)
    llm = LLM(options.pop("model", "smollm2"), kv_cache_memory="512MiB", enable_prefix_cache=False, max_num_seqs=2,
              **options)  # fmt: skip
    prompts = {name: [llm.tokenizer.encode_chat([{"role": "user", "content": text}])] for name, text in TASKS.items()}
    if args.ids is not None:
        ids = json.loads(args.ids.read_text())
        prompts["ids"] = [ids[(i + 1) * 1237 :][:STRETCH] for i in range(STRETCHES)]
    answer(llm.core, prompts["story"][0], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    print("| text | tokens/s | with speculation | ratio | tokens a step | acceptance |\n|---|---|---|---|---|---|")
    for name, group in prompts.items():
        if args.only is None or name in args.only:
            print(line(llm.core, name, group, args))


def line(core: EngineCore, name: str, prompts: list[list[int]], args: argparse.Namespace) -> str:
    """A row of the table, over all prompts of a group."""
    seconds, tokens, steps = [0.0, 0.0], 0, 0
    before = core.stats()
    for prompt in prompts:
        best: list[Answer] = []
        for _ in range(args.repeat):
            pair = [
                answer(core, prompt, SamplingParams(temperature=args.temperature, seed=7, max_tokens=args.tokens,
                                                    ignore_eos=True, speculative=on))
                for on in (False, True)
            ]  # fmt: skip
            if pair[0].tokens != pair[1].tokens:
                raise SystemExit(f"{name}: the outputs differ")
            best = [min(two, key=lambda a: a.seconds) for two in zip(best or pair, pair, strict=True)]
        seconds = [total + one.seconds for total, one in zip(seconds, best, strict=True)]
        tokens, steps = tokens + len(best[0].tokens) - 1, steps + best[1].steps
    stats = core.stats()
    proposed = stats.proposed_tokens - before.proposed_tokens
    accepted = stats.accepted_tokens - before.accepted_tokens
    acceptance = f"{accepted / proposed:.0%}" if proposed else "-"
    rates = [tokens / one for one in seconds]
    return (f"| {name} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} | {tokens / steps:.2f} | "
            f"{acceptance} |")  # fmt: skip


if __name__ == "__main__":
    main()
