"""The mixture-of-experts kernels on a GPU, in the shapes of Qwen3-30B-A3B: each variant checked, then timed.

    python ci/gpu/bench_moe.py [--tokens 1,64] [--tune]

Prints microseconds, TB/s of the distinct experts' weights, TFLOP/s, and the error's share of a float32 reference's
norm. `--tune` tries the tiles of `CANDIDATES`, first one product, then the other, with what was best for the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timing import compile_ahead, graph_time
from torch import Tensor

from hotplug.core.ops import moe as reference
from hotplug.platforms.cuda.kernels.moe import (
    FEW,
    GROUP,
    Tiles,
    down_tiles,
    few,
    gate_up_tiles,
    grouped,
    grouped_mm,
)
from hotplug.platforms.cuda.kernels.moe_route import moe_route

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 768, 128, 8
DTYPE = torch.bfloat16
TOKENS = "1,2,4,8,16,64,256,16384"
MOST_ERROR = 1e-2
SHAPES: dict[bool, tuple[Any, Any]] = {  # swapped or not: columns, depth, warps and stages of both products
    True: (((64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (128, 64, 8, 4), (128, 64, 4, 4)),
           ((64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 5), (128, 64, 4, 5), (64, 256, 4, 3))),
    False: (((128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 8, 5)),
            ((256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 4), (128, 64, 4, 3), (128, 128, 8, 3))),
}  # fmt: skip
CANDIDATES = {
    rows: tuple([Tiles(rows, *shape, swap=rows < 128, tma=tma) for shape in shapes for tma in (False, True)]
                for shapes in SHAPES[rows < 128])
    for rows in (16, 32, 64, 128)
}  # fmt: skip
Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(tokens: int, gate_up: Tensor, down: Tensor, seed: int) -> Call:
    torch.manual_seed(seed)
    x = torch.randn((tokens, HIDDEN), device="cuda", dtype=DTYPE)
    weights, experts = torch.randn((tokens, len(down)), device="cuda").softmax(-1).topk(TOP_K)
    return x, weights, experts.to(torch.int32), gate_up, down


def matrices(experts: int) -> tuple[Tensor, Tensor]:
    shapes = (experts, 2 * WIDTH, HIDDEN), (experts, HIDDEN, WIDTH)
    gate_up, down = (torch.randn(shape, device="cuda", dtype=DTYPE).mul_(shape[2] ** -0.5) for shape in shapes)
    return gate_up, down


def variants(tokens: int) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    assignments = tokens * TOP_K
    if assignments <= 4 * FEW:
        for rows in (2, 4, 8):
            yield f"few {rows} rows", partial(few, rows=rows)
    first, second = gate_up_tiles(assignments, EXPERTS, 2), down_tiles(assignments, EXPERTS, 2)
    for tma in (False, True):
        tiles = {"first": replace(first, tma=tma), "second": replace(second, tma=tma)}
        yield f"grouped{' by TMA' if tma else ''}", partial(grouped, **tiles)
    if tokens >= 256:
        yield "grouped_mm", grouped_mm


def error(call: Call, result: Tensor, expected: Tensor) -> float:
    return float((result.float() - expected).norm() / expected.norm())


def expected_of(call: Call) -> Tensor:
    x, weights, experts, gate_up, down = call
    total = torch.zeros(x.shape, device=x.device)
    for expert in range(0, EXPERTS, 16):  # a part of the experts in float32 at a time
        part = slice(expert, expert + 16)
        total += reference.moe_experts(x.float(), weights, experts - expert, gate_up[part].float(), down[part].float())
    return total


def measured(name: str, run: Callable[..., Tensor], calls: list[Call], expected: Tensor) -> float:
    """Microseconds; prints a line of the table."""
    try:
        wrong = error(calls[0], run(*calls[0]), expected)
        us = graph_time([partial(run, *call) for call in calls])
    except Exception as e:
        print(f"  {name:52s} {type(e).__name__}: {str(e).splitlines()[0][:90]}")
        return float("inf")
    distinct = sum(len(torch.unique(call[2])) for call in calls) / len(calls)
    rate = distinct * 3 * WIDTH * HIDDEN * 2 / us / 1e6
    flops = calls[0][2].numel() * 6 * WIDTH * HIDDEN / us / 1e6
    mark = "" if wrong < MOST_ERROR else "  WRONG"
    print(f"  {name:52s} {us:9.1f} us {rate:6.2f} TB/s {flops:7.1f} TFLOP/s  error {wrong:.1e}{mark}", flush=True)
    return us if wrong < MOST_ERROR else float("inf")


def tune(tokens: int, calls: list[Call], expected: Tensor) -> None:
    for rows in rows_to_try(tokens):
        firsts, seconds = CANDIDATES[rows]
        base = seconds[0]
        times = {tiles: measured(f"first {words(tiles)}", partial(grouped, first=tiles, second=base), calls, expected)
                 for tiles in firsts}  # fmt: skip
        best = min(times, key=lambda tiles: times[tiles])
        for tiles in seconds:
            measured(f"second {words(tiles)}", partial(grouped, first=best, second=tiles), calls, expected)


def rows_to_try(tokens: int) -> list[int]:
    """Rows of a block as they are chosen, and the nearest other."""
    rows = gate_up_tiles(tokens * TOP_K, EXPERTS, 2).rows
    return {16: [16, 32], 32: [16, 32], 64: [32, 64], 128: [128]}[rows]


def words(t: Tiles) -> str:
    marks = f"{', swap' if t.swap else ''}{', TMA' if t.tma else ''}"
    return f"{t.rows} x {t.cols} x {t.depth}, {t.warps} warps, {t.stages} stages{marks}"


def compile_one(item: Any) -> None:
    """Fill Triton's cache with one variant, on a few experts: their number is no part of what is compiled."""
    kind, options = item
    call = inputs(16, *matrices(8), seed=0)
    (few if kind == "few" else grouped)(*call, **options)


