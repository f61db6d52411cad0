"""Triton's mixture-of-experts kernels against the references of their ops: interpreted, or on the GPU where one is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hotplug.core.ops import moe as reference
from hotplug.core.ops.registry import Bucket, Impl, SiteSpec
from hotplug.platforms.cuda.kernels import KERNELS, gpu
from hotplug.platforms.cuda.kernels.moe import (
    ALONE,
    FEW,
    Tiles,
    by_expert,
    down_tiles,
    few,
    fitting,
    gate_up_tiles,
    grouped,
    grouped_mm,
    moe_experts,
    most_blocks,
)
from hotplug.platforms.cuda.kernels.moe_route import FEW_TOKENS, WIDEST, moe_route

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ERRORS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
"""Of the norm of the difference to a float32 reference, as a share of the norm."""
SOME = settings(max_examples=8, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def poisoned() -> object:
    """What `torch.empty` gives holds NaN, or the largest integer, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def scores(tokens: int, hidden: int, count: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A state, as a slice, and a router whose products are exact in every dtype, ties included."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (tokens, 2 * hidden), generator=rng).to(DEVICE, dtype)[:, :hidden]
    return x, (torch.randint(-2, 3, (count, hidden), generator=rng) / 8).to(DEVICE, dtype)


def same_route(x: Tensor, weight: Tensor, top_k: int, renormalize: bool) -> None:
    weights, experts = moe_route(x, weight, top_k, renormalize)
    expected = reference.moe_route(x, weight, top_k, renormalize)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)
    assert torch.equal(experts, expected[1])
    torch.testing.assert_close(weights, expected[0], rtol=1e-5, atol=1e-7)


@SOME
@given(
    tokens=st.integers(0, FEW_TOKENS + 4), hidden=st.integers(1, 70), count=st.integers(1, 70), share=st.floats(0, 1),
    renormalize=st.booleans(), dtype=st.sampled_from(list(ERRORS)),
)  # fmt: skip
def test_route_equals_its_reference(
    tokens: int, hidden: int, count: int, share: float, renormalize: bool, dtype: torch.dtype
) -> None:
    same_route(*scores(tokens, hidden, count, dtype), max(1, min(int(share * count), 8)), renormalize)


@pytest.mark.parametrize(("tokens", "hidden", "count"), [(2, 2048, 128), (1, 4096, 128), (1, WIDEST + 1, 4)])
def test_route_of_real_sizes(tokens: int, hidden: int, count: int) -> None:
    same_route(*scores(tokens, hidden, count, torch.bfloat16), min(8, count), renormalize=True)


def test_route_takes_zero_for_minus_zero() -> None:
    x = torch.tensor([[1.0]], device=DEVICE)
    weight = torch.tensor([[-0.0], [0.0], [-0.0], [1.0]], device=DEVICE)
    same_route(x, weight, 4, renormalize=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 1])
def test_experts_of_a_token_that_is_not_finite_exist_and_differ(value: float, tokens: int) -> None:
    x, weight = scores(tokens, 8, 11, torch.float32)
    x = x.clone()
    x[0] = value
    _, experts = moe_route(x, weight, 6, renormalize=True)
    assert len(set(experts[0].tolist())) == 6 and int(experts.min()) >= 0 and int(experts.max()) < 11


# --- experts --------------------------------------------------------------------------------------

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def case(tokens: int, hidden: int, width: int, count: int, top_k: int, dtype: torch.dtype, seed: int = 0) -> Case:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn((tokens, 2 * hidden), generator=rng).to(DEVICE, dtype)[:, :hidden]
    weights, experts = torch.randn((tokens, count), generator=rng).softmax(-1).topk(top_k)
    gate_up = (torch.randn((count, 2 * width, hidden), generator=rng) * hidden**-0.5).to(DEVICE, dtype)
    down = (torch.randn((count, hidden, width), generator=rng) * width**-0.5).to(DEVICE, dtype)
    return x, weights.to(DEVICE), experts.to(DEVICE, torch.int32), gate_up, down


def close(actual: Tensor, call: Case) -> None:
    x, weights, experts, gate_up, down = call
    assert (actual.shape, actual.dtype) == (x.shape, x.dtype)
    expected = reference.moe_experts(x.float(), weights, experts, gate_up.float(), down.float())
    assert float((actual.float() - expected).norm()) <= ERRORS[x.dtype] * float(expected.norm())


