"""Start-up on a GPU: what the phases of a cold and a warm start take, to the first token.

    python ci/gpu/bench_startup.py [llama8b qwen3moe] [--without-warm-up] [--json FILE]

Each start is a process of its own. Triton's cache is in one empty folder: the cold start fills it, the warm one finds
it. `process` is the time from the process' start to the first token; `late` are kernels with a launch that the
warm-up did not see, compiled when it came. `--without-warm-up` adds a cold start that compiles all kernels so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent.parent / "bench"
WARM_UP = "hotplug-warm-up"


def start(model: str, *, warm_up: bool) -> dict[str, Any]:
    """Figures of one engine's start in this process."""
    from triton import knobs

    sys.path.insert(0, str(BENCH))
    from gpu_workloads import model_folder

    from hotplug.core.config import EngineConfig
    from hotplug.core.engine.core import EngineCore
    from hotplug.core.request import Request, SamplingParams
    from hotplug.platforms.cuda import CudaPlatform

    kernels: list[tuple[str, str]] = []
    knobs.runtime.jit_cache_hook = lambda **call: kernels.append((threading.current_thread().name, call["fn"].name))
    if not warm_up:
        del CudaPlatform.warm_up
    begin = time.perf_counter()
    core = EngineCore(EngineConfig(
        model=str(model_folder(model)), device="cuda", load_format="dummy", max_num_seqs=512, max_model_len=33024,
        enable_prefix_cache=False,
    ))  # fmt: skip
    built = time.perf_counter() - begin
    core.add(Request(id="first", prompt_token_ids=list(range(1000, 1128)), sampling=SamplingParams(max_tokens=1)))
    while core.has_work:
        core.step()
    first_token = time.perf_counter() - begin
    report = core.report()
    return {
        **report["startup"], "built": round(built, 2), "first_token": round(first_token, 2), "ended": time.time(),
        "graphs": 3 * len(report["shapes"]), "blocks": core.num_blocks,
        "late": sorted({name for thread, name in kernels if thread != WARM_UP}),
    }  # fmt: skip


def show(model: str, kind: str, row: dict[str, Any]) -> None:
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in row["seconds"].items())
    memory = row["steps_memory"]
    print(f"{model} {kind}: first token {row['first_token']:.1f} s (process {row['process']:.1f} s); {seconds}")
    print(f"  warm-up {row['warm_up']}, late: {', '.join(row['late']) or 'none'}; {row['graphs']} graphs "
          f"in {row['seconds']['steps']:.1f} s, {memory['taken'] / 2**20:.0f} MiB taken, "
          f"{memory['reserved'] / 2**20:.0f} MiB reserved; {row['blocks']} KV blocks", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["llama8b", "qwen3moe"])
    parser.add_argument("--without-warm-up", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", choices=("with", "without"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(start(options.models[0], warm_up=options.one == "with")))
        return
    rows = []

    def measure(model: str, kind: str, one: str, cache: str) -> None:
        begin = time.time()
        done = subprocess.run([sys.executable, __file__, model, "--one", one], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "TRITON_CACHE_DIR": cache}, check=True)  # fmt: skip
        row = json.loads(done.stdout.splitlines()[-1])
        row["process"] = row["ended"] - begin
        rows.append({"model": model, "start": kind, **row})
        show(model, kind, row)

    for model in options.models:
        with tempfile.TemporaryDirectory() as cache:
            measure(model, "cold", "with", cache)
            measure(model, "warm", "with", cache)
        if options.without_warm_up:
            with tempfile.TemporaryDirectory() as cache:
                measure(model, "cold without warm-up", "without", cache)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
