"""Native rotation and cache write against the op's reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hotplug.core.ops import rope_kv_write as reference
from hotplug.core.ops.registry import SiteSpec, Verdict
from hotplug.platforms.cpu.native import library
from hotplug.platforms.cpu.native.rope import KERNELS, rope_kv_write
from hotplug.vendor import PlatformError

pytestmark = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))

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


def verdict(dtype: str, kv_dtype: str) -> Verdict:
    return KERNELS[0].check(SiteSpec("rope_kv_write", "s", dtype, "avx2", {"kv_dtype": kv_dtype}))


def test_other_dtypes_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("float32", "float32").ok
    assert "not bfloat16 as bfloat16" in verdict("bfloat16", "bfloat16").reason
    assert "not float32 as fp8_e4m3" in verdict("float32", "fp8_e4m3").reason
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("absent.so"))
    assert "absent.so is not there" in verdict("float32", "float32").reason
