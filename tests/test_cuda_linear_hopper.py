"""The few-row linear kernel for Hopper, compiled without a GPU: what its machine code must look like to be worth it.

Its results are checked on a GPU, in `tests/gpu/test_device_linear.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton's compiler")

SHARED = 227 << 10
"""Bytes of shared memory that a program may have."""
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Hopper())
from hotplug.platforms.cuda.kernels import linear_hopper, pdl
pdl.options = lambda device: {"PDL": True, "launch_pdl": True}
case = json.loads(sys.argv[1])
m, n, k, gated = case.pop("m"), case.pop("n"), case.pop("k"), case["gated"]
case["dtype"] = getattr(torch, case["dtype"])
x, weight = (torch.empty((rows, k), dtype=torch.bfloat16) for rows in (m, 2 * n if gated else n))
kernel = linear_hopper.compile_for(x, weight, None, **case)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(kernel.asm["cubin"])
    file.flush()
    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
early, late = kernel.asm["ptx"].split("griddepcontrol.wait", 1)
copy = "cp.async.bulk.tensor.2d.shared"
print(json.dumps({"stack": int(re.search(r"STACK:(\\d+)", usage)[1]), "shared": kernel.metadata.shared,
                  "early": early.count(copy), "late": late.count(copy), "wgmma": late.count("wgmma.mma_async"),
                  "other reads before": len(re.findall(r"ld\\.global", early))}))
"""


@cache
def compiled(case: str) -> dict[str, Any]:
    """Figures of the kernel, compiled in a process without the interpreter that this one's tests set."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, case], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def kernel(stages: int, *, gated: bool, rows: int = 64, warps: int = 4) -> dict[str, Any]:
    return compiled(json.dumps({
        "m": 64, "n": 512, "k": 4096, "gated": gated, "dtype": "bfloat16", "rows": rows, "cols": 64, "stages": stages,
        "programs": 132, "warps": warps,
    }))  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
def test_the_whole_ring_of_weights_is_requested_before_the_kernel_before_is_waited_for(gated: bool) -> None:
    found = kernel(5, gated=gated)
    assert found["early"] == 5 * (2 if gated else 1)
    assert found["other reads before"] == 0


@pytest.mark.parametrize("gated", [False, True])
def test_x_is_requested_after_the_wait_only(gated: bool) -> None:
    refill = 3 if gated else 2  # weights and x in the loop
    assert kernel(5, gated=gated)["late"] == 5 + refill


@pytest.mark.parametrize(("gated", "rows", "warps"), [(False, 128, 4), (True, 128, 8), (False, 256, 8)])
def test_sums_stay_in_registers_and_the_ring_fits(gated: bool, rows: int, warps: int) -> None:
    found = kernel(5, gated=gated, rows=rows, warps=warps)
    assert found["stack"] == 0
    assert found["wgmma"] > 0
    assert found["shared"] <= SHARED


@pytest.mark.parametrize(
    ("change", "error"),
    [({"m": 65}, ValueError), ({"k": 1028}, ValueError), ({"stages": 1}, ValueError), ({"rows": 32}, ValueError),
     ({"dtype": torch.float32}, TypeError)],
)  # fmt: skip
def test_calls_that_it_cannot_serve_are_refused(change: dict[str, Any], error: type[Exception]) -> None:
    from hotplug.platforms.cuda.kernels.linear_hopper import stream

    case: dict[str, Any] = {"m": 16, "k": 1024, "rows": 64, "stages": 4, "dtype": torch.bfloat16, **change}
    x, weight = (torch.zeros((rows, case["k"]), dtype=case["dtype"]) for rows in (case["m"], 64))
    with pytest.raises(error):
        stream(x, weight, None, gated=False, dtype=torch.bfloat16, rows=case["rows"], cols=64, stages=case["stages"],
               programs=132, warps=4)  # fmt: skip
