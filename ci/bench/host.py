"""The host's own cost, every figure against its bar: one table, medians of several runs.

    python ci/bench/host.py [ROW ...] [--repeat 5] [--json FILE] [--peers DIR] [--load FILE] [--requests 100000]

ROW is a row's name or the beginning of one (`loop`, `stream`); default: all. The device is `examples/null-device`,
which computes nothing and takes a set time, so what is measured is hotplug itself; engines, servers and loads are
processes of their own. The peer, vLLM's CPU build (`make bench-peers ARGS=vllm`), computes its model of two layers. A
row that cannot be measured here says why. The same load on a GPU is `ci/gpu/bench_serve.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from host_engines import null_package, servers
from host_engines.model import SMALL_VOCAB, VOCAB, model_folder, write_config
from host_engines.servers import CannotError

ROOT = Path(__file__).parents[2]
ENGINES = Path(__file__).parent / "host_engines"
SERVE_LOAD = ROOT.parent / "shared" / "gpu" / "serve_load.py"
STEADY_MS = 5.0


@dataclass(frozen=True)
class Row:
    """A figure and its bar."""

    name: str
    title: str
    unit: str
    bar: float | None = None
    """None: reported beside."""
    most: bool = True
    """Whether the bar is the most that it may be, and not the least."""

    def met(self, value: float) -> bool | None:
        if self.bar is None:
            return None
        return value <= self.bar if self.most else value >= self.bar


ROWS = (
    Row("loop-64", "engine loop, 64 decoding requests", "ms/step", 0.25),
    Row("loop-256", "engine loop, 256 decoding requests", "ms/step", 0.6),
    Row("loop-1024", "engine loop, 1,024 decoding requests", "ms/step", 2.0),
    Row("prepare", "input preparation, chunk of 2,048 tokens", "ms", 0.15),
    Row("steady", "decode at 256, steps of 5 ms", "% of ceiling", 99, most=False),
    Row("stream", "HTTP streams, one front end, 256 clients", "tok/s", 20_000, most=False),
    Row("ttft-p50", "time to first token over HTTP, 50 requests/s", "ms", 3),
    Row("ttft-p99", "the same, 99th percentile", "ms", 12),
    Row("idle", "idle server", "% of a core", 1),
    Row("soak-growth", "memory grown after a tenth of the requests", "MiB", 20),
    Row("soak-blocks", "KV blocks leaked by them", "blocks", 0),
    Row("soak-chains", "requests with lost or wrong tokens", "requests", 0),
    Row("simulate", "simulator, largest error", "%", 3),
    Row("vllm-loop-64", "vLLM, offline, 64 decoding requests", "ms/step"),
    Row("vllm-loop-256", "vLLM, offline, 256 decoding requests", "ms/step"),
    Row("vllm-loop-1024", "vLLM, offline, 1,024 decoding requests", "ms/step"),
    Row("vllm-stream", "vLLM, HTTP streams, 256 clients", "tok/s"),
    Row("vllm-ttft-p50", "vLLM, time to first token, 50 requests/s", "ms"),
    Row("vllm-ttft-p99", "the same, 99th percentile", "ms"),
)


@dataclass
class Found:
    """What was measured of a row."""

    values: list[float] = field(default_factory=list)
    cannot: str = ""
    """Why nothing was."""
    note: str = ""


class Bench:
    """The measurements. Each gives values to the rows it is for."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.found: dict[str, Found] = {}
        self.model = Path(options.model) if options.model else model_folder()
        null_package.lay_out(folder)

    # --- engines ---

    def worker(self, script: str, python: Path | None = None, environment: dict[str, str] | None = None,
               **options: Any) -> dict[str, Any]:  # fmt: skip
        """What a script of `host_engines` answers. Raises CannotError with its last words."""
        done = subprocess.run(
            [str(python or sys.executable), str(ENGINES / script), json.dumps({"model": str(self.model), **options})],
            env=environment or self.null(), capture_output=True, text=True, check=False, timeout=1800,
        )  # fmt: skip
        if done.stderr and options.get("profile"):
            print(done.stderr, file=sys.stderr)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise CannotError(f"{script} ended with {done.returncode}: {lines[-1][:200]}")
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer

    def null(self, step_ms: float = 0.0, token_us: float = 0.0) -> dict[str, str]:
        return null_package.environment(self.folder, step_ms=step_ms, token_us=token_us)

    def loop(self, rows: int) -> None:
        found = self.worker("loop.py", rows=rows, steps=self.steps(rows), repeat=self.options.repeat,
                            profile=self.options.profile)  # fmt: skip
        self.give(f"loop-{rows}", found["step_ms"])

    def steps(self, rows: int) -> int:
        return self.options.steps or max(100, 51_200 // rows)

    def prepare(self) -> None:
        found = self.worker("prepare.py", prompts=15, repeat=self.options.repeat)
        self.give("prepare", found["prepare_ms"])

    def steady(self) -> None:
        found = self.worker("loop.py", environment=self.null(STEADY_MS), rows=256, steps=self.options.steps or 200,
                            repeat=self.options.repeat)  # fmt: skip
        self.give("steady", [STEADY_MS / ms * 100 for ms in found["step_ms"]])

    def soak(self) -> None:
        found = self.worker("soak.py", requests=self.options.requests, tokens=32, clients=256)
        note = (f"{self.options.requests} requests of 32 tokens in {found['seconds']:.0f} s, one run; "
                f"{found['settled_mib']:.0f} MiB after a tenth, at most {found['highest_mib']:.1f} more")  # fmt: skip
        self.give("soak-growth", [found["grown_mib"]], note)
        self.give("soak-blocks", [found["leaked_blocks"]])
        self.give("soak-chains", [found["wrong"]])

    def simulate(self) -> None:
        found = self.worker("predict.py", environment=self.null(5.0, 20.0), repeat=self.options.repeat)
        note = "medians: " + ", ".join(f"{name} {median(errors):+.2f} %" for name, errors in found.items())
        self.give("simulate", [max(map(abs, run)) for run in zip(*found.values(), strict=True)], note)

    # --- servers ---

    @contextmanager
    def served(self, step_ms: float) -> Iterator[servers.Server]:
        arguments = ("--device", "null_device", "--max-num-seqs", "256", "--max-model-len", "4096",
                     "--kv-cache-memory", "1GiB", "--no-enable-prefix-cache")  # fmt: skip
        with servers.hotplug(self.null(step_ms), self.model, *arguments) as server:
            yield server

    def stream(self) -> None:
        with self.served(self.options.http_step_ms) as server:
            note = f"steps of {self.options.http_step_ms:g} ms; "
            self.streams("stream", server, self.options.repeat, note)

    def streams(self, row: str, server: servers.Server, repeat: int, note: str = "") -> None:
        o = self.options
        runs = [
            servers.load(o.load, server, o.clients, o.clients * 2, o.tokens, o.tokens, o.load_processes)
            for _ in range(repeat + 1)
        ][1:]  # the first warms up
        cores = median(run["load_cores"] for run in runs)
        note += f"{o.tokens} in, {o.tokens} out; load {cores:.2f} cores, server {runs[-1]['server_cores']}"
        self.give(row, [run["out_tok_s"] for run in runs], note)

    def ttft(self) -> None:
        with self.served(0.0) as server:
            self.first_tokens("", server)

    def first_tokens(self, prefix: str, server: servers.Server) -> None:
        runs = [servers.open_loop(server, 50.0, self.options.open_requests) for _ in range(self.options.repeat)]
        note = f"{self.options.open_requests} streamed chats a run"
        for name, share in (("ttft-p50", 0.5), ("ttft-p99", 0.99)):
            self.give(prefix + name, [run[min(len(run) - 1, int(share * len(run)))] for run in runs], note)

    def idle(self) -> None:
        with self.served(0.0) as server:
            values = [servers.idle_share(server, self.options.idle_seconds) for _ in range(self.options.repeat)]
        self.give("idle", values, f"over {self.options.idle_seconds:g} s")

    # --- vLLM ---

    @property
    def vllm_python(self) -> Path:
        python: Path = self.options.peers / "vllm" / "bin" / "python"
        if not python.exists():
            raise CannotError("vLLM is not here; `make bench-peers ARGS=vllm` makes its environment")
        return python

    def vllm_loop(self, rows: int) -> None:
        folder = self.folder / "small"
        write_config(folder, SMALL_VOCAB)
        found = self.worker("vllm_loop.py", self.vllm_python, servers.vllm_environment(), model=str(folder), rows=rows,
                            steps=max(4, 2560 // rows), repeat=self.options.repeat)  # fmt: skip
        self.give(f"vllm-loop-{rows}", found["step_ms"], f"{found['about']}, vocabulary of {SMALL_VOCAB}")

    def vllm_stream(self) -> None:
        with servers.vllm(self.vllm_python, self.model, 256) as server:
            self.streams("vllm-stream", server, self.options.repeat, f"vocabulary of {VOCAB}; ")

    def vllm_ttft(self) -> None:
        with servers.vllm(self.vllm_python, self.model, 256) as server:
            self.first_tokens("vllm-", server)

    def give(self, row: str, values: Sequence[float], note: str = "") -> None:
        self.found[row] = Found(list(values), note=note)

    def measure(self, wanted: Sequence[Row]) -> dict[str, Found]:
        """What was found of the wanted rows, in their order."""
        names = {row.name for row in wanted}
        for rows, what in self.measurements():
            asked = [name for name in rows if name in names]
            if not asked:
                continue
            print(f"measuring {', '.join(asked)}", file=sys.stderr, flush=True)
            try:
                what()
            except (CannotError, subprocess.TimeoutExpired) as e:
                for name in asked:
                    self.found[name] = Found(cannot=str(e))
        return {row.name: self.found[row.name] for row in wanted}

    def measurements(self) -> Iterator[tuple[tuple[str, ...], Callable[[], None]]]:
        """What there is to measure, and for which rows. The peer's engine is measured beside ours."""
        for rows in (64, 256, 1024):
            yield (f"loop-{rows}",), lambda rows=rows: self.loop(rows)
            yield (f"vllm-loop-{rows}",), lambda rows=rows: self.vllm_loop(rows)
        yield ("prepare",), self.prepare
        yield ("steady",), self.steady
        yield ("simulate",), self.simulate
        yield ("stream",), self.stream
        yield ("vllm-stream",), self.vllm_stream
        yield ("ttft-p50", "ttft-p99"), self.ttft
        yield ("vllm-ttft-p50", "vllm-ttft-p99"), self.vllm_ttft
        yield ("idle",), self.idle
        yield ("soak-growth", "soak-blocks", "soak-chains"), self.soak


def table(rows: Sequence[Row], found: dict[str, Found]) -> str:
    """Markdown: a row a figure, its bar and whether it is met."""
    lines = [["row", "figure", "median", "bar", "", "spread"], ["---"] * 6]
    for row in rows:
        one = found[row.name]
        bar = "-" if row.bar is None else f"{'<=' if row.most else '>='} {row.bar:g}"
        if not one.values:
            lines.append([row.name, row.title, "-", bar, "not measured", one.cannot])
            continue
        value = median(one.values)
        verdict = {True: "met", False: "missed", None: "beside"}[row.met(value)]
        spread = f"{min(one.values):.4g} to {max(one.values):.4g}" + (f"; {one.note}" if one.note else "")
        lines.append([row.name, row.title, f"{value:.4g} {row.unit}", bar, verdict, spread])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def document(rows: Sequence[Row], found: dict[str, Found]) -> dict[str, Any]:
    """The table as plain data."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "rows": [
            {"name": row.name, "title": row.title, "unit": row.unit, "bar": row.bar, "most": row.most,
             "values": one.values, "median": median(one.values) if one.values else None,
             "met": row.met(median(one.values)) if one.values else None, "cannot": one.cannot, "note": one.note}
            for row in rows for one in (found[row.name],)
        ],
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("rows", nargs="*", metavar="ROW", help="rows whose names begin so; default: all")
    made.add_argument("--repeat", type=int, default=5, help="runs of each figure")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every value here")
    made.add_argument("--model", help="another model's folder, with a tokenizer")
    made.add_argument("--profile", action="store_true", help="what the engine loop's time goes to, by function")
    made.add_argument("--steps", type=int, default=0, help="steps of a run of the engine loop")
    made.add_argument("--requests", type=int, default=100_000, help="short requests, for memory and lost tokens")
    made.add_argument("--clients", type=int, default=256, help="clients that stream at once")
    made.add_argument("--tokens", type=int, default=128, help="prompt and output tokens of their requests")
    made.add_argument("--http-step-ms", type=float, default=0.0, help="the null device's step while they stream")
    made.add_argument("--open-requests", type=int, default=500, help="requests of a run at 50 a second")
    made.add_argument("--idle-seconds", type=float, default=20.0)
    made.add_argument("--peers", type=Path, default=ROOT / ".peers", help="where `make bench-peers` put them")
    made.add_argument("--load", type=Path, default=os.environ.get("SERVE_LOAD", SERVE_LOAD),
                      help="serve_load.py; default: $SERVE_LOAD, or ../shared/gpu/serve_load.py")  # fmt: skip
    made.add_argument("--load-processes", type=int, default=1, help="processes of that load")
    return made


def main() -> None:
    made = parser()
    options = made.parse_args()
    wanted = [row for row in ROWS if row.name.startswith(tuple(options.rows) or ("",))]
    if not wanted:
        made.error("no row has such a name; there are " + ", ".join(row.name for row in ROWS))
    with tempfile.TemporaryDirectory(prefix="hotplug-bench-") as folder:
        found = Bench(options, Path(folder)).measure(wanted)
    print(table(wanted, found))
    print(f"\n{len(os.sched_getaffinity(0))} cores, medians of {options.repeat}")
    if options.json is not None:
        options.json.write_text(json.dumps(document(wanted, found), indent=1) + "\n")
    if any(row.met(median(found[row.name].values)) is False for row in wanted if found[row.name].values):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
