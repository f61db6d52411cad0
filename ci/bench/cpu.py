"""hotplug and its peers on this processor, the same weights and prompts, interleaved.

    python ci/bench/cpu.py [ENGINE ...] [--repeat 5] [--starts 3] [--isa avx2] [--json FILE]

Peers are those whose environments `make bench-peers` made. Each engine is a process of its own, idle while another
is measured. Prints a table of medians, the best of the peers, and hotplug's ratio to it. Formats other than the
shipped Q4_1 are made from it, so that no engine has better weights than another.

`--isa avx2` holds every engine to AVX2 on a processor that has more: hotplug's kernels, PyTorch, MKL and oneDNN
(OpenVINO's too) by their settings, llama.cpp by a build of its own (`make bench-peers ARGS=llama-avx2`). What cannot
be held: OpenVINO's products with plain float32 weights, by a library that asks the processor itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from cpu_engines.variants import KINDS, write_variant
from cpu_engines.workloads import FIGURES, WORKLOADS, Asked, Source, figures
from reference_model import write_hf_folder

from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.core.weights.checkpoint import find_gguf
from hotplug.core.weights.source import cache_folder, resolve

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "cpu_engines" / "worker.py"
KV_CACHE = "256MiB"
"""Of hotplug: 5,825 tokens in float32; W2 takes 3,072. llama.cpp is given about as much, 10,240 tokens in float16."""
STARTS = (("start s", False), ("cold start s", True))
COLUMNS = (*(title for _, _, title, _ in FIGURES), *(title for title, _ in STARTS), "RSS GB")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Variables of the environment that hold PyTorch, MKL and oneDNN to AVX2."""


@dataclass(frozen=True)
class Peer:
    """An engine with one format of the weights."""

    name: str
    module: str
    environment: str
    """The folder of its virtual environment, below `.peers`; empty: the environment that runs this."""
    options: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)
    """Of its process' environment."""

    @property
    def python(self) -> Path:
        return ROOT / ".peers" / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    @property
    def ours(self) -> bool:
        return self.module == "hotplug"


