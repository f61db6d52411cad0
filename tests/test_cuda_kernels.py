"""The Triton kernels against the references of their ops: in Triton's interpreter, or on the GPU where there is one.

Every kernel of `KERNELS` is found and run by the conformance kit, over its own shapes, steps and strides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from cuda_target import DEVICE, HAS_GPU, Interpreted, facts, target
from fake_platforms import candidates

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.compare import compare
from hotplug.core.ops.reference import bound_reference
from hotplug.core.ops.registry import Impl, SiteSpec
from hotplug.core.request import Request, SamplingParams
from hotplug.platforms.cuda.kernels import KERNELS
from hotplug.plugins.conformance import cases, grid
from hotplug.plugins.conformance.check_ops import honesty, ops, to
from hotplug.plugins.conformance.engine_runs import small_model
from hotplug.plugins.conformance.report import Report
from hotplug.plugins.conformance.target import Trusted

REGISTRY = builtin_registry()
DTYPES = ("float32", "bfloat16")
TRITON = ("cuda.triton", "cuda.few_rows")
"""Providers that run anywhere; the others are libraries of GPU machines, or for one kind of GPU."""


def label(value: Any) -> str | None:
    return f"{value.op}-{value.provider}" if isinstance(value, Impl) else None


FEW_HEADS = ((4, 2, 64), (3, 1, 64))
"""In the interpreter a program takes a millisecond, and attention has one a head and tile: the default suite has these
heads, and no attention of float32, whose tiles are small (test_cuda_attention.py has some of it)."""


def kernel_cases() -> Iterator[Any]:
    """What a quick run of the kit asks with few heads, and all of it: on a GPU, or in the slow suite."""
    for kernel, dtype, whole in itertools.product(KERNELS, DTYPES, (False, True)):
        slow = not HAS_GPU and (whole or (kernel.op == "attention" and dtype == "float32"))
        yield pytest.param(kernel, dtype, whole, marks=pytest.mark.slow if slow else (),
                           id=f"{label(kernel)}-{dtype}{'-whole' * whole}")  # fmt: skip


@pytest.mark.parametrize(("kernel", "dtype", "whole"), kernel_cases())
def test_a_kernel_equals_its_reference(
    kernel: Impl, dtype: str, whole: bool, tmp_path: Path, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(grid, "HEADS", FEW_HEADS)
    report = Report()
    ops(target(tmp_path, dtype, kernels=[kernel]), report)
    assert report.failures == []
    ran = report.data.get("cases", {}).get(f"{kernel.op} -> {kernel.provider}", 0)
    if not ran and kernel.provider not in TRITON:
        pytest.skip(f"a library's kernel, which is not here, or one for steps that the kit has not: {report.notes}")
    assert ran, report.notes


def test_poison_is_what_new_memory_holds(poisoned: None) -> None:
    assert torch.empty(3, device=DEVICE).isnan().all()
    assert torch.empty_like(torch.zeros(3, 4, device=DEVICE).t()).isnan().all()
    assert (torch.empty(3, dtype=torch.int32, device=DEVICE) == 2**31 - 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("each", [2, 16])
def test_a_check_keeps_its_word_by_chance(each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotplug.plugins.conformance.check_ops.FUZZED", 5 * each * len(KERNELS))  # a fifth is drawn
    report = Report()
    honesty(target(tmp_path, *DTYPES), report)
    assert report.failures == []
    assert report.data["said_yes"] > len(KERNELS)


# --- what the kit does not ask --------------------------------------------------------------------

HEADS = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, "layout": "NHD", "scale": 0.125,
         "sinks": False, "soft_cap": None}  # fmt: skip
STEPS = {
    "decodes": [(1, 17), (1, 5), (1, 160)],
    "chunks": [(9, 30), (16, 16)],
    "decodes and chunks": [(1, 31), (5, 12)],
}
ATTENTION = [kernel for kernel in KERNELS if kernel.op == "attention"]


def serves(kernel: Impl, dtype: str, facts: dict[str, Any]) -> bool:
    return kernel.check(site(kernel, dtype, facts)).ok


def site(kernel: Impl, dtype: str, facts: dict[str, Any]) -> SiteSpec:
    return SiteSpec(kernel.op, "test", dtype, target_arch(), facts)


def target_arch() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability()) if HAS_GPU else "sm_90"


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # in rows of padding, which read NaN
@pytest.mark.parametrize("kernel", ATTENTION, ids=label)
@pytest.mark.parametrize(
    ("lens", "static", "window"),
    [(lens, static, window) for lens, static, window in itertools.product(STEPS, (False, True), (None, 7))
     if not (static and lens == "decodes and chunks")],
)  # fmt: skip
@torch.inference_mode()
def test_cells_past_the_end_of_a_sequence_do_not_leak(
    kernel: Impl, lens: str, static: bool, window: int | None
) -> None:
    facts = {**HEADS, "window": window, "static": static, "kv_dtype": "float32"}
    if not serves(kernel, "float32", facts):
        pytest.skip("not a site of this kernel")
    call = cases.Builder("float32", "int32", seed=3).call("attention", facts, STEPS[lens], view=True)
    assert call is not None
    bucket = REGISTRY.op("attention").bucket
    if kernel.accepts is not None and bucket is not None and not kernel.accepts(bucket(*call.args)):
        pytest.skip("not a step of this kernel")
    expected = bound_reference(REGISTRY.op("attention"), facts)(*call.args)
    q, k_cache, v_cache, *rest = (to(arg, DEVICE) for arg in call.args)
    for cache in (k_cache, v_cache):
        assert (cache == cases.POISON).any()
        cache[cache == cases.POISON] = float("nan")
    result = kernel.make(site(kernel, "float32", facts))(q, k_cache, v_cache, *rest)
    found = compare(result[: call.rows].cpu(), expected[: call.rows])
    assert found.ok, found.reason


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@torch.inference_mode()
def test_rows_of_any_width_are_normalized(op: str) -> None:
    (kernel,) = [k for k in KERNELS if k.op == op]
    for width in (1, 3, 31, 257, 8192):
        facts = {"width": width, "eps": 1e-5}
        if not serves(kernel, "float32", facts):
            continue
        call = cases.Builder("float32", "int32", seed=width).call(op, facts, [(3, 3)], view=True)
        assert call is not None
        got = kernel.make(site(kernel, "float32", facts))(*(to(arg, DEVICE) for arg in call.args))
        want = bound_reference(REGISTRY.op(op), facts)(*call.args)
        pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
        assert all(compare(a.cpu(), b).ok for a, b in pairs), width


# --- a whole model --------------------------------------------------------------------------------


def greedy(core: EngineCore) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, length in enumerate((3, 21, 40)):
        prompt = [(i * 31 + n * 7) % 290 + 1 for n in range(length)]
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        core.add(Request(id=str(i), prompt_token_ids=prompt, sampling=params))
    while core.has_work:
        for delta in core.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="tests/gpu runs the real platform")
@pytest.mark.filterwarnings("ignore:.*call sites run a plain-PyTorch reference")
def test_greedy_tokens_are_those_of_the_references(tmp_path: Path) -> None:
    options = {"model": str(small_model(tmp_path)), "max_num_seqs": 4, "kv_cache_memory": "4MiB",
               "max_num_batched_tokens": 32, "dtype": "float32"}  # fmt: skip
    platform = Interpreted(facts=facts("float32", shared_host_memory=True))
    core = EngineCore(EngineConfig(device="interpreted", **options), candidates=candidates(platform))
    bound = {choice.provider for choice in core.bound.kernels.plan.choices}
    assert any(provider.startswith("cuda.") for provider in bound)
    expected = greedy(EngineCore(EngineConfig(device="trusted", **options), candidates=candidates(Trusted())))
    assert greedy(core) == expected
    assert [len(tokens) for tokens in expected.values()] == [5, 5, 5]


# --- the interpreter, as repaired -----------------------------------------------------------------


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    values = torch.cat((torch.randn(1000), torch.tensor([0.0, -0.0, float("inf"), 3.3e38, 1e-40, 1.00390625])))
    bits = torch.from_numpy(interpreter.narrow(values.numpy()).view("int16"))
    assert torch.equal(bits, values.bfloat16().view(torch.int16))
    assert torch.equal(torch.from_numpy(interpreter.widen(bits.numpy().view("uint16"))), values.bfloat16().float())
    assert interpreter.widen(interpreter.narrow(torch.tensor([float("nan")]).numpy())) != 0.0
