"""Every CPU kernel equals the reference of its op, over generated shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_cases import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hotplug.core.ops import attention as attention_op
from hotplug.core.ops import norm
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.registry import SiteSpec
from hotplug.platforms.cpu import CpuPlatform
from hotplug.platforms.cpu.kernels import KERNELS, attention, rms_norm

FEW = settings(max_examples=200, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_kernel_of_the_platform_is_compared_here() -> None:
    assert {k.fn for k in KERNELS} == {attention, rms_norm}


def test_the_platform_registers_its_kernels() -> None:
    registry = builtin_registry()
    CpuPlatform().register(registry)
    assert registry.providers == {"reference", "cpu.sdpa", "cpu.fused"}


decode = st.integers(1, 20).map(lambda seq: (1, seq))
prefill = st.integers(2, 20).flatmap(lambda seq: st.integers(2, seq).map(lambda query: (query, seq)))
steps = st.tuples(st.lists(decode, max_size=4), st.lists(prefill, max_size=3)).map(lambda s: s[0] + s[1]).filter(bool)


@FEW
@given(
    lens=steps,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 10]),
    block=st.sampled_from([1, 4, 16]),
    window=st.none() | st.integers(1, 24),
    dtype=DTYPES,
    cache=st.sampled_from([None, torch.bfloat16, torch.float8_e4m3fn]),
    seed=st.integers(0, 99),
)
def test_attention_equals_its_reference(
    lens: list[tuple[int, int]], kv_heads: int, group: int, dim: int, block: int, window: int | None,
    dtype: torch.dtype, cache: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    case = make_case(
        lens, heads=kv_heads * group, kv_heads=kv_heads, dim=dim, block=block, dtype=dtype, cache_dtype=cache, seed=seed
    )
    arguments = (case.k_cache, case.v_cache, case.step, dim**-0.5, window, "NHD")
    wide = torch.empty((*case.q.shape[:2], 2 * dim), dtype=dtype)
    wide[..., :dim] = case.q
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2e-2}
    expected = attention_op.attention(case.q, *arguments)
    assert_close(attention(case.q, *arguments), expected, **tolerance)
    assert_close(attention(wide[..., :dim], *arguments), expected, **tolerance)


@FEW
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=2), width=st.integers(1, 40), dtype=DTYPES)
def test_rms_norm_equals_its_reference(shape: list[int], width: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(width)
    x = torch.randn((*shape, 2 * width), generator=rng).to(dtype)[..., ::2]
    weight = torch.randn(width, generator=rng).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2e-2}
    assert_close(rms_norm(x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5), **tolerance)


def test_attention_refuses_the_layout_that_it_does_not_read() -> None:
    check = next(k for k in KERNELS if k.op == "attention").check
    assert check(SiteSpec("attention", "s", "float32", "avx2", {"layout": "NHD"})).ok
    assert check(SiteSpec("attention", "s", "float32", "avx2", {"layout": "HND"})).reason == "layout HND is not NHD"
