"""The linear kernels for Hopper, compiled without a GPU: what their machine code must look like to be worth it.

Their results are checked on a GPU, in `tests/gpu/test_device_linear.py`.
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

from hotplug.vendor import Bucket, SiteSpec

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
from hotplug.platforms.cuda.kernels import gated_hopper, linear_hopper, pdl
pdl.options = lambda device: {"PDL": True, "launch_pdl": True}
case = json.loads(sys.argv[1])
m, n, k, gated = case.pop("m"), case.pop("n"), case.pop("k"), case.get("gated", True)
x, weight = (torch.empty((rows, k), dtype=torch.bfloat16) for rows in (m, 2 * n if gated else n))
if "dtype" in case:
    case["dtype"] = getattr(torch, case["dtype"])
    kernel = linear_hopper.compile_for(x, weight, None, **case)
else:
    kernel = gated_hopper.compile_for(x, weight, None, **case)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(kernel.asm["cubin"])
    file.flush()
    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
early, late = kernel.asm["ptx"].split("griddepcontrol.wait", 1)
copy = "cp.async.bulk.tensor.2d.shared"
print(json.dumps({"stack": int(re.search(r"STACK:(\\d+)", usage)[1]), "shared": kernel.metadata.shared,
                  "early": early.count(copy), "late": late.count(copy), "wgmma": late.count("wgmma.mma_async"),
                  "stores": late.count("cp.async.bulk.tensor.2d.global"),
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


def test_the_gated_product_keeps_its_sums_in_registers_and_asks_for_weights_before_it_waits() -> None:
    found = compiled(json.dumps({"m": 2000, "n": 1024, "k": 4096}))
    assert found["stack"] == 0
    assert found["shared"] <= SHARED
    assert (found["early"], found["other reads before"]) == (2 * 4, 0)  # gate's and up's, for four steps
    assert found["late"] == 4 + 3  # x for those steps; all three in the loop
    assert (found["wgmma"], found["stores"]) == (4, 1)  # a step is four products of 256 columns at once


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "error"),
    [(0, 128, 256, torch.bfloat16, ValueError), (8, 130, 256, torch.bfloat16, ValueError),
     (8, 128, 260, torch.bfloat16, ValueError), (8, 128, 128, torch.bfloat16, ValueError),
     (8, 128, 256, torch.float16, TypeError)],
)  # fmt: skip
def test_gated_products_that_it_cannot_make_are_refused(
    m: int, n: int, k: int, dtype: torch.dtype, error: type[Exception]
) -> None:
    from hotplug.platforms.cuda.kernels.gated_hopper import gated

    with pytest.raises(error):
        gated(torch.zeros((m, k), dtype=dtype), torch.zeros((2 * n, k), dtype=dtype), None)


@pytest.mark.parametrize(
    ("arch", "dtype", "width", "inputs", "reason"),
    [("sm_90", "bfloat16", 14336, 4096, ""), ("sm_100", "bfloat16", 14336, 4096, "is for sm_90"),
     ("sm_90", "float16", 14336, 4096, "in bfloat16"), ("sm_90", "bfloat16", 1000, 4096, "whole 128s"),
     ("sm_90", "bfloat16", 256, 128, "from 256 on")],
)  # fmt: skip
def test_the_gated_product_claims_what_it_can_make(arch: str, dtype: str, width: int, inputs: int, reason: str) -> None:
    from hotplug.platforms.cuda.kernels import KERNELS

    (kernel,) = (k for k in KERNELS if k.op == "linear_silu_mul" and k.provider == "cuda.hopper")
    facts = {"in_features": inputs, "width": width, "bias": False, "scheme": "none"}
    verdict = kernel.check(SiteSpec("linear_silu_mul", "layers.0.mlp.gate_up", dtype, arch, facts))
    assert (verdict.ok, reason in verdict.reason) == (not reason, True)
    assert kernel.accepts is not None
    assert [kernel.accepts(Bucket(tokens, 1)) for tokens in (64, 1023, 1024, 16384)] == [False, False, True, True]


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
