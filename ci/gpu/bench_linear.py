"""Linear layers of few rows: every candidate configuration against cuBLAS, on the shapes of the benchmark models.

    python ci/gpu/bench_linear.py [--rows 1,16,64] [--out FILE.json]

Prints for each shape and number of rows the best candidates with microseconds and TB/s of weight read.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import compile_ahead, copies_past_l2, graph_time

from hotplug.platforms.cuda.kernels.dense import silu_mul
from hotplug.platforms.cuda.kernels.linear import gemv, skinny

SHAPES = [  # name, outputs, inputs, gated
    ("8b.qkv", 6144, 4096, False), ("8b.out", 4096, 4096, False), ("8b.gate_up", 14336, 4096, True),
    ("8b.down", 4096, 14336, False), ("8b.head", 128256, 4096, False),
    ("1b.qkv", 3072, 2048, False), ("1b.out", 2048, 2048, False), ("1b.gate_up", 8192, 2048, True),
    ("1b.down", 2048, 8192, False), ("1b.head", 128256, 2048, False),
    ("moe.qkv", 5120, 2048, False), ("moe.out", 2048, 4096, False),
]  # fmt: skip
FP32 = "head"


def candidates(op: str, n: int, k: int, m: int) -> list[dict[str, Any]]:
    """What `hotplug tune` would try too."""
    key = Key.of(op, "bfloat16", {"n": n, "k": k, "tokens": m})
    return [dict(config) for config in linear.candidates(key)]


def run(kind: str, options: dict[str, int], x: Any, w: Any, gated: bool, dtype: torch.dtype) -> Any:
    if kind == "cublas":
        out = F.linear(x, w)
        return silu_mul(out) if gated else out.to(dtype)
    return (gemv if kind == "gemv" else skinny)(x, w, None, gated=gated, dtype=dtype, **options)


def compile_one(item: Any) -> None:
    kind, options, k, gated, m, dtype = item
    x, w = (torch.zeros((r, k), dtype=torch.bfloat16, device="cuda") for r in (m, 256 if gated else 128))
    run(kind, options, x, w, gated, dtype)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cells = [(s, m) for s in SHAPES if args.only in s[0] for m in map(int, args.rows.split(","))]
    work = {}
    for (name, n, k, gated), m in cells:
        dtype = torch.float32 if FP32 in name else torch.bfloat16
        for kind, options in candidates(n, k, gated, m):
            work[json.dumps([kind, options, k, gated, max(16, m) if kind == "skinny" else 1, str(dtype)])] = (
                kind, options, k, gated, m, dtype)  # fmt: skip
    print(f"{len(work)} kernels to compile", flush=True)
    compile_ahead(compile_one, list(work.values()))
    results = []
    for (name, n, k, gated), m in cells:
        dtype = torch.float32 if FP32 in name else torch.bfloat16
        size = n * k * (4 if gated else 2)
        weights = [torch.randn((2 * n if gated else n, k), dtype=torch.bfloat16, device="cuda") * 0.02
                   for _ in range(copies_past_l2(size))]  # fmt: skip
        x = torch.randn((m, k), dtype=torch.bfloat16, device="cuda")
        wide = F.linear(x.double(), weights[0].double()) if size < 1 << 29 else F.linear(x, weights[0]).double()
        want = F.silu(wide[:, :n]) * wide[:, n:] if gated else wide
        timed = []
        for kind, options in [("cublas", {}), *candidates(n, k, gated, m)]:
            try:
                calls = [partial(run, kind, options, x, w, gated, dtype) for w in weights]
                error = float((calls[0]().double() - want).norm() / want.norm())
                us = graph_time(calls)
            except Exception as e:
                print(f"{name} {kind} {options}: {type(e).__name__} {str(e)[:100]}")
                continue
            if error > 2e-2:
                print(f"{name} m={m} {kind} {options}: WRONG, relative error {error:.3g}")
                continue
            timed.append((us, kind, options))
        base = next((us for us, kind, _ in timed if kind == "cublas"), float("nan"))
        best = sorted(timed, key=lambda t: t[0])[:4]
        for us, kind, options in best:
            results.append({"shape": name, "n": n, "k": k, "gated": gated, "m": m, "us": us, "cublas_us": base,
                            "kind": kind, **options})  # fmt: skip
        shown = "; ".join(f"{size / us / 1e6:.2f} {kind} {','.join(map(str, o.values()))}" for us, kind, o in best)
        print(f"{name:10} m={m:<3} cublas {base:7.1f} us {size / base / 1e6:.2f} TB/s | "
              f"best {best[0][0]:7.1f} us: {shown}", flush=True)  # fmt: skip
        del weights
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
