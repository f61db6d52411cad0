"""The GPU benchmark: every cell of the table, median of several runs, beside the peer's figure and the roofline.

    python ci/bench/gpu.py [MODEL[:WORKLOAD,...] ...] [--repeats 3] [--exec capture] [--out FILE.json] [--profile CELL]

Peer: vLLM 0.26.0 on one H200 (driver 580, CUDA 13), same lengths, random weights and token ids, greedy, prefix cache
off. Random weights, end-of-sequence ignored, no tokenizer: token ids in, token ids out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

from gpu_workloads import MODELS, WORKLOADS, model_folder

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.engine.process import freeze_started_objects
from hotplug.core.request import Request, SamplingParams

PEER = {  # (peer, bar); milliseconds a token, tokens a second, or seconds
    "llama8b": {"decode1": (5.10, 4.25), "decode64": (4673, 5200), "decode256": (14122, 15500),
                "prefill": (41153, 41500), "mixed": (10241, 11300), "long8": (10.8, 10.8)},
    "llama1b": {"decode1": (1.605, 1.0), "decode64": (18246, 21000), "decode256": (44939, 50000),
                "prefill": (247872, 250000), "mixed": (43026, 48000)},
    "qwen3moe": {"decode1": (4.19, 3.6), "decode64": (2838, 3400), "prefill": (62888, 63000)},
}  # fmt: skip
UNITS = {"decode1": "ms/token", "prefill": "in tok/s", "long8": "s", "one20k": "s"}
READ, BF16 = 4.2e12, 680e12
"""Bytes a second read and bf16 operations a second, measured on an H200."""


def figure(workload: str, seconds: float) -> float:
    """What the table shows for a run of so many seconds."""
    requests, inputs, outputs = WORKLOADS[workload]
    if workload == "decode1":
        return seconds * 1e3 / outputs
    if UNITS.get(workload) == "s":
        return seconds
    return requests * (inputs if workload == "prefill" else outputs) / seconds


def roofline(model: str, workload: str) -> float:
    """Seconds that reading the weights and the cache, and the matrix products, take at the measured ceilings."""
    c, (requests, inputs, outputs) = MODELS[model], WORKLOADS[workload]
    hidden, layers, dim = c["hidden_size"], c["num_hidden_layers"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    experts = c.get("num_experts", 0)
    width = c["moe_intermediate_size"] * c["num_experts_per_tok"] if experts else c["intermediate_size"]
    active = layers * (attention + 3 * hidden * width)
    head = hidden * c["vocab_size"]
    scores = 2 * dim * heads * layers * inputs  # operations a prompt token, the mean over its positions
    prefill = requests * inputs * (2 * active + scores) / BF16
    read = active
    if experts:  # the chance that an expert is asked by none of the batch
        hit = 1 - (1 - c["num_experts_per_tok"] / experts) ** requests
        read = layers * (attention + 3 * hidden * c["moe_intermediate_size"] * experts * hit)
    cached = requests * (inputs + outputs / 2) * 2 * kv_heads * dim * layers
    step = max(2 * (read + head + cached) / READ, 2 * requests * (active + head) / BF16)
    return prefill + (outputs - 1) * step


def run(core: EngineCore, name: str, seed: int) -> float:
    """Seconds from the first request's arrival to the last token."""
    requests, _, outputs = WORKLOADS[name]
    params = SamplingParams(temperature=0.0, max_tokens=outputs, min_tokens=0, ignore_eos=True)
    prompts = WORKLOADS[name].prompts(name, seed)
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        core.add(Request(id=f"{name}{seed}.{i}", prompt_token_ids=prompt, sampling=params))
    tokens = 0
    while core.has_work:
        for delta in core.step():
            tokens += len(delta.token_ids)
    seconds = time.perf_counter() - begin
    assert tokens == requests * outputs, f"{tokens} tokens came of {requests * outputs}"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cells", nargs="*", default=list(PEER))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--exec", default="auto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", default="", help="workloads to profile after timing, comma separated")
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE of EngineConfig")
    args = parser.parse_args()
    options: dict[str, Any] = {k: json.loads(v) for k, v in (o.split("=", 1) for o in args.option)}
    results: list[dict[str, Any]] = []
    for cell in args.cells:
        model, _, names = cell.partition(":")
        workloads = names.split(",") if names else list(PEER.get(model, WORKLOADS))
        begin = time.perf_counter()
        config = {"max_num_seqs": 512, "max_model_len": 33024, "exec": args.exec, **options}
        core = EngineCore(
            EngineConfig(model=str(model_folder(model)), device="cuda", load_format="dummy",
                         enable_prefix_cache=False, **config)
        )  # fmt: skip
        built = time.perf_counter() - begin
        core.add(Request(id="first", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=1)))
        while core.has_work:
            core.step()
        print(f"{model}: engine {built:.1f} s, first token {time.perf_counter() - begin:.1f} s, plan "
              f"{core.bound.kernels.plan.hash}, {core.num_blocks} blocks", flush=True)  # fmt: skip
        phases = core.report()["startup"]["seconds"]
        print("  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items()), flush=True)
        freeze_started_objects()  # as the engine's own process does
        for name in workloads:
            times = [run(core, name, seed) for seed in range(args.repeats)]
            found, floor = figure(name, statistics.median(times)), figure(name, roofline(model, name))
            peer, bar = PEER.get(model, {}).get(name, (None, None))
            lower = UNITS.get(name) in ("ms/token", "s")
            ratio = peer and (peer / found if lower else found / peer)
            met = bar and (found <= bar if lower else found >= bar)
            beside = (f"peer {peer:8.5g} x{ratio:.3f} bar {bar:8.5g} {'met' if met else 'short':5}" if peer
                      else f"{'no peer measured':41}")  # fmt: skip
            results.append({"model": model, "workload": name, "value": found, "times": times, "peer": peer,
                            "bar": bar, "met": met, "ratio": ratio, "roofline": floor})  # fmt: skip
            print(f"{model:9} {name:10} {found:10.4g} {UNITS.get(name, 'out tok/s'):10} {beside} "
                  f"roofline {floor:8.4g} "
                  f"({min(floor, found) / max(floor, found):.0%}) spread {max(times) / min(times) - 1:.1%}",
                  flush=True)  # fmt: skip
            if name in args.profile.split(","):
                profile(core, name)
        del core
        gc.unfreeze()
        gc.collect()
        import torch

        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


def profile(core: EngineCore, name: str) -> None:
    """Device time by kernel over one run, and how much of the time the device was idle."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(core, name, 98)
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in profiler.events())
    total: dict[str, list[float]] = {}
    busy, until = 0.0, spans[0][0]
    for start, end, kernel in spans:
        total.setdefault(kernel, []).append(end - start)
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    window = until - spans[0][0]
    print(f"  {name}: {window / 1e3:.1f} ms, device idle {1 - busy / window:.2%}")
    for kernel, times in sorted(total.items(), key=lambda kv: -sum(kv[1]))[:22]:
        print(f"  {sum(times) / 1e3:9.2f} ms {sum(times) / window:6.1%} {len(times):7} x "
              f"{statistics.median(times):8.1f} us  {kernel[:90]}")  # fmt: skip


if __name__ == "__main__":
    main()
