"""SwiGLU's product of many rows in one kernel beside cuBLAS and a gating kernel: checked, then timed under load.

    python ci/gpu/bench_gated.py [--rows 256,512,2048,16384] [--width 14336] [--inputs 4096] [--seconds 0.3]

Candidates take turns, each long enough for the clock to settle at what the power limit allows: in a burst, before the
limit bites, kernels are faster than in a step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from hotplug.platforms.cuda.kernels.dense import silu_mul
from hotplug.platforms.cuda.kernels.gated_hopper import gated

ROUNDS = 3


def error(m: int, n: int, k: int, bias: bool, **options: Any) -> float:
    """Root mean square of the error over that of the result, of three calls that must be equal."""
    torch.manual_seed(m)
    x = torch.randn((m, k), device="cuda").bfloat16()
    w = torch.randn((2 * n, k), device="cuda").bfloat16() / k**0.5
    b = torch.randn(2 * n, device="cuda").bfloat16() if bias else None
    both = F.linear(x.float(), w.float(), None if b is None else b.float())
    want = F.silu(both[:, :n]) * both[:, n:]
    got = [gated(x, w, b, **options) for _ in range(3)]
    assert all(torch.equal(got[0], other) for other in got), "three calls differ"
    return float((got[0].float() - want).square().mean().sqrt() / want.square().mean().sqrt())


def under_load(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Microseconds a call of each, the median of rounds in which each runs for so long."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            stop = time.perf_counter() + seconds
            runs: list[float] = []
            while time.perf_counter() < stop:
                begin.record()
                for _ in range(20):
                    call()
                end.record()
                end.synchronize()
                runs.append(begin.elapsed_time(end) * 50)
            times[name].append(median(runs[len(runs) // 2 :]))
    return {name: median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="256,512,2048,16384")
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=0.3)
    args = parser.parse_args()
    for m, n, k, bias, options in (
        (1, 256, 1024, False, {}), (300, 1024, 1032, True, {}), (256, 14336, 4096, False, {}),
        (130, 512, 4096, True, {}), (2000, 3072, 2048, False, {"group": 4}),
    ):  # fmt: skip
        found = error(m, n, k, bias, **options)
        print(f"check m={m} n={n} k={k} bias={bias} {options}: {found:.2e}", flush=True)
        assert found < 8e-3, "not the product"
    n, k = args.width, args.inputs
    w = torch.randn((2 * n, k), device="cuda").bfloat16() / k**0.5
    for m in map(int, args.rows.split(",")):
        x = torch.randn((m, k), device="cuda").bfloat16()
        calls: dict[str, Callable[[], Any]] = {
            "cublas": lambda x=x: F.linear(x, w),
            "cublas, then silu_mul": lambda x=x: silu_mul(F.linear(x, w)),
        }
        for group in (8, 12, 16, 20, 24) if m > 2048 else (16,):
            calls[f"gated group={group}"] = partial(gated, x, w, None, group=group)
        for name, us in under_load(calls, args.seconds).items():
            print(f"{m:6} rows {name:32} {us:9.1f} us {4 * m * n * k / us / 1e6:7.1f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
