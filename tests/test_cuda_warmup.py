"""Warm-up of the CUDA platform: all that an engine's start launches is compiled before, side by side, and only once.

Kernels are compiled here for a GPU that is not there, and "launched" by a driver that does nothing; in processes of
their own, since Triton's interpreter, which other tests use, is chosen when the kernels are imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
DRIVER = """
import json, sys, threading
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Utils:
    def load_binary(self, *args): return 1, 2, 0, 0, 1024
    def get_device_properties(self, device): return {"max_shared_mem": 227 << 10}

class Driver:
    utils = Utils()
    def launcher_cls(self, src, metadata):
        return lambda *args: launched.append(src.name)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

launched, compiled = [], []
driver.set_active(Driver())
def count(**facts):
    compiled.append((threading.current_thread().name, facts["fn"].name))
knobs.runtime.jit_cache_hook = count
"""
PROGRAM = (
    DRIVER
    + """
from dataclasses import dataclass, replace
from typing import Any
from cuda_target import Interpreted, facts
from fake_platforms import candidates
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.platform.base import ExecMode
from hotplug.core.request import Request, SamplingParams
from hotplug.platforms.cuda.warmup import compile_launches

@dataclass
class Warm(Interpreted):
    total: int = 64 << 20
    facts: Any = replace(facts("float32"), exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER), max_graph_shapes=2)

    def capture(self, step, device):
        step()
        return step

    def warm_up(self, steps, device):
        compile_launches(steps, torch.device("cpu"), enter=lambda gpu: None)
        self.launched_by_warm_up = list(launched)

def start(platform):
    config = EngineConfig(model=sys.argv[1], load_format="dummy", max_num_seqs=17, max_num_batched_tokens=32,
                          max_model_len=256, swap_space="4MiB")
    return EngineCore(config, candidates=candidates(platform))

platform = Warm()
core = start(platform)
core.add(Request(id="first", prompt_token_ids=list(range(9)), sampling=SamplingParams(max_tokens=3, ignore_eos=True)))
while core.has_work:
    core.step()
swap = core._executor.worker.runner._swap
swap.swap_out([(2, 1), (1, 3)])
swap.swap_in([(3, 1)])
first = len(compiled)
second = start(Warm())
print(json.dumps({
    "outcome": core.report()["startup"]["warm_up"],
    "before": platform.launched_by_warm_up,
    "compiled": compiled[:first],
    "again": compiled[first:],
    "launched": len(launched),
}))
"""
)
GLUON = (
    DRIVER
    + """
from hotplug.platforms.cuda.kernels.gated_hopper import gated
from hotplug.platforms.cuda.kernels.linear_hopper import stream
from hotplug.platforms.cuda.warmup import compile_launches

def steps():
    for rows in (1, 33, 64):
        x, weight = torch.empty((rows, 1024), dtype=torch.bfloat16), torch.empty((512, 1024), dtype=torch.bfloat16)
        stream(x, weight, None, gated=False, dtype=torch.bfloat16, rows=64, cols=128, stages=4, programs=8, warps=4)
        gated(x, weight, None)

with torch.device("meta"):
    compile_launches(steps, torch.device("cpu"), enter=lambda gpu: None)
    first = len(compiled)
    compile_launches(steps, torch.device("cpu"), enter=lambda gpu: None)
print(json.dumps({"compiled": compiled[:first], "again": compiled[first:], "launched": len(launched)}))
"""
)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_moe_model"])
def test_everything_that_a_start_launches_is_compiled_before_and_nothing_is_launched_meanwhile(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    found = run(PROGRAM, tmp_path, str(request.getfixturevalue(model)))
    assert found["outcome"] == "done"
    assert found["before"] == []
    assert found["launched"] > 100
    assert {thread for thread, _ in found["compiled"]} == {"hotplug-warm-up"}, found["compiled"]
    assert len(found["compiled"]) >= 12
    assert any(name.endswith("_block_copy") for _, name in found["compiled"])
    assert found["again"] == []


def test_kernels_in_gluon_are_compiled_before_too(tmp_path: Path) -> None:
    found = run(GLUON, tmp_path)
    assert found["launched"] == 0
    assert {name.rpartition(".")[2] for _, name in found["compiled"]} == {"_gated", "_stream"}
    assert found["again"] == []


def run(program: str, cache: Path, *arguments: str) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
