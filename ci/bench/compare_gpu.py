"""hotplug beside vLLM on one GPU in one run: batches through the offline APIs, then Poisson arrivals over HTTP.

    python ci/bench/compare_gpu.py [MODEL[:CELL,...] ...] [--vllm-site DIR | --vllm-python FILE] [--tokenizer DIR]
                                   [--settings defaults tuned] [--rates 20 60 100] [--seconds 30] [--out FILE]

Random weights, same token ids, greedy, end of sequence ignored, prefix cache off, 8,192 tokens of context (33,024 for
the cells `long8` and `one20k`); everything else is each engine's default, or what `peers/gpu_settings.py` names as
tuned. A cell is `chat` (500 chat-like requests at once), one of `gpu_workloads.py`, or `http`. The model's folder gets
a tokenizer, SmolLM2's or the one in `--tokenizer`. Needs nothing outside the repository but vLLM, which `--vllm-site`
(a folder for the module path) or `--vllm-python` (an interpreter) names. `--dry-run` takes a tiny model on the CPU:
everything but the GPU and its figures.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from peers import history
from peers.gpu import Bench, Cells, not_brought
from peers.gpu_settings import SETTINGS
from peers.records import ROOT, Run, merge
from peers.tables import load_table, model_table
from track import machine

DEFAULT_CELLS = ("llama3b:chat,http", "qwen3-8b:chat", "llama8b:decode1,decode64,decode256,prefill,mixed")
OUT = ROOT / ".bench" / "compare-gpu.jsonl"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("cells", nargs="*", metavar="MODEL[:CELL,...]", help=f"default: {' '.join(DEFAULT_CELLS)}")
    made.add_argument("--vllm-site", default="", metavar="DIR", help="vLLM's packages, in front of the module path")
    made.add_argument("--vllm-python", default=sys.executable, metavar="FILE", help="the interpreter that has vLLM")
    made.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer.json and tokenizer_config.json")
    made.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    made.add_argument("--rates", type=float, nargs="+", default=[20.0, 60.0, 100.0], help="requests a second")
    made.add_argument("--seconds", type=float, default=30.0, help="of arrivals at each rate")
    made.add_argument("--repeat", type=int, default=3, help="runs of a batch after one that warms up")
    made.add_argument("--processes", type=int, default=4, help="that send the load")
    made.add_argument("--history", type=Path, metavar="FILE", help="keep the rows in a performance history, too")
    made.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"default: {OUT.relative_to(ROOT)}")
    made.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU, a few short requests")
    return made


def main() -> None:
    made = parser()
    options = made.parse_args()
    facts = machine.facts()
    wanted = ["tiny:chat,http"] if options.dry_run else options.cells or list(DEFAULT_CELLS)
    try:
        cells = [Cells.parse(text, tiny=options.dry_run) for text in wanted]
    except ValueError as e:
        made.error(str(e))
    if options.dry_run:
        options.rates, options.seconds, options.repeat, options.processes = [4.0], 3.0, 1, 2
    elif not facts["gpus"]:
        made.error("no GPU is here; --dry-run shows that everything else works")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that engines end with it
    bench = Bench(Run(facts), options)
    rows = bench.measure(cells)
    kept = merge(options.out, rows)
    if options.history is not None:
        history.keep(rows, options.history)
    offline = [row for row in kept if ": " not in row["figure"]]
    http = [row for row in kept if ": " in row["figure"]]
    text = f"{model_table(offline)}\n\n{load_table(http)}\n\n{not_brought(kept)}"
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