def engines(folder: Path, cores: int) -> list[Peer]:
    """All that could be measured; `folder` holds the model in the forms that they read."""
    limits = {"max_num_seqs": 16, "max_model_len": 2048, "max_num_batched_tokens": 2048, "kv_cache_memory": KV_CACHE}
    ours = {"model": str(folder / "Q4_1" / "model.gguf"), **limits}
    found = [
        Peer("hotplug float32", "hotplug", "", {**ours, "dtype": "float32", "quantization": "none"}),
        *(
            Peer(
                f"hotplug {kind}",
                "hotplug",
                "",
                {**ours, "model": str(folder / kind / "model.gguf"), "dtype": "float32", "quantization": "packed"},
            )
            for kind in KINDS
            if kind != "F16"
        ),
        Peer(
            "hotplug float32 compiled",
            "hotplug",
            "",
            {**ours, "dtype": "float32", "quantization": "none", "exec": "compile"},
        ),
        Peer(
            "hotplug Q4_1 compiled",
            "hotplug",
            "",
            {**ours, "dtype": "float32", "quantization": "packed", "exec": "compile"},
        ),
        Peer("transformers", "transformers", "", {"model": str(folder / "hf")}),
        Peer(
            "vllm",
            "vllm",
            "vllm",
            {"model": str(folder / "hf"), "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16},
        ),
    ]
    for kind in KINDS:
        options = {"model": str(folder / kind / "model.gguf"), "weights": kind, "threads": cores}
        found.append(Peer(f"llama.cpp {kind}", "llama_cpp", "llama", options))
        if kind != "Q4_0":
            steps = {"max_num_batched_tokens": 2048, "max_num_seqs": 16, "cache_size": 1,
                     "enable_prefix_caching": True}  # fmt: skip
            found.append(Peer(f"openvino {kind}", "openvino", "openvino", {**options, "scheduler": steps}))
    return found


def held(peer: Peer, isa: str | None) -> Peer:
    """`peer` with no more than an instruction set."""
    if isa is None:
        return peer
    environment = f"llama-{isa}" if peer.environment == "llama" else peer.environment
    return replace(peer, environment=environment, options={**peer.options, "isa": isa}, variables=AVX2)


def prepare() -> Path:
    """The folder with the model in every form, made once."""
    source = find_gguf(resolve("smollm2"))
    assert source is not None
    folder = cache_folder() / "bench-cpu"
    for kind in KINDS:
        path = folder / kind / "model.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_variant(source, path.with_suffix(".part"), kind)
            path.with_suffix(".part").rename(path)
    if not (folder / "hf" / "config.json").exists():
        (folder / "hf").mkdir(exist_ok=True)
        write_hf_folder(source, folder / "hf")
    return folder


class Worker:
    """An engine's process. Raises RuntimeError, with its last words, where it ends or hangs instead of answering.

    Between its answers it is stopped with all of its processes: some wait for work in a loop, on a core that another
    engine is measured on.
    """

    LIMIT = 400.0
    """Seconds that an answer may take."""

    def __init__(self, peer: Peer) -> None:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
                       **peer.variables}  # fmt: skip
        self._peer = peer
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - read where the process ends
        self._process = subprocess.Popen(
            [str(peer.python), str(WORKER), peer.module, json.dumps(peer.options)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        answer = self._read()
        self.about: str = answer["about"]
        self.plan_hash: str | None = answer.get("plan_hash")

    def generate(self, asked: Asked) -> list[list[float]]:
        times: list[list[float]] = self._ask(
            {"prompts": asked.prompts, "new_tokens": asked.new_tokens, "share": len(asked.prompts) > 1}
        )["times"]
        return times

    def rss(self) -> int:
        found: int = self._ask({})["rss"]
        return found

    def _ask(self, document: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(document) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(self.LIMIT, self.stop)
        late.daemon = True
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            words = [text.strip() for text in self._log.read().splitlines() if text.strip()]
            raise RuntimeError(f"{self._peer.name} ended with code {code}: {words[-1][:200] if words else 'no word'}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, what: signal.Signals) -> None:
        """To the process and those that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, what)

    def stop(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()


@dataclass
class Measured:
    """What was found of an engine."""

    about: str = ""
    values: dict[str, list[float]] = field(default_factory=dict)
    """Of each column, a value a run."""

    def add(self, column: str, value: float) -> None:
        self.values.setdefault(column, []).append(value)

    def median(self, column: str) -> float | None:
        return median(self.values[column]) if column in self.values else None


def start_seconds(peer: Peer, source: Source, *, cold: bool = False) -> float:
    """From nothing running to a first token; what the engine keeps on disk is there from earlier starts.

    `cold`: the system holds none of its files, packages and model, in memory.
    """
    if cold:
        forget(Path(peer.python).parents[1], Path(peer.options["model"]), cache_folder())
    asked = source.w1(0)
    begin = time.perf_counter()
    worker = Worker(peer)
    worker.generate(Asked(asked.prompts, 1))
    seconds = time.perf_counter() - begin
    worker.stop()
    return seconds


def forget(*places: Path) -> None:
    """Ask the system to drop what it holds in memory of all files below these."""
    for place in places:
        for path in [place, *place.rglob("*")]:
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(peers: list[Peer], source: Source, repeat: int, starts: int) -> dict[str, Measured]:
    """Every engine's figures; one that fails is told of and left out."""
    found: dict[str, Measured] = {}
    workers: dict[str, Worker] = {}

    def attempt(peer: Peer, what: Any) -> None:
        try:
            what()
        except (RuntimeError, ValueError) as e:
            print(f"{peer.name}: {e}", file=sys.stderr)
            if peer.name in workers:
                workers.pop(peer.name).stop()

    def begin(peer: Peer) -> None:
        workers[peer.name] = Worker(peer)
        found[peer.name] = Measured(workers[peer.name].about)

    def measure(peer: Peer, workload: str, number: int) -> None:
        asked: Asked = getattr(source, workload)(number * len(WORKLOADS) + WORKLOADS.index(workload))
        own = figures(workload, asked, workers[peer.name].generate(asked))
        for name, figure, title, _ in FIGURES:
            if name == workload and number:  # the first run warms up
                found[peer.name].add(title, own[figure])

    for peer in peers:
        attempt(peer, lambda peer=peer: begin(peer))
    for number in range(repeat + 1):
        for workload in WORKLOADS:
            for peer in peers:
                if peer.name in workers:
                    attempt(peer, lambda peer=peer, w=workload, n=number: measure(peer, w, n))
        print(f"run {number} of {repeat} done", file=sys.stderr)
    for peer in peers:
        if peer.name in workers:
            found[peer.name].add("RSS GB", workers[peer.name].rss() / 1e9)
            workers.pop(peer.name).stop()
    for title, cold in STARTS:
        for _ in range(starts):
            for peer in peers:
                if peer.name in found:
                    attempt(peer, lambda peer=peer, title=title, cold=cold: found[peer.name].add(
                        title, start_seconds(peer, source, cold=cold)))  # fmt: skip
    return found


def table(peers: list[Peer], found: dict[str, Measured]) -> str:
    """Markdown: a row an engine, then the best of the peers and the best of ours over it."""
    better = {title: choose for _, _, title, choose in FIGURES} | dict.fromkeys(COLUMNS[-3:], min)

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    def best(column: str, ours: bool) -> float | None:
        values = [m for p in peers if p.ours is ours and p.name in found
                  if (m := found[p.name].median(column)) is not None]  # fmt: skip
        chosen: float | None = better[column](values) if values else None
        return chosen

    def ratio(column: str) -> str:
        own, other = best(column, True), best(column, False)
        if own is None or other is None:
            return "-"
        return f"{other / own if better[column] is min else own / other:.2f}x"

    rows = [["engine", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    rows += [[p.name, *(text(found[p.name].median(c)) for c in COLUMNS)] for p in peers if p.name in found]
    rows.append(["best peer", *(text(best(c, False)) for c in COLUMNS)])
    rows.append(["hotplug / best peer", *map(ratio, COLUMNS)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="those whose names begin so; default: all here")
    parser.add_argument("--repeat", type=int, default=5, help="measured runs, after one that warms up")
    parser.add_argument("--starts", type=int, default=3, help="starts from nothing")
    parser.add_argument("--isa", choices=["avx2"], help="hold every engine to this instruction set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value here")
    options = parser.parse_args()

    folder = prepare()
    cores = len(os.sched_getaffinity(0))
    wanted = tuple(options.engines) or ("",)
    peers = [held(p, options.isa) for p in engines(folder, cores) if p.name.startswith(wanted)]
    for peer in peers:
        if not peer.python.exists():
            print(f"{peer.name}: not here, `make bench-peers` makes its environment", file=sys.stderr)
    peers = [p for p in peers if p.python.exists()]
    if not peers:
        parser.error("none of these engines is here")
    source = Source(load_tokenizer(folder / "Q4_1" / "model.gguf").encode)
    found = run(peers, source, options.repeat, options.starts)
    print(table(peers, found))
    for peer in peers:
        if peer.name in found:
            print(f"\n{peer.name}: {found[peer.name].about}", end="")
    held_to = f", held to {options.isa}" if options.isa else ""
    print(
        f"\n{cores} cores{held_to}, medians of {options.repeat}; start: the best cache that the engine keeps is "
        "there; cold: and nothing of its files is in memory"
    )
    if options.json is not None:
        document = {name: {"about": m.about, **m.values} for name, m in found.items()}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
