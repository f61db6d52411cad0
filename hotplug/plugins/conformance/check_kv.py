"""KV memory: zeroed, written and read back, copied within and to the host and back, for every layout and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from hotplug.core.kv.groups import make_groups
from hotplug.core.kv.spec import BlockFormat, FullAttention
from hotplug.core.ops.attention import gather_kv
from hotplug.core.ops.reference import bound_reference
from hotplug.core.ops.registry import Fn, SiteSpec
from hotplug.core.platform.base import KVLayout
from hotplug.core.platform.optional import HasKV
from hotplug.core.runner.kv_memory import allocate
from hotplug.plugins.conformance.cases import TORCH_DTYPES, Builder
from hotplug.plugins.conformance.report import Report
from hotplug.plugins.conformance.target import Target

KV_HEADS, HEAD_DIM, BLOCKS, LAYERS = 2, 64, 9, 2


@torch.inference_mode()
def kv(target: Target, report: Report) -> None:
    """Round trips through the blocks of every layout, dtype and block size that the platform declares."""
    limits = target.limits
    dtypes = limits.kv_dtypes or limits.dtypes
    sizes = limits.block_sizes[:2] if target.options.quick else limits.block_sizes
    for layout, dtype, size in itertools.product(limits.kv_layouts, dtypes, sizes):
        where = f"{dtype}, {layout}, blocks of {size}"
        spec = FullAttention(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        groups = make_groups([spec] * LAYERS, BlockFormat(size, str(layout), dtype))
        caches = allocate(groups, BLOCKS, target.platform, target.device)
        if any(bool(cache.to("cpu").to(torch.float32).any()) for pair in caches for cache in pair):
            report.fail(f"KV memory is not zeroed: masked positions are multiplied by zero ({where})")
        _written_is_read(target, report, caches[1], layout, dtype, size, where)
        _copies(target, report, caches[1][0], where)
        report.cases += 1


def _written_is_read(
    target: Target, report: Report, pair: tuple[Tensor, Tensor], layout: KVLayout, dtype: str, size: int, where: str
) -> None:
    compute = target.limits.dtypes[0]
    builder = Builder(compute, target.limits.index_dtype, seed=size)
    tokens = 2 * size + 1
    k, v = (torch.randn((tokens, KV_HEADS, HEAD_DIM), generator=builder.random).to(builder.dtype) for _ in range(2))
    blocks = torch.tensor([5, 2, 7])
    position = torch.arange(tokens)
    slots = (blocks[position // size] * size + position % size).to(builder.index)
    facts = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": size, "layout": str(layout),
             "kv_dtype": dtype}  # fmt: skip
    write = _kernel(target, SiteSpec("kv_write", "conform", compute, target.device.arch, facts))
    device = target.torch_device
    write(k.to(device), v.to(device), *pair, slots.to(device))
    table = blocks.to(device)
    for name, given, got in zip("kv", (k, v), gather_kv(*pair, table, tokens, str(layout)), strict=True):
        want = given.to(TORCH_DTYPES[dtype]).to(torch.float32)
        found = got.to("cpu").to(torch.float32)
        wrong = [i for i in range(tokens) if not torch.equal(found[i], want[i])]
        if wrong:
            words = f"the last partial block, {len(wrong)} token" if wrong == [tokens - 1] else f"tokens {wrong[:5]}"
            report.fail(f"{name} of {words} is not what was written ({where})")


def _kernel(target: Target, spec: SiteSpec) -> Fn:
    for impl in target.registry.impls(spec.op):
        if impl.check(spec)[0]:
            return impl.make(spec)
    return bound_reference(target.registry.op(spec.op), spec.facts)


def _copies(target: Target, report: Report, cache: Tensor, where: str) -> None:
    """A block goes to another place on the device, to the host, and back after its own was overwritten."""
    copy: Callable[[Tensor, Tensor], object] = target.platform.copy if isinstance(target.platform, HasKV) else _copy
    original = cache[5].to("cpu", copy=True)
    host = torch.empty_like(original)
    for step, source, place in (("on the device", cache[5], cache[1]), ("to the host", cache[1], host),
                                ("back from the host", host, cache[3])):  # fmt: skip
        copy(source, place)
        if not torch.equal(place.to("cpu").to(torch.float32), original.to(torch.float32)):
            report.fail(f"a block copied {step} is not the block it was ({where})")
            return
        if step == "to the host":
            cache[5].zero_()


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)
