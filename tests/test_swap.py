"""Swapping end to end: tokens under preemption by swap are those without preemption; sizes, metrics, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import ConfigError, OutOfMemoryError
from hotplug.core.ops.block_copy import block_copy
from hotplug.core.ops.registry import Impl
from hotplug.core.platform.base import DeviceInfo, KVLayout, MemoryInfo
from hotplug.core.request import Request, SamplingParams
from hotplug.core.runner import kv_memory
from hotplug.core.transfer import swap as swap_module
from hotplug.core.transfer.swap import BlockSwap, SwapSpace
from hotplug.plugins.conformance.engine_runs import small_model

BLOCK = 2 * 2 * 16 * 2 * 64 * 4
"""Bytes of a block of the small model: layers, sides, tokens, heads, head dim, float32."""
SYNCHRONOUS = limits(shared_host_memory=True, accelerator=False)
AHEAD = limits(asynchronous=True, shared_host_memory=True, accelerator=False)


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@dataclass
class Runtime(FakePlatform):
    """Gives out pinned memory and counts it."""

    facts: Any = field(default_factory=lambda: AHEAD)
    pinned_bytes: int = 0

    def set_device(self, device: Any) -> None: ...

    def event(self) -> Event:
        return Event()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype)
        self.pinned_bytes += tensor.nbytes
        return tensor


@dataclass
class OwnMemory(FakePlatform):
    """Copies KV by itself and counts."""

    copies: int = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: DeviceInfo) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.copies += 1
        target.copy_(source)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda window=None: small_model(folder, window=window)


@pytest.fixture
def start(models: Callable[..., Path]) -> Callable[..., EngineCore]:
    def make(platform: Any, *, window: int | None = None, **options: Any) -> EngineCore:
        fixed = {"max_num_seqs": 4, "kv_cache_memory": 10 * BLOCK, "max_num_batched_tokens": 32}
        config = EngineConfig(model=str(models(window)), **{**fixed, **options})
        return EngineCore(config, candidates=candidates(platform))

    return make


def generate(core: EngineCore, *, abort_when_swapped: bool = False) -> dict[str, list[int]]:
    """Tokens of requests that outgrow a small pool, greedy and sampled, some ended by a stop token."""
    found: dict[str, list[int]] = {}
    for i in range(7):
        params = SamplingParams(temperature=float(i % 2), seed=i, max_tokens=40 + 3 * i, ignore_eos=True,
                                stop_token_ids=tuple(range(0, 300, 7)) if i > 4 else (),
                                presence_penalty=0.5 * (i % 3))  # fmt: skip
        prompt = [(i * 31 + n * 7) % 290 + 1 for n in range(4 + i)]
        core.add(Request(id=str(i), prompt_token_ids=prompt, sampling=params))
    aborted = False
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
        if abort_when_swapped and not aborted and core.stats().host_blocks_used:
            for i in range(7):  # whichever of them it is that waits
                aborted = core.abort(str(i)) or aborted
    return found


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("facts", [SYNCHRONOUS, AHEAD], ids=["one by one", "in flight"])
def test_tokens_are_those_without_preemption(start, facts, prefix_cache):
    roomy = start(FakePlatform(facts=SYNCHRONOUS), kv_cache_memory="4MiB")
    swapping = start(FakePlatform(facts=facts), swap_space=40 * BLOCK, enable_prefix_cache=prefix_cache)
    assert generate(swapping) == generate(roomy)
    stats = swapping.stats()
    assert stats.preemptions > 0 and stats.blocks_swapped_out > 0 and stats.blocks_swapped_in > 0
    assert (stats.host_blocks_used, stats.host_blocks_total, stats.kv_blocks_used) == (0, 39, 0)


@pytest.mark.parametrize(
    "change", [{"block_size": 4}, {"kv_cache_dtype": "bfloat16"}, {"layout": KVLayout.HND}], ids=lambda c: next(iter(c))
)
def test_other_caches(start, change):
    facts = limits(shared_host_memory=True, accelerator=False, block_sizes=(16, 4), kv_dtypes=("float32", "bfloat16"),
                   kv_layouts=(change.get("layout", KVLayout.NHD),))  # fmt: skip
    options = {name: value for name, value in change.items() if name != "layout"}
    roomy = start(FakePlatform(facts=facts), kv_cache_memory="4MiB", **options)
    small = 5 if "kv_cache_dtype" in options else 10
    swapping = start(FakePlatform(facts=facts), kv_cache_memory=small * BLOCK, swap_space=40 * BLOCK, **options)
    assert generate(swapping) == generate(roomy)
    assert swapping.stats().blocks_swapped_in > 0


def test_with_a_sliding_window(start):
    roomy = start(FakePlatform(facts=SYNCHRONOUS), window=24, kv_cache_memory="4MiB")
    swapping = start(FakePlatform(facts=AHEAD), window=24, kv_cache_memory=8 * BLOCK, swap_space=40 * BLOCK)
    assert generate(swapping) == generate(roomy)
    assert swapping.stats().blocks_swapped_in > 0


def test_pinned_memory_is_the_platforms(start):
    platform = Runtime()
    swapping = start(platform, swap_space=40 * BLOCK)
    assert platform.pinned_bytes == 40 * BLOCK
    assert generate(swapping) == generate(start(FakePlatform(facts=SYNCHRONOUS), kv_cache_memory="4MiB"))
    assert swapping.stats().blocks_swapped_in > 0


def test_a_platform_with_kv_memory_of_its_own_copies_each_block_once_a_way(start):
    platform = OwnMemory(facts=SYNCHRONOUS)
    swapping = start(platform, swap_space=40 * BLOCK)
    assert generate(swapping) == generate(start(FakePlatform(facts=SYNCHRONOUS), kv_cache_memory="4MiB"))
    stats = swapping.stats()
    assert platform.copies == stats.blocks_swapped_out + stats.blocks_swapped_in > 0


def test_the_plans_kernel_copies_all_layers_in_one_call(start):
    calls: list[tuple[int, int, torch.dtype]] = []

    def copy(sources: list[torch.Tensor], targets: list[torch.Tensor], pairs: torch.Tensor) -> None:
        calls.append((len(sources), len(pairs), pairs.dtype))
        block_copy(sources, targets, pairs)

    facts = limits(shared_host_memory=True, accelerator=False, index_dtype="int32")
    swapping = start(
        FakePlatform(facts=facts, kernels=[Impl("block_copy", "acme", make=lambda _: copy)]), swap_space=40 * BLOCK
    )
    (site,) = [s for s in swapping.report()["sites"] if s["op"] == "block_copy"]
    assert (site["site"], site["provider"], site["facts"]["page_bytes"]) == ("swap", "acme", BLOCK // (2 * 2))
    assert generate(swapping) == generate(start(FakePlatform(facts=SYNCHRONOUS), kv_cache_memory="4MiB"))
    stats = swapping.stats()
    assert {(count, dtype) for count, _, dtype in calls} == {(2 * 2, torch.int32)}
    assert sum(n for _, n, _ in calls) == stats.blocks_swapped_out + stats.blocks_swapped_in > 0


def test_without_a_swap_space_no_copy_is_planned(start):
    assert "block_copy" not in {c.spec.op for c in start(FakePlatform(facts=SYNCHRONOUS)).bound.kernels.plan.choices}


def test_a_host_pool_too_small_for_any_request_recomputes(start):
    swapping = start(FakePlatform(facts=SYNCHRONOUS), swap_space=2 * BLOCK, enable_prefix_cache=False)
    assert generate(swapping) == generate(start(FakePlatform(facts=SYNCHRONOUS), kv_cache_memory="4MiB"))
    assert swapping.stats().preemptions > 0


@pytest.mark.parametrize("facts", [SYNCHRONOUS, AHEAD], ids=["one by one", "in flight"])
def test_aborting_while_swapped_leaves_nothing_behind(start, facts):
    core = start(FakePlatform(facts=facts), swap_space=40 * BLOCK)
    generate(core, abort_when_swapped=True)
    stats = core.stats()
    assert stats.preemptions > 0
    assert (stats.host_blocks_used, stats.kv_blocks_used, stats.waiting, stats.running) == (0, 0, 0, 0)


# --- the memory ---


def test_blocks_pass_a_stage_smaller_than_their_number(monkeypatch):
    monkeypatch.setattr(swap_module, "STAGE_BYTES", 3 * 2 * 2 * 5 * 4)
    monkeypatch.setattr(swap_module, "PIECE_BYTES", 4 * 2 * 2 * 5 * 4 + 1)
    pieces = []

    def host(sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        pieces.append(tuple(sizes))
        return torch.full(tuple(sizes), torch.nan, dtype=dtype)

    space = SwapSpace(10, (2, 2, 5), torch.float32, host=host, device=lambda s, d: torch.zeros(s, dtype=d))
    assert pieces == [(4, 2, 2, 5), (4, 2, 2, 5), (2, 2, 2, 5)] and len(space.stage) == 3
    kv = [(torch.randn(12, 5), torch.randn(12, 5)) for _ in range(2)]
    before = [(k.clone(), v.clone()) for k, v in kv]
    swap = BlockSwap(kv, space, lambda source, target: target.copy_(source), block_copy, torch.int32)
    swap.swap_out([(11 - i, 9 - i) for i in range(8)])
    for k, v in kv:
        k.zero_()
        v.zero_()
    swap.swap_in([(i + 1, 9 - i) for i in range(8)])
    for (k, v), (old_k, old_v) in zip(kv, before, strict=True):
        for i in range(8):
            assert torch.equal(k[i + 1], old_k[11 - i]) and torch.equal(v[i + 1], old_v[11 - i])
        assert not k[[0, 9, 10, 11]].any() and not v[[0, 9, 10, 11]].any()


@pytest.mark.parametrize("size", ["1KiB", 2 * BLOCK - 1, 1])
def test_a_swap_space_below_two_blocks_is_refused(start, size):
    with pytest.raises(OutOfMemoryError, match=r"2 are the least.*Raise --swap-space"):
        start(FakePlatform(facts=SYNCHRONOUS), swap_space=size)


def test_a_swap_space_larger_than_the_free_host_memory_is_refused(start, monkeypatch):
    message = r"was to take 1024.00 GiB, {} GiB of host memory are free. Lower --swap-space"
    with pytest.raises(OutOfMemoryError, match=message.format("8.00")):
        start(FakePlatform(facts=SYNCHRONOUS), swap_space="1TiB")
    monkeypatch.setattr(kv_memory, "host_free", lambda: 3 << 30)  # a device with memory of its own
    with pytest.raises(OutOfMemoryError, match=message.format("3.00")):
        start(FakePlatform(facts=limits(accelerator=False)), swap_space="1TiB")


def test_memory_that_cannot_be_pinned_is_refused_in_words(start, monkeypatch):
    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("cannot lock so many pages")

    monkeypatch.setattr(Runtime, "pinned", fail)
    with pytest.raises(OutOfMemoryError, match=r"cannot lock so many pages\. Lower --swap-space"):
        start(Runtime(), swap_space=40 * BLOCK)


@pytest.mark.parametrize("size", ["lots", "-1GiB", 0, -5])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ConfigError):
        EngineConfig(swap_space=size)


def test_the_free_host_memory_heeds_the_control_group(tmp_path):
    assert kv_memory.host_free(tmp_path / "absent") > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\nactive_file 50\n")
    assert kv_memory.host_free(tmp_path) > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert kv_memory.host_free(tmp_path) == 450


def test_the_swap_space_is_not_counted_as_kv_memory(start):
    core = start(FakePlatform(facts=SYNCHRONOUS), swap_space=40 * BLOCK)
    assert core.num_blocks == 10
    assert core.report()["kv"]["swap_blocks"] == 40


def test_the_stage_is_taken_before_the_cache_is_sized(start):
    """Or the two together would exceed the share of the memory that the user allowed."""
    taken: list[str] = []

    @dataclass
    class Watched(OwnMemory):
        def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: DeviceInfo) -> torch.Tensor:
            taken.append("stage" if shape[1:3] == (2, 2) else "cache")
            return super().allocate(shape, dtype, device)

        def memory(self, device: DeviceInfo) -> MemoryInfo:
            taken.append("asked")
            return super().memory(device)

    start(Watched(facts=limits(accelerator=False)), swap_space=8 * BLOCK, kv_cache_memory=None, memory_utilization=0.01)
    at = taken.index("stage")
    assert taken[at : at + 4] == ["stage", "cache", "asked", "cache"]  # the first cache is the profile run's


def test_explain_says_what_it_is_worth(models):
    args = ["explain", str(models()), "--device", "cpu", "--swap-space", "1MiB"]
    out = CliRunner().invoke(app, args).output
    assert "swap       32 blocks on the host, 1,048,576 bytes; gains nothing" in out
    assert "swap" not in CliRunner().invoke(app, args[:-2]).output
