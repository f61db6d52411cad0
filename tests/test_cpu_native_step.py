"""The small native ops of a step against their references: norms, gates, embeddings, inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from whole_calls import whole

from hotplug.core.ops import dense as dense_ops
from hotplug.core.ops import inputs as inputs_ops
from hotplug.core.ops import norm as norm_ops
from hotplug.core.ops import packed_linear as packed_ops
from hotplug.core.ops.packed_linear import GROUP_BYTES
from hotplug.core.ops.registry import Fact, SiteSpec, Verdict
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.platforms.cpu.native import dense, inputs, library, norm, packed
from hotplug.platforms.cpu.native.dense import embed, silu_mul
from hotplug.platforms.cpu.native.packed import linear_packed, linear_packed_silu_mul
from hotplug.vendor import PlatformError

prepare_inputs = whole("prepare_inputs", inputs.prepare_inputs)
prepare_step = whole("prepare_step", inputs.prepare_step)
rms_norm = whole("rms_norm", norm.rms_norm)
add_rms_norm = whole("add_rms_norm", norm.add_rms_norm)

pytestmark = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))
ISAS = [] if library.refusal() else library.load().instruction_sets
FEW = settings(max_examples=150, deadline=None, derandomize=True)
isas = st.sampled_from(ISAS or [""])
# What ends within, at and behind a vector, and enough rows to share among threads.
widths = st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33, 64, 130, 576])
counts = st.sampled_from([0, 1, 2, 5, 70])


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    library.load().use(ISAS[0])


def rows_of(rows: int, width: int, flip: bool, rng: torch.Generator) -> Tensor:
    """[rows, width] as columns of a wider tensor, or with its columns apart from each other."""
    if flip:
        return torch.randn((width, rows), generator=rng).T
    return torch.randn((rows, width + 3), generator=rng)[:, :width]


# --- norms and gates ------------------------------------------------------------------------------


@FEW
@given(isa=isas, rows=counts, width=widths, flip=st.booleans(), eps=st.sampled_from([1e-6, 0.5]))
def test_norms_equal_their_references(isa: str, rows: int, width: int, flip: bool, eps: float) -> None:
    library.load().use(isa)
    rng = torch.Generator().manual_seed(width)
    x, residual = rows_of(rows, width, flip, rng), rows_of(rows, width, False, rng)
    weight = torch.randn(width, generator=rng)
    assert_close(rms_norm(x, weight, eps), norm_ops.rms_norm(x, weight, eps), rtol=2e-6, atol=1e-6)
    found, total = add_rms_norm(x, residual, weight, eps)
    expected, expected_total = norm_ops.add_rms_norm(x, residual, weight, eps)
    assert_close(found, expected, rtol=2e-6, atol=1e-6)
    assert torch.equal(total, expected_total)


def test_heads_are_normalized_where_they_lie() -> None:
    heads = torch.randn(5, 4, 24)[:, 1:3]
    weight = torch.randn(24)
    assert_close(rms_norm(heads, weight, 1e-5), norm_ops.rms_norm(heads, weight, 1e-5))


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_of_zeros_stays_zero_and_nan_stays_in_its_row(isa: str) -> None:
    library.load().use(isa)
    x = torch.ones(3, 20)
    x[0], x[1, 18] = 0, torch.nan
    found = rms_norm(x, torch.ones(20), 1e-5)
    assert not found[0].any()
    assert found[1].isnan().all()
    assert_close(found[2], torch.ones(20))


@FEW
@given(isa=isas, rows=counts, width=widths, flip=st.booleans(), spread=st.sampled_from([1.0, 60.0]))
def test_silu_mul_equals_its_reference(isa: str, rows: int, width: int, flip: bool, spread: float) -> None:
    library.load().use(isa)
    rng = torch.Generator().manual_seed(width)
    gate_up = rows_of(rows, 2 * width, flip, rng) * spread
    assert_close(silu_mul(gate_up), dense_ops.silu_mul(gate_up), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_silu_of_extremes(isa: str) -> None:
    library.load().use(isa)
    gate = torch.tensor([[1e38, -1e38, 0.0, -90.0, 90.0, float("inf"), float("nan")]])
    found = silu_mul(torch.cat((gate, torch.ones_like(gate)), 1))[0]
    assert found[0] == 1e38
    assert abs(found[1]) < 2
    assert found[2] == 0
    assert abs(found[3]) < 1e-30
    assert found[4] == 90
    assert found[5] == torch.inf
    assert found[6].isnan()


# --- tables ---------------------------------------------------------------------------------------


@FEW
@given(
    count=st.sampled_from([0, 1, 40]), groups=st.sampled_from([1, 2, 18]), scheme=st.sampled_from(sorted(GROUP_BYTES)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_of_tables_are_the_same_bits(count: int, groups: int, scheme: str, seed: int) -> None:
    rng, hidden = torch.Generator().manual_seed(seed), 32 * groups
    table, ids = torch.randn((37, hidden), generator=rng), torch.randint(0, 37, (count,), generator=rng)
    assert torch.equal(embed(ids, table), table[ids])
    (data,) = PackedScheme(scheme).quantize(table)
    data[3, :2] = torch.tensor([1, 0], dtype=torch.uint8)  # a subnormal scale
    ids[: count // 2] = 3
    embed_packed = whole("embed_packed", packed.embed_packed, scheme=scheme)
    assert torch.equal(embed_packed(ids, data, hidden), packed_ops.embed_packed(ids, data, hidden))


@pytest.mark.parametrize("token", [-1, 5])
def test_tokens_that_there_are_none_of_are_refused(token: int) -> None:
    with pytest.raises(PlatformError, match="refuses the arguments"):
        embed(torch.tensor([0, token]), torch.zeros(5, 8))


def test_narrow_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        embed(torch.tensor([0], dtype=torch.int32), torch.zeros(5, 8))


@FEW
@given(
    isa=isas, scheme=st.sampled_from(sorted(GROUP_BYTES)), rows=st.sampled_from([0, 1, 3, 40]),
    groups=st.integers(1, 4), tiles=st.integers(1, 3), bias=st.booleans(), flip=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_gated_product_is_the_product_and_the_gate(
    isa: str, scheme: str, rows: int, groups: int, tiles: int, bias: bool, flip: bool, seed: int
) -> None:
    library.load().use(isa)
    rng, width = torch.Generator().manual_seed(seed), 16 * tiles
    x = rows_of(rows, 32 * groups, flip, rng)
    (data,) = PackedScheme(scheme).quantize(torch.randn((2 * width, 32 * groups), generator=rng))
    offset = torch.randn(2 * width, generator=rng) if bias else None
    found = linear_packed_silu_mul(x, data, offset)
    assert_close(found, silu_mul(linear_packed(x, data, offset)), rtol=1e-5, atol=1e-5)
    expected = packed_ops.linear_packed_silu_mul(x, data, offset)
    assert (found - expected).norm() <= 0.08 * expected.norm()  # x in eight bits


# --- inputs ---------------------------------------------------------------------------------------


def step(lens: list[tuple[int, int]], block: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Arguments of `prepare_inputs` but for the block size, of requests with (new tokens, tokens before them)."""
    rng = torch.Generator().manual_seed(seed)
    batch = len(lens) + 2
    rows = torch.randperm(batch, generator=rng)[: len(lens)]
    starts = torch.tensor([before for _, before in lens], dtype=torch.int64)
    query_start = torch.tensor([0, *(new for new, _ in lens)]).cumsum(0)
    token_ids = torch.randint(0, 100, (int(query_start[-1]),), generator=rng)
    token_ids[::3] = -1
    widest = max((-(-(new + before) // block) for new, before in lens), default=1)
    tables = torch.randint(1, 99, (batch, widest + 1), generator=rng)[:, :widest]
    return token_ids, rows, query_start, starts, torch.randint(0, 100, (batch,), generator=rng), tables


requests = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), max_size=6)


@FEW
@given(lens=requests, block=st.sampled_from([1, 3, 16]), seed=st.integers(0, 99), blocks=st.integers(0, 9))
def test_inputs_are_prepared_as_the_reference_does(
    lens: list[tuple[int, int]], block: int, seed: int, blocks: int
) -> None:
    given_ = step(lens, block, seed)
    for found, expected in zip(prepare_inputs(*given_, block), inputs_ops.prepare_inputs(*given_, block), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(
        prepare_step(*given_, block, blocks), inputs_ops.prepare_step(*given_, block, blocks), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("which", "at", "value"),
    [(1, 0, 5), (1, 1, -1), (3, 0, 30), (3, 1, -1), (2, 2, 9), (2, 1, 9)],
    ids=["row", "negative row", "block", "negative position", "too many tokens", "order"],
)  # fmt: skip
def test_steps_that_leave_their_tensors_are_refused(which: int, at: int, value: int) -> None:
    given_ = step([(2, 3), (1, 4), (3, 0)], 4)
    given_[which][at] = value
    with pytest.raises(PlatformError, match="refuses the arguments"):
        prepare_step(*given_, 4, 2)


def test_narrow_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        prepare_step(*(x.to(torch.int32) for x in step([(2, 3)], 4)), 4, 1)


# --- what they refuse -----------------------------------------------------------------------------


def verdict(op: str, dtype: str = "float32", **facts: Fact) -> Verdict:
    kernels = (*norm.KERNELS, *dense.KERNELS, *inputs.KERNELS, *packed.KERNELS)
    return next(k for k in kernels if k.op == op).check(SiteSpec(op, "s", dtype, "avx2", facts))


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "silu_mul", "embed"])
def test_other_dtypes_are_refused_by_name(op: str) -> None:
    assert verdict(op).ok
    assert "not bfloat16" in verdict(op, "bfloat16").reason


def test_odd_widths_and_formats_are_refused_by_name() -> None:
    assert verdict("linear_packed_silu_mul", width=48, scheme="q4_1").ok
    assert "not 40" in verdict("linear_packed_silu_mul", width=40, scheme="q4_1").reason
    assert "no kernel for q6_k" in verdict("linear_packed_silu_mul", width=48, scheme="q6_k").reason
    assert "no kernel for q6_k" in verdict("embed_packed", scheme="q6_k").reason


@pytest.mark.parametrize("op", ["rms_norm", "silu_mul", "prepare_step", "embed"])
def test_without_the_library_they_say_so(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("absent.so"))
    assert "absent.so is not there" in verdict(op).reason