def tiled(first: Tiles, second: Tiles) -> Callable[..., Tensor]:
    return lambda *call: grouped(*call, first, second)


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "chosen": moe_experts,
    "few": few,
    "few-8-rows": lambda *call: few(*call, rows=8, cols=64),
    "swapped": tiled(Tiles(16, 64, 64, 4, 3, swap=True), Tiles(16, 64, 32, 4, 3, swap=True)),
    "swapped-tma": tiled(Tiles(16, 64, 64, 4, 3, swap=True, tma=True), Tiles(16, 64, 32, 4, 3, swap=True, tma=True)),
    "straight-tma": tiled(Tiles(32, 64, 32, 4, 2, tma=True), Tiles(32, 128, 64, 4, 2, tma=True)),
    "straight": tiled(Tiles(32, 32, 32, 4, 2), Tiles(32, 64, 64, 4, 2)),
    "prefill": tiled(Tiles(128, 128, 64, 8, 4), Tiles(128, 256, 64, 8, 3)),
}
SHAPES = [(1, 64, 32, 8, 2), (3, 130, 33, 5, 5), (5, 33, 130, 3, 1), (9, 96, 48, 40, 4), (150, 64, 32, 2, 1)]


def experts_cases() -> Iterator[Any]:
    """Every variant and every dtype in the default suite; all of their products in the slow one."""
    for (i, variant), (j, shape), dtype in itertools.product(enumerate(VARIANTS), enumerate(SHAPES), ERRORS):
        # descriptors need rows of whole 16 bytes; each assignment of `few` is programs of its own
        shown = 4 if "tma" in variant else 2 if "few" in variant else 1 + i % 2
        default = (j == shown and dtype is torch.bfloat16) or (variant == "chosen" and j == 2)
        marks = () if default else pytest.mark.slow
        yield pytest.param(variant, shape, dtype, marks=marks, id=f"{variant}-{shape}-{dtype}")


