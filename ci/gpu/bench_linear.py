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


def candidates(n: int, k: int, gated: bool, m: int) -> list[tuple[str, dict[str, int]]]:
    found: list[tuple[str, dict[str, int]]] = []
    if m == 1:
        for rows, cols, warps in ((1, 2048, 4), (2, 1024, 4), (2, 2048, 4), (4, 512, 4), (4, 1024, 4), (4, 1024, 8),
                                  (4, 2048, 8), (8, 512, 4), (8, 1024, 8), (16, 512, 8)):  # fmt: skip
            found.append(("gemv", {"rows": rows // 2 if gated and rows > 1 else rows, "cols": cols, "warps": warps}))
    tokens = max(16, 1 << (m - 1).bit_length())
    shapes = [(64, 128, 5, 4), (64, 256, 4, 4), (128, 64, 6, 4), (128, 128, 4, 8)] if tokens <= 32 else [
        (64, 64, 4, 4), (64, 64, 6, 4), (64, 128, 3, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 4, 8),
        (128, 128, 4, 8)]  # fmt: skip
    for rows, cols, stages, warps in shapes:
        smem = stages * cols * 2 * (rows * (2 if gated else 1) + tokens) + 2048
        tiles = -(-n // rows)
        if smem > 227_000 or (gated and rows * tokens > 128 * 64):
            continue
        for programs in {132, 264, tiles, 2 * tiles, 4 * tiles}:
            if programs > 132 * max(4, tiles // 100) or programs < 100 or (programs == 264 and smem > 113_000):
                continue
            found.append(("skinny", {"rows": rows, "cols": cols, "programs": programs, "stages": stages,
                                     "warps": warps}))  # fmt: skip
    return list({json.dumps(c): c for c in found}.values())


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
