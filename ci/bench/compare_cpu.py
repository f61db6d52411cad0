"""hotplug beside its peers on this processor: each at its defaults and at a tuned setting, raw rows and the table.

    python ci/bench/compare_cpu.py [ENGINE ...] [--repeat 5] [--seconds 90] [--starts 2] [--isa avx2] [--out FILE]

Same weights, same token ids, one client that counts the tokens itself. The rows go to FILE, in place of those of the
same engines there; the table goes to the same name with `.md`. `peers/settings.py` says what is set and which page
recommends it; what is not run is listed with its reason. `make bench-peers` makes the peers' environments.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from cpu import prepare
from cpu_engines.workloads import Source
from peers import history
from peers.measure import Bench, entries, reference
from peers.records import ROOT, Run, merge
from peers.settings import engines
from peers.tables import cpu_table, lead_table, not_run
from track import machine

from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.platforms.cpu.cores import physical_cores

OUT = ROOT / ".bench" / "compare-cpu.jsonl"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("engines", nargs="*", metavar="ENGINE", help="those whose names begin so; default: all")
    made.add_argument("--repeat", type=int, default=5, help="most rounds, after a short one that warms up")
    made.add_argument("--seconds", type=float, default=90.0, help="no round of an engine begins later, but the second")
    made.add_argument("--starts", type=int, default=2, help="starts of an engine after its first")
    made.add_argument("--isa", choices=["avx2"], help="hold every engine to this instruction set")
    made.add_argument("--history", type=Path, metavar="FILE", help="keep the rows in a performance history, too")
    made.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"default: {OUT.relative_to(ROOT)}")
    return made


def main() -> None:
    made = parser()
    options = made.parse_args()
    known = engines([core[0] for core in physical_cores()])
    wanted = [e for e in known if e.name.lower().startswith(tuple(n.lower() for n in options.engines) or ("",))]
    if not wanted:
        made.error("no engine has such a name; there are " + ", ".join(e.name for e in known))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that engines end with it
    folder = prepare()
    facts = machine.facts() | ({"held_to": options.isa} if options.isa else {})
    source = Source(load_tokenizer(folder / "Q4_1" / "model.gguf").encode)
    ours = reference(known[0], folder, options.isa)
    bench = Bench(Run(facts), source, ours, options.repeat, options.starts, options.seconds)
    rows = []
    for engine in wanted:
        begin = time.perf_counter()
        rows = merge(options.out, bench.measure(engine, entries(engine, folder, options.isa)))
        print(f"{engine.name} took {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if options.history is not None:
        history.keep(rows, options.history)
    text = f"{cpu_table(rows)}\n\n{lead_table(rows)}\n\n{not_run(rows)}"
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