@pytest.mark.parametrize(("variant", "shape", "dtype"), experts_cases())
def test_experts_equal_their_reference(variant: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, hidden, width, count, top_k = shape
    if variant.startswith("few") and tokens * top_k > FEW + 4:
        pytest.skip("many programs, each interpreted")
    call = case(tokens, hidden, width, count, top_k, dtype)
    close(VARIANTS[variant](*call), call)


@pytest.mark.parametrize("tokens", [FEW // 8, FEW // 8 + 1])
def test_experts_on_both_sides_of_few(tokens: int) -> None:
    call = case(tokens, 32, 16, 16, 8, torch.bfloat16)
    close(moe_experts(*call), call)


def test_experts_of_no_token() -> None:
    call = case(0, 64, 32, 8, 2, torch.float32)
    assert moe_experts(*call).shape == grouped_mm(*call).shape == (0, 64)


def test_all_tokens_at_one_expert() -> None:
    x, weights, experts, gate_up, down = case(50, 64, 32, 16, 1, torch.float32)
    call = (x, weights, torch.full_like(experts, 13), gate_up, down)
    close(moe_experts(*call), call)


def test_a_token_alone_gives_what_it_gives_among_others() -> None:
    """Where its row lies must not matter: not to the value, not to its sum."""
    x, weights, experts, gate_up, down = case(70, 64, 32, 4, 2, torch.bfloat16)
    tiles = Tiles(16, 32, 32, 4, 2), Tiles(16, 32, 32, 4, 2)
    together = grouped(x, weights, experts, gate_up, down, *tiles)
    back = grouped(x.flip(0), weights.flip(0), experts.flip(0), gate_up, down, *tiles).flip(0)
    assert torch.equal(together, back)


def test_grouped_mm_equals_the_reference() -> None:
    call = case(70, 64, 32, 5, 2, torch.bfloat16)
    close(grouped_mm(*call), call)


@SOME
@given(
    tokens=st.integers(1, 60), count=st.integers(1, 20), rows=st.sampled_from([1, 4, 16]), one=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_order_has_every_assignment_once_in_blocks_of_its_expert(
    tokens: int, count: int, rows: int, one: bool, seed: int
) -> None:
    check_order(torch.randint(0, 1 if one else count, (tokens, 2), generator=torch.Generator().manual_seed(seed)),
                count, rows)  # fmt: skip


def test_order_of_more_than_one_program_puts_in_order() -> None:
    check_order(torch.randint(0, 7, (ALONE // 2 + 100, 2)), 7, 16)


def check_order(experts: Tensor, count: int, rows: int) -> None:
    order = by_expert(experts.to(DEVICE, torch.int32), count, rows)
    flat = experts.flatten()
    assert order.counts.tolist() == torch.bincount(flat, minlength=count).tolist()
    blocks = most_blocks(flat.numel(), count, rows)
    assert len(order.block_rows) == blocks and len(order.rows) == blocks * rows
    found = []
    for block in range(blocks):
        filled = int(order.block_rows[block])
        mine = order.rows[block * rows : block * rows + filled].cpu()
        assert 0 <= filled <= rows
        assert (flat[mine.long()] == int(order.block_expert[block])).all() if filled else True
        found += mine.tolist()
    assert sorted(found) == list(range(flat.numel()))
    assert torch.equal(order.rows[order.position.long()].cpu(), torch.arange(flat.numel(), dtype=torch.int32))
    assert max((i for i, n in enumerate(order.block_rows.tolist()) if n), default=-1) + 1 == int(
        (order.block_rows > 0).sum()
    )


@pytest.mark.parametrize("size", [2, 4])
def test_both_products_have_blocks_of_the_same_rows(size: int) -> None:
    for assignments, count in itertools.product((1, 40, 512, 4096, 131072), (1, 8, 128)):
        first, second = gate_up_tiles(assignments, count, size), down_tiles(assignments, count, size)
        assert first.rows == second.rows
        for tiles, weights in ((first, 2), (second, 1)):
            tile = tiles.rows + weights * tiles.cols
            assert tiles.stages * tiles.depth * tile * size <= 227 * 1024
            assert min(tiles.rows, tiles.cols, tiles.depth) >= 16
            assert not tiles.swap or tiles.cols >= 64  # else the weights are no operand of wgmma


@pytest.mark.parametrize(("capability", "kib"), [((8, 0), 163), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227)])
@pytest.mark.parametrize("size", [2, 4])
def test_tiles_fit_the_shared_memory_of_a_device(
    capability: tuple[int, int], kib: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    for assignments in (40, 2048, 4096, 131072):
        chosen = gate_up_tiles(assignments, 128, size), down_tiles(assignments, 128, size)
        for tiles, weights in zip(chosen, (2, 1), strict=True):
            held = fitting(tiles, weights, size, torch.device("meta"))
            stage = held.depth * (held.rows + weights * held.cols) * size
            assert held.rows == tiles.rows and held.stages >= 1 and held.stages * stage < kib * 1024
            assert capability >= (9, 0) or held.rows * held.cols * weights <= 128 * 128
            assert capability < (9, 0) or held == tiles


def kernel(op: str, provider: str) -> Impl:
    return next(k for k in KERNELS if (k.op, k.provider) == (op, provider))


def verdict(op: str, provider: str, dtype: str = "bfloat16", **facts: int) -> tuple[bool, str]:
    whole = {"hidden": 64, "width": 32, "num_experts": 8, "top_k": 2, **facts}
    return tuple(kernel(op, provider).check(SiteSpec(op, "site", dtype, "sm_90", whole)))


def test_kernels_refuse_what_they_do_not_serve_with_the_reason() -> None:
    assert verdict("moe_route", "cuda.triton") == verdict("moe_experts", "cuda.triton") == (True, "")
    assert verdict("moe_route", "cuda.triton", num_experts=1025) == (False, "1025 experts are above 1024")
    assert verdict("moe_experts", "cuda.grouped_mm") == (True, "")
    assert "float16" in verdict("moe_experts", "cuda.grouped_mm", dtype="float16")[1]
    assert "33" in verdict("moe_experts", "cuda.grouped_mm", width=33)[1]


def test_grouped_mm_is_for_many_tokens() -> None:
    accepts = kernel("moe_experts", "cuda.grouped_mm").accepts
    assert accepts is not None and accepts(Bucket(4096, 4096)) and not accepts(Bucket(64, 1))
