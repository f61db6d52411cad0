"""hotplug's server on this GPU under a closed loop of streamed completions, beside vLLM's figures of the same load.

    python ci/gpu/bench_serve.py --write FOLDER                       # where the smollm2 source is
    python ci/gpu/bench_serve.py FOLDER --load serve_load.py [--frontends 1 4] [--repeat 3] [--json FILE]

`--write` makes the model: Llama-1B's shape with a vocabulary of 49,152 and SmolLM2's tokenizer, a config and no
weights. `--load` is the generator: URL MODEL CONCURRENCY REQUESTS IN OUT PROCS, answering with a line `LOAD {json}`.
Prefix caching is off. A row's figures are medians; each run comes after one that warms the server up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from gpu_workloads import MODELS
from served import Served

VOCABULARY = 49152


class Row(NamedTuple):
    """A load, vLLM 0.26.0's figures on an H200 and 16 cores, and the bars."""

    concurrency: int
    requests: int
    inputs: int
    outputs: int
    vllm: dict[str, float]
    bars: dict[str, float]


ROWS = (
    Row(1, 8, 128, 256, {"out_tok_s": 533, "ttft_p50": 12.7, "ttft_p99": 15.3}, {"out_tok_s": 800, "ttft_p50": 6}),
    Row(32, 128, 256, 256, {"out_tok_s": 8287, "ttft_p50": 98, "ttft_p99": 119}, {}),
    Row(256, 1024, 256, 256, {"out_tok_s": 15024, "ttft_p50": 330, "ttft_p99": 491}, {"out_tok_s": 35000}),
    Row(512, 2048, 128, 128, {"out_tok_s": 12806, "ttft_p50": 810, "ttft_p99": 4485},
        {"out_tok_s": 35000, "ttft_p99": 1500}),
)  # fmt: skip


def write(folder: Path) -> None:
    from hotplug.core.text.tokenizer_files import load_tokenizer
    from hotplug.core.weights.source import resolve

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(resolve("smollm2"))
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    document = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token, "chat_template": tokenizer.chat_template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    config = {**MODELS["llama1b"], "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))


def measure(served: Served, load: Path, row: Row, processes: int) -> dict[str, Any]:
    """One run of a row. Raises RuntimeError where a request failed."""
    model = "m"
    command = [sys.executable, str(load), served.url, model, *map(str, row[:4]), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOAD "))
    found: dict[str, Any] = json.loads(line.removeprefix("LOAD "))
    if found["errors"] or found["reqs"] != row.requests:
        raise RuntimeError(f"{found['errors']} requests failed of {row.requests}: {found['first_error']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--frontends", type=int, nargs="+", default=[1])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="+", help="these concurrencies")
    parser.add_argument("--processes", type=int, default=4, help="of the load generator")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.write:
        write(options.folder)
        return
    if options.load is None:
        parser.error("--load is needed")
    rows = [row for row in ROWS if not options.only or row.concurrency in options.only]
    found: list[dict[str, Any]] = []
    for frontends in options.frontends:
        served = Served(str(options.folder), "--load-format", "dummy", "--served-model-name", "m",
                        "--no-enable-prefix-cache", "--max-num-seqs", "512", "--max-model-len", "4096",
                        *(["--frontends", str(frontends)] if frontends > 1 else []))  # fmt: skip
        try:
            for row in rows:
                runs = [measure(served, options.load, row, options.processes) for _ in range(options.repeat + 1)][1:]
                names = ("out_tok_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
                figures = {name: median(run[name] for run in runs) for name in names}
                found.append({"frontends": frontends, "concurrency": row.concurrency, **figures})
                against = ", ".join(f"{n} {row.vllm[n]:,.0f}" for n in row.vllm)
                missed = [n for n, bar in row.bars.items() if (figures[n] < bar) is (n == "out_tok_s")]
                verdict = f"short of {missed}" if missed else "bars met" if row.bars else ""
                print(f"{frontends} front ends, {row.concurrency:>3} clients, {row.inputs}/{row.outputs}: "
                      + ", ".join(f"{n} {v:,.1f}" for n, v in figures.items())
                      + f" | vLLM: {against} | {verdict}", flush=True)  # fmt: skip
        finally:
            served.stop()
    print(f"{os.cpu_count()} cores, medians of {options.repeat}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
