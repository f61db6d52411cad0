"""Steps compiled by Inductor beside captured ones, on a GPU: start-up, cold and warm, and speed.

    python ci/gpu/bench_compile.py --workloads ../shared/gpu/workloads.py [--model llama1b] [--tokens 2048]

Each cell is a process of its own, with caches in one empty folder: the first start of a mode fills them, the second
finds them. Decode is the median time of a step at batch 1 (128 tokens in) and batch 64 (1,024 in); prefill is one
prompt of the step's token budget.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

BATCH = 64
COLUMNS = ("exec", "start", "start_s", "compiled", "batch1_ms", "batch64_ms", "prefill_tok_s", "peak_gib", "tokens")


def model_folder(workloads: Path, name: str) -> str:
    spec = importlib.util.spec_from_file_location("workloads", workloads)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.model_dir(name))


def start_and_measure(mode: str, model: str, max_tokens: int) -> dict[str, Any]:
    """Figures of one engine in this process."""
    import torch

    from hotplug.cli.bench_engine import measure, random_prompts
    from hotplug.core.config import EngineConfig
    from hotplug.core.engine.core import EngineCore

    begin = time.perf_counter()
    core = EngineCore(EngineConfig(
        model=model, device="cuda", exec=mode, load_format="dummy", max_num_seqs=BATCH, max_model_len=4096,
        max_num_batched_tokens=max_tokens, enable_prefix_cache=False,
    ))  # fmt: skip
    core.wait_until_compiled()
    started = time.perf_counter() - begin
    torch.cuda.reset_peak_memory_stats()

    def step_ms(batch: int, input_len: int) -> float:
        prompts = random_prompts(core.vocab_size, batch, input_len, seed=batch)
        measure(core, prompts, 8)  # warms up: kernels are loaded, steps recorded
        return 1000 * median(measure(core, prompts, 64).gaps)

    one, many = step_ms(1, 128), step_ms(BATCH, 1024)
    long = random_prompts(core.vocab_size, 1, max_tokens, seed=7)
    measure(core, long, 2)
    prefill = max_tokens / min(measure(core, long, 1).seconds for _ in range(3))
    platform = core.bound.placement.platform
    return {
        "exec": mode, "start_s": round(started, 1), "compiled": platform.num_compiled() if mode == "compile" else "",
        "batch1_ms": round(one, 3), "batch64_ms": round(many, 3), "prefill_tok_s": round(prefill),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "tokens": greedy_hash(core),
        "shapes": core.report().get("compiled", []), "recompiles": core.stats().recompiles,
    }  # fmt: skip


def greedy_hash(core: Any) -> str:
    """A few greedy tokens, to see that the modes agree; rounding may part them late."""
    from hotplug.core.request import Request, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    core.add(Request(id="same", prompt_token_ids=list(range(1000, 1064)), sampling=params))
    found: list[int] = []
    while core.has_work:
        for delta in core.step():
            found += delta.token_ids
    return "-".join(map(str, found[:4]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=Path, required=True, help="the file of the shared model configurations")
    parser.add_argument("--model", default="llama1b")
    parser.add_argument("--tokens", type=int, default=2048, help="token budget of a step")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", choices=("capture", "compile"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = model_folder(options.workloads, options.model)
    if options.one:
        print(json.dumps(start_and_measure(options.one, model, options.tokens)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        places = {name: str(Path(folder, name.lower()))
                  for name in ("HOTPLUG_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}  # fmt: skip
        command = [sys.executable, __file__, "--workloads", str(options.workloads), "--model", options.model,
                   "--tokens", str(options.tokens)]  # fmt: skip
        for mode in ("capture", "compile"):
            for start in ("cold", "warm"):
                done = subprocess.run([*command, "--one", mode], env={**os.environ, **places}, stdout=subprocess.PIPE,
                                      text=True, check=True)  # fmt: skip
                rows.append({"start": start, **json.loads(done.stdout.splitlines()[-1])})
                print(rows[-1], file=sys.stderr, flush=True)
    widths = [max(len(c), *(len(str(r[c])) for r in rows)) for c in COLUMNS]
    for row in ({c: c for c in COLUMNS}, *rows):
        print("  ".join(str(row[c]).rjust(w) for c, w in zip(COLUMNS, widths, strict=True)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
