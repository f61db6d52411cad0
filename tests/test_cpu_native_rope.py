"""Native rotation and cache write against the ops' references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from whole_calls import whole

from hotplug.core.ops import rope_kv_write as reference
from hotplug.core.ops.registry import SiteSpec, Verdict
from hotplug.platforms.cpu.native import library
from hotplug.platforms.cpu.native import rope as native
from hotplug.platforms.cpu.native.rope import KERNELS
from hotplug.vendor import PlatformError

pytestmark = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))

rope_kv_write = whole("rope_kv_write", native.rope_kv_write)
qk_norm_rope_kv_write = whole("qk_norm_rope_kv_write", native.qk_norm_rope_kv_write)
BLOCKS, POSITIONS = 12, 50


def arguments(
    tokens: int, heads: int, kv_heads: int, dim: int, rotary: int, block: int, layout: str, flip: bool, seed: int
) -> tuple[Tensor, ...]:
    """Of the op without `layout`; queries, keys and values are slices of one product, as in a layer."""
    rng = torch.Generator().manual_seed(seed)
    tokens = min(tokens, BLOCKS * block)
    qkv = torch.randn((tokens, heads + 2 * kv_heads, dim), generator=rng)
    if flip:
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    shape = (BLOCKS, block, kv_heads, dim) if layout == "NHD" else (BLOCKS, kv_heads, block, dim)
    caches = torch.randn((2, *shape), generator=rng)
    slots = torch.randperm(BLOCKS * block, generator=rng)[:tokens]
    positions = torch.randint(0, POSITIONS, (tokens,), generator=rng)
    return q, k, v, positions, torch.randn((POSITIONS, rotary), generator=rng), caches[0], caches[1], slots


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([0, 1, 2, 15, 16, 17, 60]), heads=st.integers(1, 9), kv_heads=st.integers(1, 3),
    half=st.integers(1, 40), rest=st.sampled_from([0, 0, 1, 6]), block=st.sampled_from([1, 5, 16]),
    layout=st.sampled_from(["NHD", "HND"]), flip=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_equals_the_reference(
    tokens: int, heads: int, kv_heads: int, half: int, rest: int, block: int, layout: str, flip: bool, seed: int
) -> None:
    made = arguments(tokens, heads, kv_heads, 2 * half + rest, 2 * half, block, layout, flip, seed)
    wanted = reference.rope_kv_write(*(x.clone() for x in made), layout)
    for found, expected in zip(rope_kv_write(*made, layout), wanted, strict=True):
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", [] if library.refusal() else library.load().instruction_sets)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (64, 32), (20, 6), (3, 2)])
def test_heads_are_normalized_and_narrower_caches_written(
    isa: str, dtype: torch.dtype, layout: str, dim: int, rotary: int
) -> None:
    """With keys and values that half precision does not hold, some that are not finite, and some that round to even."""
    library.load().use(isa)
    q, k, v, positions, cos_sin, k_cache, v_cache, slots = arguments(20, 4, 2, dim, rotary, 5, layout, False, 1)
    v[3, 1, 0], v[4] = -torch.inf, torch.nan
    v[0, 0, :3] = torch.tensor([1e6, -3.4e38, float("nan")])
    v[1, 0, :3] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1.0 + 2**-8])
    v[2, 0, :3] = torch.tensor([1e-7, 6e-8, -2e-8])
    weights = torch.randn(2, dim) * (1e5 if dtype is torch.float16 else 1)
    place = (positions, cos_sin, k_cache.to(dtype), v_cache.to(dtype), slots)
    for op, wanted, norms in (
        (rope_kv_write, reference.rope_kv_write, ()),
        (qk_norm_rope_kv_write, reference.qk_norm_rope_kv_write, (weights[0], weights[1], 1e-6)),
    ):
        expected = wanted(q, k, v, *norms, *(x.clone() for x in place), layout)
        found = op(q, k, v, *norms, *place, layout)
        assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5 * float(expected[0].abs().max()))
        step = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert_close(found[1], expected[1], rtol=2 * step, atol=1e-5, equal_nan=True)
        assert torch.equal(found[2].nan_to_num(7.0), expected[2].nan_to_num(7.0))
    library.load().use(library.load().instruction_sets[0])


@pytest.mark.parametrize(("which", "value"), [(3, POSITIONS), (3, -1), (7, BLOCKS * 4), (7, -1)])
def test_a_position_or_slot_that_there_is_none_of_is_refused_before_anything_is_written(which: int, value: int) -> None:
    made = arguments(3, 2, 1, 8, 8, 4, "NHD", False, 0)
    made[which][2] = value
    before = made[5].clone()
    with pytest.raises(PlatformError, match="refuses the arguments"):
        rope_kv_write(*made, "NHD")
    assert torch.equal(made[5], before)


@pytest.mark.parametrize("which", [3, 7])
def test_narrow_indices_are_refused(which: int) -> None:
    made = list(arguments(3, 2, 1, 8, 8, 4, "NHD", False, 0))
    made[which] = made[which].to(torch.int32)
    with pytest.raises(ValueError, match="int64"):
        rope_kv_write(*made, "NHD")


def verdict(dtype: str, kv_dtype: str, dim: int = 64) -> Verdict:
    facts = {"kv_dtype": kv_dtype, "head_dim": dim}
    verdicts = {kernel.check(SiteSpec(kernel.op, "s", dtype, "avx2", facts)) for kernel in KERNELS}
    (found,) = verdicts
    return found


def test_other_dtypes_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for kv_dtype in ("float32", "bfloat16", "float16"):
        assert verdict("float32", kv_dtype).ok
    assert "not bfloat16 into bfloat16" in verdict("bfloat16", "bfloat16").reason
    assert "not float32 into fp8_e4m3" in verdict("float32", "fp8_e4m3").reason
    assert "not 1040" in verdict("float32", "float32", 1040).reason
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("absent.so"))
    assert "absent.so is not there" in verdict("float32", "float32").reason
