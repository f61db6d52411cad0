"""Copying blocks: the op's reference and the CUDA platform's kernel, each against a loop over bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_target import DEVICE, target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hotplug.core.ops.block_copy import block_copy
from hotplug.core.ops.registry import Impl
from hotplug.platforms.cuda.kernels.block_copy import PIECE_BYTES
from hotplug.platforms.cuda.kernels.block_copy import block_copy as cuda_block_copy
from hotplug.plugins.conformance.check_ops import ops
from hotplug.plugins.conformance.report import Report

FEW = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
SHAPES = ((1,), (2,), (3, 2), (5, 3, 2), (4, 2, 8), (16, 3, 5))
"""Of a block: sizes that words of 1, 2, 4, 8 and 16 bytes divide."""

both = pytest.mark.parametrize("copy", [block_copy, cuda_block_copy], ids=["reference", "cuda"])


def caches(count: int, blocks: int, shape: tuple[int, ...], dtype: torch.dtype, *, apart: bool, seed: int) -> Tensor:
    """[blocks, count + 2, ...] of random bytes, of which the inner `count` are used; dense caches if not `apart`."""
    random = torch.Generator().manual_seed(seed)
    sizes = (blocks, count + 2, *shape) if apart else (count + 2, blocks, *shape)
    width = sizes[-1] * dtype.itemsize
    raw = torch.randint(-128, 128, (*sizes[:-1], width), generator=random, dtype=torch.int8).to(DEVICE)
    return raw.view(dtype) if apart else raw.view(dtype).transpose(0, 1)


def as_bytes(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.int8)


def inner(x: Tensor) -> list[Tensor]:
    return list(x.unbind(1)[1:-1])


pairs = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 5), min_size=n, max_size=n), st.permutations(range(8)).map(lambda ids: ids[:n])
    )
).map(lambda sides: list(zip(*sides, strict=True)))  # fmt: skip


@both
@FEW
@given(
    pairs=pairs, count=st.integers(1, 4), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES),
    apart=st.tuples(st.booleans(), st.booleans()), index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_blocks_arrive_bit_by_bit_and_nothing_else_changes(
    copy: Callable[..., None], pairs: list[tuple[int, int]], count: int, shape: tuple[int, ...], dtype: torch.dtype,
    apart: tuple[bool, bool], index: torch.dtype, seed: int,
) -> None:  # fmt: skip
    sources = caches(count, 6, shape, dtype, apart=apart[0], seed=seed)
    targets = caches(count, 8, shape, dtype, apart=apart[1], seed=seed + 1)
    before, expected = as_bytes(sources), as_bytes(targets)
    for (read, written), column in itertools.product(pairs, range(1, count + 1)):
        expected[written, column] = before[read, column]
    copy(inner(sources), inner(targets), torch.tensor(pairs, dtype=index, device=DEVICE))
    assert torch.equal(as_bytes(targets), expected)
    assert torch.equal(as_bytes(sources), before)


@both
def test_blocks_are_copied_within_one_cache(copy: Callable[..., None]) -> None:
    cache = torch.arange(24.0, device=DEVICE).view(6, 4)
    copy([cache], [cache], torch.tensor([[4, 0], [4, 1], [5, 3]], device=DEVICE))
    assert cache[:, 0].tolist() == [16, 16, 8, 20, 16, 20]


@both
def test_nothing_is_copied_for_no_pair_and_for_no_cache(copy: Callable[..., None]) -> None:
    cache = torch.arange(6.0, device=DEVICE).view(3, 2)
    copy([cache], [cache], torch.zeros((0, 2), dtype=torch.int32, device=DEVICE))
    copy([], [], torch.tensor([[1, 2]], device=DEVICE))
    assert cache.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@both
def test_pairs_may_be_columns_of_a_wider_tensor(copy: Callable[..., None]) -> None:
    source, copied = torch.arange(8.0, device=DEVICE).view(4, 2), torch.zeros((4, 2), device=DEVICE)
    copy([source], [copied], torch.tensor([[9, 3, 0, 9], [9, 1, 2, 9]], device=DEVICE)[:, 1:3])
    assert copied.tolist() == [[6, 7], [0, 0], [2, 3], [0, 0]]


@both
def test_a_block_larger_than_a_programs_piece(copy: Callable[..., None]) -> None:
    sources = torch.randn((3, 2, PIECE_BYTES // 4 * 2 + 12), device=DEVICE)
    targets = torch.zeros((2, 2, sources.shape[-1]), device=DEVICE)
    copy(list(sources.unbind(1)), list(targets.unbind(1)), torch.tensor([[2, 0], [0, 1]], device=DEVICE))
    assert torch.equal(targets, sources[[2, 0]])


def test_caches_at_odd_addresses_are_copied_in_narrower_words() -> None:
    """A cache that is not aligned, among others that are, narrows the words for all."""
    raw = torch.arange(2 * 4 * 32, dtype=torch.int16, device=DEVICE).view(2, 4, 32)
    odd = torch.arange(1000, 1000 + 4 * 32 + 1, dtype=torch.int16, device=DEVICE)[1:].view(4, 32)
    copied = torch.zeros((3, 4, 32), dtype=torch.int16, device=DEVICE)
    cuda_block_copy([raw[0], raw[1], odd], list(copied), torch.tensor([[3, 1]], device=DEVICE))
    assert torch.equal(copied[:, 1].cpu(), torch.stack((raw[0, 3], raw[1, 3], odd[3])).cpu())
    assert not copied[:, [0, 2, 3]].any()


# --- what the conformance kit makes of wrong kernels ----------------------------------------------


def backwards(sources: list[Tensor], targets: list[Tensor], pairs: Tensor) -> None:
    block_copy(sources, targets, pairs.flip(0).roll(1, 1))


def first_alone(sources: list[Tensor], targets: list[Tensor], pairs: Tensor) -> None:
    block_copy(sources[:1], targets[:1], pairs)


def one_too_many(sources: list[Tensor], targets: list[Tensor], pairs: Tensor) -> None:
    block_copy(sources, targets, pairs)
    for copied in targets:
        copied[-1] = 1


def taken_as_dense(sources: list[Tensor], targets: list[Tensor], pairs: Tensor) -> None:
    """Steps from block to block by a block's size."""
    dense = [s.as_strided(s.shape, torch.empty(s.shape).stride()) for s in sources]
    block_copy(dense, targets, pairs)


@pytest.mark.parametrize("wrong", [first_alone, one_too_many, taken_as_dense, backwards])
def test_conformance_finds_a_kernel_that_is_wrong(wrong: Any, tmp_path: Path) -> None:
    report = Report()
    ops(target(tmp_path, "float32", kernels=[Impl("block_copy", "acme", make=lambda _: wrong)]), report)
    assert any("block_copy -> acme" in failure for failure in report.failures)
