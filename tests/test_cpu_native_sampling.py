"""Native argmax and draws against the references: the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hotplug.core.ops import sampling as reference
from hotplug.core.ops.registry import SiteSpec
from hotplug.core.request import NO_TOKEN
from hotplug.platforms.cpu.native import library
from hotplug.platforms.cpu.native.sampling import KERNELS, argmax, sample, sample_rows
from hotplug.vendor import PlatformError

pytestmark = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))
ISAS = [] if library.refusal() else library.load().instruction_sets
each_isa = pytest.mark.parametrize("isa", ISAS)
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    library.load().use(ISAS[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    isa=st.sampled_from(ISAS or [""]), rows=st.integers(0, 4),
    vocab=st.sampled_from([1, 2, 15, 33, 511, 512, 513, 1500]), whole=st.booleans(), flip=st.booleans(),
    strange=st.lists(st.sampled_from([NAN, INF, -INF]), max_size=3),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_the_first_of_the_best(
    isa: str, rows: int, vocab: int, whole: bool, flip: bool, strange: list[float], seed: int
) -> None:
    library.load().use(isa)
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn((vocab, rows), generator=rng).T if flip else torch.randn((rows, vocab), generator=rng)
    logits = logits.round() if whole else logits
    for value in strange if rows else []:
        logits[0, int(torch.randint(0, vocab, (1,), generator=rng))] = value
    assert torch.equal(argmax(logits), reference.argmax(logits))


@each_isa
def test_a_row_of_nothing_but_the_lowest_has_no_token(isa: str) -> None:
    library.load().use(isa)
    assert argmax(torch.full((2, 700), -INF)).tolist() == [NO_TOKEN, NO_TOKEN]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    isa=st.sampled_from(ISAS or [""]), vocab=st.sampled_from([1, 2, 17, 256, 257, 2000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 8.0]), whole=st.booleans(), filters=st.integers(0, 7),
    seed=st.integers(0, 9999),
)  # fmt: skip
def test_draws_are_the_references(isa: str, vocab: int, spread: float, whole: bool, filters: int, seed: int) -> None:
    """Filters of all strengths, among them neutral ones and k around every bound; ties where scores are whole."""
    library.load().use(isa)
    rng, rows = torch.Generator().manual_seed(seed), 9
    logits = torch.randn((rows, vocab), generator=rng) * spread
    logits = logits.round() if whole else logits
    some = torch.rand((4, rows), generator=rng)
    top_k = (some[1] * (vocab + 2)).to(torch.int64)
    top_k[:3] = torch.tensor([0, 1, max(1, vocab // 32)])
    top_p, min_p = some[2].clone(), some[3] * 0.3
    top_p[3:5], min_p[::2] = torch.tensor([0.0, 1.0]), 0.0
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=rng)
    counters = torch.randint(0, 10000, (rows,), generator=rng)
    chosen = [x if filters >> i & 1 else None for i, x in enumerate((top_k, top_p, min_p))]
    call = (logits, some[0] * 2 + 1e-3, *chosen, seeds, counters)
    assert torch.equal(sample(*call), reference.sample(*call))


def rows_case(rows: int, vocab: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Arguments of `sample_rows`: parameters of a batch larger than the step, every third row of it greedy."""
    rng, batch = torch.Generator().manual_seed(seed), rows + 3
    logits = torch.randn((rows, 2 * vocab), generator=rng)[:, :vocab] * 3
    some = torch.rand((4, batch), generator=rng)
    temperature, top_k = some[0] + 0.1, (some[1] * 50).to(torch.int64)
    top_p, min_p = some[2], some[3] * 0.2
    temperature[::3], top_k[1::4], top_p[2::3], min_p[::2] = 0.0, 0, 1.0, 0.0
    seeds = torch.randint(-(2**40), 2**40, (batch,), generator=rng)
    order = torch.randperm(batch, generator=rng)[:rows]
    return logits, order, temperature, top_k, top_p, min_p, seeds, torch.randint(0, 1000, (rows,), generator=rng)


@each_isa
@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 49152), (13, 49152), (40, 300)])
def test_rows_of_a_batch_draw_with_their_own_parameters(isa: str, rows: int, vocab: int) -> None:
    library.load().use(isa)
    for seed in range(4):
        call = rows_case(rows, vocab, seed)
        assert torch.equal(sample_rows(*call), reference.sample_rows(*call))


@each_isa
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_scores_that_are_not_finite(isa: str, value: float) -> None:
    library.load().use(isa)
    for everywhere in (False, True):
        logits, *call = rows_case(6, 40)
        if everywhere:
            logits[:] = value
        else:
            logits[:, 7] = value
        assert torch.equal(sample_rows(logits, *call), reference.sample_rows(logits, *call))


@each_isa
def test_a_temperature_near_zero_takes_the_best(isa: str) -> None:
    library.load().use(isa)
    logits, seeds = torch.randn(5, 100), torch.arange(5)
    drawn = sample(logits, torch.full((5,), 1e-38), None, None, None, seeds, seeds)
    assert torch.equal(drawn, logits.argmax(-1))


@each_isa
def test_frequencies_are_those_of_the_shares(isa: str) -> None:
    library.load().use(isa)
    shares, count = torch.tensor([0.5, 0.25, 0.15, 0.1]), 20000
    zeros = torch.zeros(count, dtype=torch.int64)
    drawn = sample(shares.log().expand(count, 4), torch.ones(count), None, None, None, zeros, torch.arange(count))
    assert (torch.bincount(drawn, minlength=4) / count - shares).abs().max() < 0.01


@pytest.mark.parametrize("row", [-1, 9])
def test_rows_that_there_are_none_of_are_refused(row: int) -> None:
    call = rows_case(6, 40)
    call[1][2] = row
    with pytest.raises(PlatformError, match="refuses the arguments"):
        sample_rows(*call)


@pytest.mark.parametrize(
    ("which", "message"), [(1, "int64"), (2, "float32"), (3, "int64"), (4, "float32"), (6, "int64")]
)
def test_other_dtypes_are_refused(which: int, message: str) -> None:
    call = list(rows_case(6, 40))
    call[which] = call[which].to(torch.int32)
    with pytest.raises(ValueError, match=message):
        sample_rows(*call)


def test_without_the_library_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("absent.so"))
    for kernel in KERNELS:
        spec = SiteSpec(kernel.op, "s", "float32", "avx2", {"vocab": 8})
        assert "absent.so is not there" in kernel.check(spec).reason
