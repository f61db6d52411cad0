"""Every CPU kernel equals the reference of its op, over generated shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_cases import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from whole_calls import whole

from hotplug.core.ops import attention as attention_op
from hotplug.core.ops import dense, moe, norm, packed_linear
from hotplug.core.ops import rope as rope_op
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.packed_linear import GROUP_BYTES
from hotplug.core.ops.registry import Fact, SiteSpec, Verdict
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.platforms.cpu import CpuPlatform
from hotplug.platforms.cpu.kernels import KERNELS, attention, kv_write, linear, moe_experts, rms_norm, rope
from hotplug.platforms.cpu.native import attention as native_attention
from hotplug.platforms.cpu.native import dense as native_dense
from hotplug.platforms.cpu.native import inputs as native_inputs
from hotplug.platforms.cpu.native import norm as native_norm
from hotplug.platforms.cpu.native import rope as native_rope
from hotplug.platforms.cpu.native import sampling as native_sampling
from hotplug.platforms.cpu.native.library import refusal
from hotplug.platforms.cpu.native.packed import linear_packed

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
    files = (native_attention, native_dense, native_inputs, native_norm, native_rope, native_sampling)
    elsewhere = {(k.op, k.provider) for module in files for k in module.KERNELS}  # tests/test_cpu_native_*.py
    packed = {(f"{op}_packed", "cpu.native") for op in ("embed", "linear", "logits")}
    elsewhere |= packed | {("linear_packed_silu_mul", "cpu.native")}
    here = {("attention", "cpu.sdpa"), ("kv_write", "cpu.index_copy"), ("rope", "cpu.joint"), ("rms_norm", "cpu.fused"),
            ("moe_experts", "cpu.by_expert"), ("linear", "cpu.native"), ("logits", "cpu.native")}  # fmt: skip
    assert {(k.op, k.provider) for k in KERNELS} == here | elsewhere


@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
@FEW
@given(
    rows=st.integers(0, 16), cols=st.integers(1, 70), outs=st.integers(1, 40), bias=st.booleans(), flip=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_few_rows_equal_the_reference(rows: int, cols: int, outs: int, bias: bool, flip: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cols, rows, generator=generator).T if flip else torch.randn(rows, cols, generator=generator)
    weight = torch.randn(outs, cols, generator=generator)
    offset = torch.randn(outs, generator=generator) if bias else None
    assert_close(linear(x, weight, offset), dense.linear(x, weight, offset), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
@FEW
@given(
    scheme=st.sampled_from(sorted(GROUP_BYTES)), rows=st.integers(0, 40), groups=st.integers(1, 5),
    outs=st.integers(1, 40), bias=st.booleans(), flip=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_in_groups_equal_the_reference_but_for_eight_bits_of_x(
    scheme: str, rows: int, groups: int, outs: int, bias: bool, flip: bool, seed: int
) -> None:
    generator, cols = torch.Generator().manual_seed(seed), 32 * groups
    x = torch.randn(cols, rows, generator=generator).T if flip else torch.randn(rows, cols, generator=generator)
    (data,) = PackedScheme(scheme).quantize(torch.randn(outs, cols, generator=generator))
    offset = torch.randn(outs, generator=generator) if bias else None
    wanted = packed_linear.linear_packed(x, data, offset)
    half_steps = (x.reshape(rows, groups, 32).abs().amax(-1) / 254).repeat_interleave(32, 1)
    allowed = half_steps @ packed_linear.dequantize(data, scheme).abs().T + 1e-4
    for _ in range(2):  # packed, then found packed
        found = linear_packed(x, data, offset)
        assert found.shape == wanted.shape
        assert bool(((found - wanted).abs() <= 1.001 * allowed).all())


def test_what_weights_in_groups_need_is_refused_by_name() -> None:
    kernel = next(k for k in KERNELS if k.op == "linear_packed")
    facts: dict[str, Fact] = {"in_features": 64, "out_features": 8, "bias": False}
    for dtype, scheme, reason in (
        ("bfloat16", "q8_0", "float32, not bfloat16"),
        ("float32", "q6_k", "no kernel for q6_k"),
    ):
        verdict = kernel.check(SiteSpec("linear_packed", "s", dtype, "avx2", {**facts, "scheme": scheme}))
        assert not verdict.ok
        assert reason in verdict.reason


def test_the_platform_registers_its_kernels() -> None:
    registry = builtin_registry()
    CpuPlatform().register(registry)
    assert registry.providers == {"reference", "cpu.sdpa", "cpu.index_copy", "cpu.joint", "cpu.fused", "cpu.by_expert",
                                  "cpu.native"}  # fmt: skip


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
    kernel = whole("attention", attention)
    assert_close(kernel(case.q, *arguments), expected, **tolerance)
    assert_close(kernel(wide[..., :dim], *arguments), expected, **tolerance)


@FEW
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=2), width=st.integers(1, 40), dtype=DTYPES)
def test_rms_norm_equals_its_reference(shape: list[int], width: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(width)
    x = torch.randn((*shape, 2 * width), generator=rng).to(dtype)[..., ::2]
    weight = torch.randn(width, generator=rng).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2e-2}
    assert_close(whole("rms_norm", rms_norm, width=width)(x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5), **tolerance)


@FEW
@given(
    tokens=st.integers(0, 9), heads=st.integers(1, 3), dim=st.integers(1, 9), block=st.integers(1, 5), dtype=DTYPES,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_kv_write_equals_its_reference(
    tokens: int, heads: int, dim: int, block: int, dtype: torch.dtype, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    cache = torch.randn((2, 6, block, heads, dim), generator=rng).to(dtype)
    expected = cache.clone()
    qkv = torch.randn((tokens, 3 * heads, dim), generator=rng).to(dtype)
    k, v = qkv[:, heads : 2 * heads], qkv[:, 2 * heads :]
    slots = torch.randperm(6 * block, generator=rng)[:tokens]
    kv_write(k[: len(slots)], v[: len(slots)], cache[0], cache[1], slots)
    attention_op.kv_write(k[: len(slots)], v[: len(slots)], expected[0], expected[1], slots, "NHD")
    assert torch.equal(cache, expected)


@FEW
@given(tokens=st.integers(0, 5), heads=st.integers(1, 4), kv_heads=st.integers(1, 2), half=st.integers(1, 8))
def test_rope_equals_its_reference(tokens: int, heads: int, kv_heads: int, half: int) -> None:
    rng = torch.Generator().manual_seed(tokens)
    table = torch.randn((11, 2 * half), generator=rng)
    qkv = torch.randn((tokens, heads + 2 * kv_heads, 2 * half), generator=rng)
    q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    positions = torch.randint(0, 11, (tokens,), generator=rng)
    for got, expected in zip(rope(q, k, positions, table), rope_op.rope(q, k, positions, table), strict=True):
        assert_close(got, expected, rtol=1e-5, atol=1e-5)


@FEW
@given(
    tokens=st.integers(0, 9), hidden=st.integers(1, 9), width=st.integers(1, 9), count=st.integers(1, 6),
    share=st.floats(0, 1), dtype=DTYPES, seed=st.integers(0, 99),
)  # fmt: skip
def test_moe_experts_equals_its_reference(
    tokens: int, hidden: int, width: int, count: int, share: float, dtype: torch.dtype, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    top_k = max(1, int(share * count))
    x = torch.randn((tokens, 2 * hidden), generator=rng).to(dtype)[:, :hidden]
    weights, experts = torch.rand((tokens, count), generator=rng).topk(top_k)
    gate_up = torch.randn((count, 2 * width, hidden), generator=rng).to(dtype)
    down = torch.randn((count, hidden, width), generator=rng).to(dtype)
    call = (x, weights, experts.to(torch.int32), gate_up, down)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 0.1}
    assert_close(moe_experts(*call), moe.moe_experts(*call), **tolerance)


def check_of(op: str, dtype: str = "float32", **facts: object) -> Verdict:
    return next(k for k in KERNELS if k.op == op).check(SiteSpec(op, "s", dtype, "avx2", facts))


def test_kernels_refuse_what_they_do_not_serve_with_the_reason() -> None:
    assert check_of("kv_write", layout="NHD", kv_dtype="float32").ok
    assert check_of("kv_write", layout="HND", kv_dtype="float32").reason == "layout HND is not NHD"
    assert "fp8_e4m3" in check_of("kv_write", layout="NHD", kv_dtype="fp8_e4m3").reason
    assert check_of("rope", rotary_dim=8, head_dim=8).ok
    assert "8 of 16" in check_of("rope", rotary_dim=8, head_dim=16).reason
    assert "bfloat16" in check_of("rope", "bfloat16", rotary_dim=8, head_dim=8).reason


def test_attention_refuses_the_layout_that_it_does_not_read() -> None:
    check = next(k for k in KERNELS if k.op == "attention").check
    facts = {"static": False, "sinks": False, "soft_cap": None}
    assert check(SiteSpec("attention", "s", "float32", "avx2", {"layout": "NHD", **facts})).ok
    assert (
        check(SiteSpec("attention", "s", "float32", "avx2", {"layout": "HND", **facts})).reason
        == "layout HND is not NHD"
    )


def test_attention_takes_steps_of_static_shape() -> None:
    assert check_of("attention", layout="NHD", static=True, sinks=False, soft_cap=None).ok


@pytest.mark.parametrize("fact", [{"sinks": True}, {"soft_cap": 20.0}])
def test_attention_refuses_sinks_and_soft_caps(fact: dict[str, Fact]) -> None:
    check = next(k for k in KERNELS if k.op == "attention").check
    facts: dict[str, Fact] = {"layout": "NHD", "static": False, "sinks": False, "soft_cap": None, **fact}
    assert "no sinks" in check(SiteSpec("attention", "s", "float32", "avx2", facts)).reason
