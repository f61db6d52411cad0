"""Swapping on a GPU: the op `block_copy` by kernel and by reference, and whole swaps over the bus. Under 30 s.

python ci/gpu/bench_swap.py [blocks]

Each way is checked first. Rates count a block's bytes once, though a copy on the device reads and writes them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hotplug.core.ops.block_copy import block_copy as reference
from hotplug.core.transfer.swap import BlockCopy, BlockSwap, SwapSpace
from hotplug.platforms.cuda.kernels.block_copy import block_copy as kernel

DEVICE = torch.device("cuda")
SHAPES = {"Llama 3.1 8B": (32, 64, 8, 128), "SmolLM2 135M": (30, 64, 3, 64)}
"""Layers, tokens of a block, key/value heads, head dim; bfloat16."""
REPEATS = 20


def host(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, pin_memory=True)


def device(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(sizes, dtype=dtype, device=DEVICE)


def queue(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Of a call until the host is free, and until the device is; the medians."""
    found: list[tuple[float, float]] = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        free = time.perf_counter() - begin
        torch.cuda.synchronize()
        found.append((free, time.perf_counter() - begin))
    return sorted(free for free, _ in found)[REPEATS // 2], sorted(done for _, done in found)[REPEATS // 2]


def measure(name: str, blocks: int) -> None:
    layers, tokens, heads, dim = SHAPES[name]
    block = (layers, 2, tokens, heads, dim)
    cache = torch.randn((layers, 2, 2 * blocks + 1, tokens, heads, dim), device=DEVICE).to(torch.bfloat16)
    kv = [(layer[0], layer[1]) for layer in cache]
    space = SwapSpace(blocks + 1, block, torch.bfloat16, host=host, device=device)
    order = (torch.randperm(2 * blocks) + 1).tolist()
    out, back = ([(at, i + 1) for i, at in enumerate(order[part::2])] for part in range(2))
    size = blocks * cache[:, :, 0].nbytes
    caches = [side for layer in kv for side in layer]
    staged = [side for layer in space.stage.unbind(1) for side in layer.unbind(1)]
    few = out[: len(space.stage)]
    pairs = torch.tensor([(at, i) for i, (at, _) in enumerate(few)], dtype=torch.int32, device=DEVICE)
    swapped = pairs.flip(1)
    ways: dict[str, BlockCopy] = {"kernel": kernel, "reference": reference}
    for way, copy in ways.items():
        swap = BlockSwap(kv, space, queue, copy, torch.int32)
        cache[:, :, [at for at, _ in back]] = 0
        swap.swap_out(out)
        swap.swap_in(back)
        assert all(torch.equal(cache[:, :, a], cache[:, :, b]) for (a, _), (b, _) in zip(out, back, strict=True)), way
        calls = [
            ("gather", len(few), partial(copy, caches, staged, pairs)),
            ("scatter", len(few), partial(copy, staged, caches, swapped)),
            ("swap out", blocks, partial(swap.swap_out, out)),
            ("swap in", blocks, partial(swap.swap_in, back)),
        ]
        for what, count, call in calls:
            free, done = seconds(call)
            rate = size * count / blocks / done / 1e9
            print(f"{name:14}{way:11}{what:9}{count:4} blocks {done * 1e6:9.0f} us, host {free * 1e6:7.0f} us"
                  f"{rate:8.1f} GB/s")  # fmt: skip


if __name__ == "__main__":
    for name in SHAPES:
        measure(name, int(sys.argv[1]) if len(sys.argv) > 1 else 32)
