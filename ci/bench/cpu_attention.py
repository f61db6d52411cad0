"""Attention on this processor: the native kernel against PyTorch's over gathered blocks, interleaved, medians.

    python ci/bench/cpu_attention.py [--heads 9 --kv-heads 3 --dim 64 --block 16] [--repeat 30] [--isa avx2]

Caches of several layers are gone through one after the other, as a step does, so that they do not stay in the
innermost cache more than they would.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from hotplug.platforms.cpu import kernels
from hotplug.platforms.cpu.native import attention as native
from hotplug.platforms.cpu.native import library
from hotplug.vendor import AttentionInputs, SiteSpec

LAYERS = 30
PAUSE = 0.02
"""Seconds after which threads that wait for work have gone to sleep."""
STEPS = {
    "decode, 1 request at 128": [(1, 128)],
    "decode, 1 request at 1,000": [(1, 1000)],
    "decode, 1 request at 4,000": [(1, 4000)],
    "decode, 16 requests at 200": [(1, 200)] * 16,
    "decode, 16 requests at 1,000": [(1, 1000)] * 16,
    "prompt of 128": [(128, 128)],
    "prompt of 1,024": [(1024, 1024)],
    "chunk of 256 at 1,024": [(256, 1024)],
    "8 decodes at 200, chunk of 120": [(1, 200)] * 8 + [(120, 120)],
}
SHARED = "decode, 16 requests at 600, 512 of them shared"

Kernel = Callable[..., Tensor]


def step_of(lens: list[tuple[int, int]], block: int, shared: int) -> tuple[AttentionInputs, int]:
    """The step, whose first `shared` positions are the same blocks for all, and how many blocks it needs."""
    widths = [-(-seq // block) for _, seq in lens]
    common = shared // block
    table = torch.zeros((len(lens), max(widths)), dtype=torch.int64)
    used = 1 + common
    for i, width in enumerate(widths):
        table[i, :common] = torch.arange(1, 1 + common)
        table[i, common:width] = torch.arange(used, used + width - common)
        used += width - common
    queries, seqs = [n for n, _ in lens], [n for _, n in lens]
    start = torch.tensor([0, *queries]).cumsum(0)
    decodes = sum(n == 1 for n in queries)
    step = AttentionInputs(table, start, torch.tensor(seqs), queries, seqs, decodes, max(queries), max(seqs))
    return step, used


def milliseconds(kernel: Kernel, q: Tensor, caches: Tensor, step: AttentionInputs) -> float:
    """Of one layer, over a step of `LAYERS`, with the threads of the other kernel asleep and its own awake."""
    time.sleep(PAUSE)
    for layers in (caches[:4], caches):
        step = replace(step)  # with nothing prepared of it
        began = time.perf_counter()
        for k_cache, v_cache in layers:
            kernel(q, k_cache, v_cache, step, None)
    return (time.perf_counter() - began) / len(caches) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--isa", help="instruction set of the native kernel; the best unless said")
    args = parser.parse_args()
    if args.isa:
        library.load().use(args.isa)
    threads = f"{library.load().threads} threads, PyTorch {torch.get_num_threads()}"
    print(f"{args.heads} heads over {args.kv_heads} of {args.dim}, blocks of {args.block}")
    print(f"{library.load().instruction_set}, {threads}")
    print(f"{'ms a layer':<50}{'cpu.sdpa':>10}{'cpu.native':>12}{'ratio':>8}")
    for name, lens in {**STEPS, SHARED: [(1, 600)] * 16}.items():
        step, blocks = step_of(lens, args.block, 512 if name == SHARED else 0)
        caches = torch.randn(LAYERS, 2, blocks, args.block, args.kv_heads, args.dim)
        q = torch.randn(sum(n for n, _ in lens), args.heads, args.dim)
        facts = {"scale": args.dim**-0.5, "window": None, "soft_cap": None, "layout": "NHD"}
        spec = SiteSpec("attention", "bench", "float32", "any", facts)
        times: dict[Kernel, list[float]] = {kernels.attention(spec): [], native.attention(spec): []}
        for kernel in times:
            milliseconds(kernel, q, caches, step)
        for _ in range(args.repeat if len(q) < 512 else max(3, args.repeat // 6)):
            for kernel, found in times.items():
                found.append(milliseconds(kernel, q, caches, step))
        sdpa, ours = (median(found) for found in times.values())
        print(f"{name:<50}{sdpa:>10.3f}{ours:>12.3f}{sdpa / ours:>7.1f}x")


if __name__ == "__main__":
    main()
