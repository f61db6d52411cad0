"""FlashInfer as a provider of attention, with a stand-in for the library that attends by what it was planned with.

Cells past a sequence's end and blocks of nobody hold NaN, which must reach no result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import Case, dense_attention, make_case
from cuda_target import DEVICE, Interpreted, facts
from fake_platforms import candidates
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner
from whole_calls import whole

from hotplug.cli import display
from hotplug.cli.main import app
from hotplug.core.ops.registry import SiteSpec
from hotplug.core.startup import bind as bind_module
from hotplug.platforms.cuda.kernels import flashinfer_attention, gathered_attention
from hotplug.platforms.cuda.kernels.gathered_attention import STATIC
from hotplug.platforms.cuda.kernels.made import made
from hotplug.platforms.cuda.target import stands_for

SCALE = 0.3
MIXED = [(1, 37), (1, 64), (20, 20), (9, 75), (2, 130)]
CHUNKS = [(33, 33), (5, 48), (16, 200)]
HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 16


class Wrapper:
    """What `flashinfer.BatchPrefillWithPagedKVCacheWrapper` does, with the arguments that are used here."""

    made: list[Wrapper]

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str, *, backend: str) -> None:
        assert kv_layout == "NHD"
        self.workspace, self.backend, self.plans, self.runs = float_workspace_buffer, backend, 0, 0
        self.made.append(self)

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool,
        sm_scale: float | None = None, window_left: int = -1, logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        on_host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
        assert all(x.device.type == "cpu" for x in on_host), "each costs a wait for the device"
        assert all(x.dtype is torch.int32 for x in (*on_host, paged_kv_indices))
        assert paged_kv_indices.device == self.workspace.device and len(paged_kv_indices) == paged_kv_indptr[-1]
        assert causal
        self.plans += 1
        self.chunks = list(zip(qo_indptr.diff().tolist(), paged_kv_indices.cpu().split(paged_kv_indptr.diff().tolist()),
                               paged_kv_last_page_len.tolist(), strict=True))  # fmt: skip
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.dtype, self.scale, self.cap = q_data_type, sm_scale, logits_soft_cap
        self.window = None if window_left < 0 else window_left + 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor, enable_pdl: bool) -> Tensor:
        k_cache, v_cache = paged_kv_cache
        assert (*q.shape[1:2], *k_cache.shape[2:], k_cache.shape[1]) == self.shape and q.dtype is self.dtype
        assert out.shape == q.shape and self.scale is not None and not enable_pdl
        self.runs += 1
        lens, keys, values = [], [], []
        for queries, pages, last in self.chunks:
            seq = (len(pages) - 1) * k_cache.shape[1] + last
            lens.append((queries, seq))
            for cache, found in ((k_cache, keys), (v_cache, values)):
                found.append(cache.cpu()[pages].flatten(0, 1)[:seq])
        step: Any = SimpleNamespace(query_lens_host=[n for n, _ in lens], seq_lens_host=[n for _, n in lens])
        case = Case(q.cpu(), k_cache, v_cache, step, keys, values, "NHD")
        out.copy_(dense_attention(case, self.scale, self.window, None, self.cap or None))
        return out


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Wrapper]]:
    """The wrappers that were made."""
    module: Any = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    Wrapper.made = []
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    kept = [getattr(flashinfer_attention, name) for name in ("_workspace", "_planner", "build", "missing")]
    for function in kept:
        function.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Wrapper.made
    torch.set_num_threads(threads)
    for function in kept:
        function.cache_clear()


def case_of(lens: list[tuple[int, int]], seed: int = 0) -> Case:
    case = make_case(lens, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, block=BLOCK, dtype=torch.bfloat16,
                     index_dtype=torch.int32, unused=float("nan"), seed=seed)  # fmt: skip
    step = case.step
    moved = {name: getattr(step, name).to(DEVICE) for name in ("block_table", "query_start", "seq_lens")}
    q, k_cache, v_cache = (x.to(DEVICE) for x in (case.q, case.k_cache, case.v_cache))
    return replace(case, q=q, k_cache=k_cache, v_cache=v_cache, step=replace(step, **moved))


def layers_of(case: Case, count: int) -> list[Case]:
    """Layers of the case's step, each with queries, keys and values of its own."""
    return [
        replace(case, q=case.q * f, k_cache=case.k_cache * f, v_cache=case.v_cache / f,
                keys=[k * f for k in case.keys], values=[v / f for v in case.values])
        for f in (2.0**i for i in range(count))
    ]  # fmt: skip


attention = whole("attention", made(flashinfer_attention.attention, *STATIC))


def check(case: Case, window: int | None = None, soft_cap: float | None = None) -> None:
    actual = attention(case.q, case.k_cache, case.v_cache, case.step, SCALE, window, "NHD", None, soft_cap)
    expected = dense_attention(replace(case, q=case.q.cpu()), SCALE, window, None, soft_cap)
    assert_close(actual.double().cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (1, None), (19, None), (None, 1.5), (19, 1.5)])
def test_steps_are_planned_once_for_all_their_layers(
    library: list[Wrapper], window: int | None, soft_cap: float | None
) -> None:
    for seed, lens in enumerate((MIXED, CHUNKS, [(7, 7)], MIXED)):
        for layer in layers_of(case_of(lens, seed), 2):
            check(layer, window, soft_cap)
    (wrapper,) = library
    assert (wrapper.plans, wrapper.runs) == (4, 8)


