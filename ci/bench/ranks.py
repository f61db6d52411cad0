"""What several ranks cost beside the model: a plan as bytes, its way to another process, and a step of two ranks.

    python ci/bench/ranks.py [--repeats 5] [--no-steps]

Ways are one way, from before `send` to after `receive` in a process on another core. Steps are decodes of a model of
SmolLM2's size with 8 heads, random weights, on the CPU platform; two ranks share the cores that one has alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hotplug.core.parallel.encoding import decode_plan, encode_plan
from hotplug.core.parallel.ring import RingReader, RingWriter
from hotplug.core.parallel.zmq_transport import ZmqReader, ZmqWriter
from hotplug.core.scheduler.plan import StepPlan

MESSAGES = 300
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def decodes(count: int) -> StepPlan:
    """A steady step."""
    none, rows = np.empty(0, np.int32), np.arange(count, dtype=np.int32)
    ones = np.ones(count, np.int32)
    return StepPlan(rows, rows * 7, ones, ones > 0, count, none, [], none, none, none)


def microseconds(call: Callable[[], object], times: int = 2000) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times * 1e6


def receive(kind: str, address: str, bell: Any, found: Any) -> None:
    """A reader's process: microseconds that each message was under way."""
    reader = RingReader(address, 0, bell.fileno()) if kind == "ring" else ZmqReader(address)
    found.put([])
    delays = []
    for _ in range(MESSAGES):
        sent = int.from_bytes(reader.receive()[:8], "little")
        delays.append((time.monotonic_ns() - sent) / 1e3)
    found.put(delays)
    reader.close()


def way(kind: str, pause: float, size: int) -> float:
    """Median microseconds of a message of `size` bytes, `pause` seconds after the one before."""
    spawn = multiprocessing.get_context("spawn")
    (ours, bell), found = spawn.Pipe(duplex=False), spawn.SimpleQueue()
    os.set_blocking(bell.fileno(), False)
    writer: Any = RingWriter(1, doorbells=[bell.fileno()]) if kind == "ring" else ZmqWriter(1)
    address = writer.name if kind == "ring" else writer.addresses[0]
    reader = spawn.Process(target=receive, args=(kind, address, ours, found), daemon=True)
    reader.start()
    found.get()
    rest = bytes(size - 8)
    for _ in range(MESSAGES):
        time.sleep(pause)
        writer.send(time.monotonic_ns().to_bytes(8, "little") + rest)
    delays: list[float] = found.get()
    reader.join()
    writer.close()
    return median(delays)


def step_milliseconds(folder: Path, ranks: int, rows: int) -> float:
    """Median milliseconds of a decode step of `rows` requests."""
    from hotplug.core.config import EngineConfig
    from hotplug.core.engine.core import EngineCore
    from hotplug.core.request import Request, SamplingParams

    core = EngineCore(EngineConfig(model=str(folder), load_format="dummy", device="cpu", tensor_parallel_size=ranks,
                                   dtype="float32", max_model_len=512, kv_cache_memory="256MiB"))  # fmt: skip
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=60)
    for i in range(rows):
        core.add(Request(id=str(i), prompt_token_ids=[5 + i, 6, 7], sampling=params))
    times = []
    while core.has_work:
        begin = time.perf_counter()
        core.step()
        times.append((time.perf_counter() - begin) * 1e3)
    core.close()
    return median(times[10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-steps", action="store_true", help="leave the model out")
    options = parser.parse_args()

    def show(what: str, unit: str, measure: Callable[[], float]) -> None:
        runs = sorted(measure() for _ in range(options.repeats))
        print(f"{what:<52} {median(runs):8.1f} {unit}  ({runs[0]:.1f} to {runs[-1]:.1f})", flush=True)

    for rows in (1, 256):
        plan = decodes(rows)
        data = encode_plan(plan)
        show(
            f"encode a step of {rows} decodes ({len(data):,} bytes)",
            "us",
            lambda p=plan: microseconds(lambda: encode_plan(p)),
        )
        show(f"decode a step of {rows} decodes", "us", lambda d=data: microseconds(lambda: decode_plan(d)))
    size = len(encode_plan(decodes(256)))
    for kind in ("ring", "zmq"):
        show(f"{kind}: a way of {size:,} bytes, 1 ms apart", "us", lambda k=kind: way(k, 0.001, size))
        show(f"{kind}: a way of {size:,} bytes, 10 ms apart", "us", lambda k=kind: way(k, 0.01, size))
    if options.no_steps:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for rows in (1, 16):
            for ranks in (1, 2):
                show(f"a step of {rows} decodes, {ranks} ranks", "ms",
                     lambda n=ranks, r=rows: step_milliseconds(folder, n, r))  # fmt: skip


if __name__ == "__main__":
    main()
