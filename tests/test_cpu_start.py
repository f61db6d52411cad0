"""What a start and a load of the CPU platform take: modules and memory of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotplug.platforms.cpu.native.library import refusal

ROOT = Path(__file__).parent.parent
PEAK = 0.9e9
"""Bytes: the bar of the CPU benchmark, at whose settings this runs."""

RUN = """
import json, sys
from pathlib import Path
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import Request, SamplingParams

core = EngineCore(EngineConfig(model=sys.argv[1], max_num_seqs=16, max_model_len=2048, max_num_batched_tokens=2048,
                               kv_cache_memory="256MiB"))
sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

def run(name, prompts):
    for i, prompt in enumerate(prompts):
        core.add(Request(id=f"{name}-{i}", prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        core.step()

for turn in range(3):  # fills the KV cache
    run(f"many-{turn}", [[(turn * 5003 + i * 127 + t) % 49000 for t in range(128)] for i in range(16)])
run("long", [[(7 * t) % 49000 for t in range(1024)]])
status = Path("/proc/self/status").read_text()
print(json.dumps({
    "format": core.report()["quantization"],
    "modules": [name for name in ("transformers", "torch._dynamo", "sympy", "triton") if name in sys.modules],
    "peak": int(status.split("VmHWM:")[1].split()[0]) * 1024,
}))
"""


@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
def test_a_load_takes_no_more_memory_than_the_bar_and_no_module_that_it_has_no_use_for(smollm2_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RUN, str(smollm2_path)], env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["format"], found["modules"]) == ("packed", [])
    assert found["peak"] < PEAK