def to_compile(tokens: list[int], *, tuned: bool) -> list[Any]:
    items: list[Any] = []
    for n in tokens:
        for _, run in variants(n):
            if isinstance(run, partial):
                items.append(("few" if run.func is few else "grouped", run.keywords))
        if tuned:
            for r in rows_to_try(n):
                firsts, seconds = CANDIDATES[r]
                items += [("grouped", {"first": firsts[0], "second": tiles}) for tiles in seconds]
                items += [("grouped", {"first": tiles, "second": seconds[0]}) for tiles in firsts]
    return list({str(item): item for item in items}.values())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    tokens = [int(n) for n in options.tokens.split(",")]
    compile_ahead(compile_one, to_compile(tokens, tuned=options.tune))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; blocks in groups of {GROUP}")
    router = torch.randn((EXPERTS, HIDDEN), device="cuda", dtype=DTYPE) * HIDDEN**-0.5
    gate_up, down = matrices(EXPERTS)
    for n in tokens:
        # Enough calls of other experts that none of their weights is still in the cache.
        calls = [inputs(n, gate_up, down, seed) for seed in range(max(1, min(16, 64 // n)))]
        x = calls[0][0]
        scores, best = moe_route(x, router, TOP_K, True), reference.moe_route(x, router, TOP_K, True)
        same = float((scores[1] == best[1]).float().mean())
        us = graph_time([partial(moe_route, call[0], router, TOP_K, True) for call in calls])
        us_reference = graph_time([partial(reference.moe_route, call[0], router, TOP_K, True) for call in calls])
        print(f"{n} tokens: route {us:.1f} us (reference {us_reference:.1f}), {same:.2%} of its experts the same")
        expected = expected_of(calls[0])
        for name, run in variants(n):
            measured(name, run, calls, expected)
        if options.tune:
            tune(n, calls, expected)


if __name__ == "__main__":
    main()