def test_layers_that_differ_in_their_window_have_plans_of_their_own_and_share_a_workspace(
    library: list[Wrapper],
) -> None:
    for seed in range(2):
        for i, layer in enumerate(layers_of(case_of(CHUNKS, seed), 4)):
            check(layer, window=19 if i % 2 else None)
    assert [(w.plans, w.runs) for w in library] == [(2, 4), (2, 4)]
    assert library[0].workspace.data_ptr() == library[1].workspace.data_ptr()


def test_a_step_that_another_came_between_is_planned_again(library: list[Wrapper]) -> None:
    first, second = (layers_of(case_of(lens), 2) for lens in (CHUNKS, MIXED))
    for layer in (first[0], second[0], first[1], second[1]):
        check(layer)
    assert library[0].plans == 4


def test_layers_of_one_step_may_have_different_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "LEAST_QUERIES", 0)
    first, second = layers_of(case_of(CHUNKS), 2)
    met = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        met.append(len(k))
        return q

    check(first)
    gathered = whole("attention", made(partial(gathered_attention.attention, attend), *STATIC))
    gathered(second.q, second.k_cache, second.v_cache, second.step, SCALE, None, "NHD")
    check(second)
    assert met == [sum(seq for _, seq in CHUNKS)]


@pytest.mark.parametrize("lens", [[], [(1, 5), (1, 64)], MIXED])
def test_decodes_alone_and_steps_without_lengths_on_the_host_go_to_the_triton_kernel(
    library: list[Wrapper], lens: list[tuple[int, int]]
) -> None:
    case = case_of(lens)
    if lens == MIXED:
        step = replace(case.step, query_lens_host=None, seq_lens_host=None)
        actual = attention(case.q, case.k_cache, case.v_cache, step, SCALE, None, "NHD")
        assert_close(actual.double().cpu(), dense_attention(replace(case, q=case.q.cpu()), SCALE, None),
                     rtol=2e-2, atol=2e-2)  # fmt: skip
    else:
        check(case)
    assert library == []


def test_the_warm_up_builds_each_kernel_once_and_runs_none(library: list[Wrapper]) -> None:
    case = case_of(CHUNKS)
    q, k_cache, v_cache = (x.to("meta") for x in (case.q, case.k_cache, case.v_cache))
    with stands_for(DEVICE):
        for window in (None, 7, None, 7):
            out = attention(q, k_cache, v_cache, case.step, SCALE, window, "NHD")
    assert out.is_meta and out.shape == q.shape
    assert [(w.window, w.plans, w.runs, w.workspace.device.type) for w in library] == [
        (None, 1, 0, DEVICE.type), (7, 1, 0, DEVICE.type)
    ]  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------

SITE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 64, "layout": "NHD", "kv_dtype": "bfloat16",
        "window": 7, "sinks": False, "soft_cap": 1.0, "static": False}  # fmt: skip
(KERNEL,) = flashinfer_attention.KERNELS


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A machine with a GPU; the commands that it lacks."""
    lacking: set[str] = set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("CUDA_PATH", "FLASHINFER_NVCC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", "/cuda")
    monkeypatch.setattr(flashinfer_attention, "which", lambda command: None if command in lacking else command)
    monkeypatch.setattr(flashinfer_attention, "find_spec", lambda _: None)
    return lacking


def reason_of(arch: str = "sm_90", **changes: Any) -> str:
    site = {**SITE, **changes}
    verdict = KERNEL.check(SiteSpec("attention", "s", site.pop("dtype", "bfloat16"), arch, site))
    assert verdict.ok == (not verdict.reason)
    return verdict.reason


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_windows_and_soft_caps_are_served_on_every_gpu(machine: set[str], arch: str) -> None:
    assert reason_of(arch) == ""
    assert reason_of(arch, dtype="float16", kv_dtype="float16", head_dim=256) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sinks": True}, "has no sinks"),
        ({"layout": "HND"}, "reads NHD caches of bfloat16, not HND of bfloat16"),
        ({"kv_dtype": "float8_e4m3fn"}, "not NHD of float8_e4m3fn"),
        ({"dtype": "float32", "kv_dtype": "float32"}, "computes in bfloat16 or float16, not float32"),
        ({"head_dim": 96}, "has heads of 64, 128, 256, not 96"),
    ],
)
def test_what_it_lacks_is_refused_by_name(machine: set[str], changes: dict[str, Any], reason: str) -> None:
    assert reason in reason_of(**changes)


def test_tools_that_its_kernels_are_built_with_are_asked_for(
    machine: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine |= {"/cuda/bin/nvcc", "ninja"}
    assert reason_of() == "FlashInfer cannot build its kernels: no nvcc, no ninja"
    flashinfer_attention.missing.cache_clear()
    monkeypatch.setattr(flashinfer_attention, "find_spec", lambda name: name)  # flashinfer_jit_cache: they are built
    assert reason_of() == ""


def test_a_package_that_cannot_be_imported_is_named(machine: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert "FlashInfer cannot be imported: import of flashinfer halted" in reason_of()


def test_explain_lists_it_with_its_reason(tiny_model: Path, machine: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Interpreted(facts=facts("bfloat16"))
    monkeypatch.setattr(bind_module, "discover", lambda *_: candidates(platform))
    monkeypatch.setattr(display, "selected", lambda *_: None)
    arguments = ["explain", str(tiny_model), "--load-format", "dummy", "--why", "layers.0.attn", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--device", "interpreted"])
    assert result.exit_code == 0, result.output
    (site,) = json.loads(result.output)["sites"]
    (listed,) = [c for c in site["candidates"] if c["provider"] == "cuda.flashinfer"]
    assert (listed["outcome"], listed["reason"]) == ("refused", "has heads of 64, 128, 256, not 8")
