"""Native paged attention against the op's reference, over generated steps; unused cells of the caches hold NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, dense_attention, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from whole_calls import whole

from hotplug.core.ops import attention as reference
from hotplug.core.ops.registry import SiteSpec, Verdict
from hotplug.platforms.cpu.native import attention as native
from hotplug.platforms.cpu.native import library
from hotplug.platforms.cpu.native.attention import KERNELS
from hotplug.vendor import PlatformError

BUILT = library.refusal() is None
ISAS = [name for name in library.load().instruction_sets if name != library.BASELINE] if BUILT else []
NAN = float("nan")
MANY = settings(max_examples=250, deadline=None, derandomize=True)
attention = whole("attention", native.attention)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

pytestmark = pytest.mark.skipif(not BUILT, reason=str(library.refusal()))


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if BUILT:
        library.load().use(library.load().instruction_sets[0])
        library.load().set_threads(2)


def on(isa: str, threads: int) -> None:
    library.load().use(isa)
    if library.load().threads != threads:
        library.load().set_threads(threads)


def static(case: Case, padding: int = 0) -> Case:
    """The step with no length on the host, and `padding` tokens behind its requests."""
    q = torch.cat((case.q, torch.full((padding, *case.q.shape[1:]), 0.5)))
    longest = 1 if case.step.max_query_len <= 1 and not padding else len(q)
    step = replace(case.step, query_lens_host=None, seq_lens_host=None, max_query_len=longest)
    return replace(case, q=q, step=step)


decode = st.integers(1, 150).map(lambda seq: (1, seq))
chunk = st.integers(2, 150).flatmap(lambda seq: st.integers(2, seq).map(lambda query: (query, seq)))
steps = st.tuples(st.lists(decode, max_size=4), st.lists(chunk, max_size=3)).map(lambda s: s[0] + s[1])


@MANY
@given(
    lens=steps, kv_heads=st.integers(1, 3), group=st.integers(1, 10),
    dim=st.sampled_from([8, 16, 24, 32, 64, 80, 96, 128, 256]),
    block=st.sampled_from([1, 2, 5, 16, 32, 64]), window=st.none() | st.integers(1, 170),
    layout=st.sampled_from(["NHD", "HND"]), cache=st.sampled_from([None, None, torch.bfloat16, torch.float16]),
    sinks=st.booleans(), soft_cap=st.none() | st.just(3.0), isa=st.sampled_from(ISAS or [""]),
    threads=st.integers(1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_step_equals_the_reference(
    lens: list[tuple[int, int]], kv_heads: int, group: int, dim: int, block: int, window: int | None, layout: str,
    cache: torch.dtype | None, sinks: bool, soft_cap: float | None, isa: str, threads: int, seed: int,
) -> None:  # fmt: skip
    on(isa, threads)
    heads = kv_heads * group
    case = make_case(
        lens, heads=heads, kv_heads=kv_heads, dim=dim, block=block, layout=layout, cache_dtype=cache, seed=seed,
        unused=NAN,
    )  # fmt: skip
    logits = torch.randn(heads, generator=torch.Generator().manual_seed(seed)) if sinks else None
    arguments = (case.k_cache, case.v_cache, case.step, dim**-0.5, window, layout, logits, soft_cap)
    expected = reference.attention(case.q, *arguments)
    assert_close(attention(case.q, *arguments), expected, **CLOSE)
    wide = torch.full((len(case.q), heads + 2, 2 * dim), NAN)
    wide[:, 1:-1, :dim] = case.q
    assert_close(attention(wide[:, 1:-1, :dim], *arguments), expected, **CLOSE)
    turned = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(attention(turned, *arguments), expected, **CLOSE)


@MANY
@given(
    lens=steps.filter(bool), padding=st.integers(0, 3), window=st.none() | st.integers(1, 170),
    block=st.sampled_from([1, 16]), isa=st.sampled_from(ISAS or [""]), seed=st.integers(0, 99),
)  # fmt: skip
def test_steps_of_static_shape_are_read_from_their_tensors(
    lens: list[tuple[int, int]], padding: int, window: int | None, block: int, isa: str, seed: int
) -> None:
    on(isa, 2)
    case = make_case(lens, block=block, dim=16, seed=seed, unused=NAN)
    expected = reference.attention(case.q, case.k_cache, case.v_cache, case.step, 0.25, window, "NHD")
    fixed = static(case, padding)
    found = attention(fixed.q, case.k_cache, case.v_cache, fixed.step, 0.25, window, "NHD")
    assert_close(found[: len(expected)], expected, **CLOSE)
    assert torch.equal(found[len(expected) :], torch.zeros(padding, 4, 16))


def test_a_request_that_has_nothing_yet_gives_zero() -> None:
    case = static(make_case([(1, 5), (1, 1)], dim=16, unused=NAN))
    case.step.seq_lens[1] = 0
    found = attention(case.q, case.k_cache, case.v_cache, case.step, 0.25, None, "NHD")
    assert torch.equal(found[1], torch.zeros(4, 16))
    assert found[0].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lens", [[(1, 3000)], [(1, 700), (1, 2)], [(7, 2000)], [(300, 900)], [(1, 40), (130, 130)]])
@pytest.mark.parametrize("window", [None, 500])
def test_long_contexts_equal_float64(isa: str, threads: int, lens: list[tuple[int, int]], window: int | None) -> None:
    """Long enough that the keys of a step with few rows are split among threads."""
    on(isa, threads)
    case = make_case(lens, heads=9, kv_heads=3, dim=64, block=16, unused=NAN)
    expected = dense_attention(case, 0.125, window)
    found = attention(case.q, case.k_cache, case.v_cache, case.step, 0.125, window, "NHD")
    assert_close(found.double(), expected, rtol=1e-5, atol=2e-5 if isa == "amx" else 2e-6)  # factors of 17 bits there


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [100, 200])
def test_more_heads_of_a_group_than_are_taken_at_once(isa: str, heads: int) -> None:
    on(isa, 2)
    case = make_case([(1, 9), (3, 40)], heads=heads, kv_heads=1, dim=16, unused=NAN)
    arguments = (case.k_cache, case.v_cache, case.step, 0.25, None, "NHD")
    assert_close(attention(case.q, *arguments), reference.attention(case.q, *arguments), **CLOSE)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 20])
def test_scores_far_apart_neither_overflow_nor_vanish(isa: str, rows: int) -> None:
    on(isa, 2)
    case = make_case([(rows, 600)], dim=16, unused=NAN)
    for scale, tolerance in ((1e-3, 1e-5), (30.0, 1e-3), (1e4, 0.1)):  # a score's own rounding grows with it
        arguments = (case.k_cache, case.v_cache, case.step, scale, None, "NHD")
        assert_close(attention(case.q, *arguments), reference.attention(case.q, *arguments), rtol=0, atol=tolerance)


@pytest.mark.parametrize("isa", ISAS)
def test_a_chunk_of_scores_far_apart(isa: str) -> None:
    """Of as many rows and dims as AMX takes: the rounding of a score is 2^-17 of what it sums there."""
    on(isa, 2)
    case = make_case([(200, 600)], dim=64, unused=NAN)
    for scale, tolerance in ((1e-3, 1e-5), (3.0, 2e-4), (30.0, 1e-3)):
        arguments = (case.k_cache, case.v_cache, case.step, scale, None, "NHD")
        close = tolerance * 16 if isa == "amx" else tolerance
        assert_close(attention(case.q, *arguments), reference.attention(case.q, *arguments), rtol=0, atol=close)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lens", [[(1, 300)], [(40, 300)]])
@pytest.mark.parametrize("position", [0, 63, 299])
@pytest.mark.parametrize(("dim", "value"), [(16, NAN), (64, NAN), (64, float("inf"))])
def test_nan_of_a_key_in_use_is_not_hidden(
    isa: str, lens: list[tuple[int, int]], position: int, dim: int, value: float
) -> None:
    on(isa, 2)
    case = make_case(lens, dim=dim, block=4)
    block = case.step.block_table[0, position // 4]
    case.k_cache[block, position % 4] = value
    found = attention(case.q, case.k_cache, case.v_cache, case.step, 0.25, None, "NHD")
    assert found[-1].isnan().all()


def outside(case: Case, change: str) -> Case:
    """The case with one thing of its step out of bounds."""
    step = case.step
    if change == "block":
        step.block_table[0, 0] = case.k_cache.shape[0]
    elif change == "negative block":
        step.block_table[0, 0] = -1
    elif change == "length":
        step.seq_lens[0] = 1000
    elif change == "tokens":
        step.query_start[-1] = 1000
    else:
        step.query_start[1] = 1000
    return case


@pytest.mark.parametrize("change", ["block", "negative block", "length", "tokens", "order"])
def test_a_step_that_leaves_its_tensors_is_refused(change: str) -> None:
    case = outside(make_case([(1, 9), (3, 3)], dim=16), change)
    with pytest.raises(PlatformError, match="refuses the arguments"):
        attention(case.q, case.k_cache, case.v_cache, case.step, 0.25, None, "NHD")


def test_narrow_indices_are_refused() -> None:
    case = make_case([(1, 9)], dim=16, index_dtype=torch.int32)
    with pytest.raises(ValueError, match="int64"):
        attention(case.q, case.k_cache, case.v_cache, case.step, 0.25, None, "NHD")


def verdict(dtype: str = "float32", **facts: object) -> Verdict:
    every = {"head_dim": 64, "kv_dtype": "float32", "layout": "NHD", "static": False, "sinks": False, "soft_cap": None}
    return KERNELS[0].check(SiteSpec("attention", "s", dtype, "avx2", {**every, **facts}))


def test_what_it_does_not_serve_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict().ok
    assert verdict(static=True, sinks=True, soft_cap=2.0, layout="HND", kv_dtype="bfloat16").ok
    assert "not bfloat16" in verdict("bfloat16").reason
    assert "not fp8_e4m3" in verdict(kv_dtype="fp8_e4m3").reason
    assert "not 20" in verdict(head_dim=20).reason
    assert "not 264" in verdict(head_dim=264).reason
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("absent.so"))
    assert "absent.so is not there" in verdict().reason
