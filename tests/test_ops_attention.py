"""Paged attention and cache writes against dense attention, one query and head at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import dense_attention, make_case
from torch.testing import assert_close

from hotplug.core.ops.attention import AttentionInputs, attention, gather_kv, kv_write
from hotplug.core.ops.inputs import prepare_step

LAYOUTS = pytest.mark.parametrize("layout", ["NHD", "HND"])
STEPS = {
    "one-token": [(1, 1)],
    "one-decode": [(1, 13)],
    "decodes": [(1, 5), (1, 1), (1, 16)],
    "whole-prompt": [(9, 9)],
    "chunk": [(3, 11)],
    "mixed": [(1, 4), (1, 9), (5, 5), (2, 12), (8, 8)],
    "empty": [],
}


@LAYOUTS
@pytest.mark.parametrize("lens", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_attention_over_shuffled_blocks_equals_dense(
    lens: list[tuple[int, int]], window: int | None, layout: str
) -> None:
    case = make_case(lens, layout=layout)
    actual = attention(case.q, case.k_cache, case.v_cache, case.step, 0.3, window, layout)
    assert_close(actual.double(), dense_attention(case, 0.3, window), rtol=1e-5, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize(("soft_cap", "scale"), [(None, 0.3), (0.5, 0.3), (2.0, 3.0)])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_with_sinks_and_soft_cap(
    window: int | None, soft_cap: float | None, scale: float, layout: str
) -> None:
    case = make_case(STEPS["mixed"], layout=layout)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 4.0])
    for logits in (None, sinks):
        actual = attention(case.q, case.k_cache, case.v_cache, case.step, scale, window, layout, logits, soft_cap)
        assert_close(actual.double(), dense_attention(case, scale, window, logits, soft_cap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (6, 2), (5, 1)])
def test_attention_shares_key_heads_in_consecutive_groups(heads: int, kv_heads: int) -> None:
    case = make_case([(1, 6), (4, 7)], heads=heads, kv_heads=kv_heads)
    actual = attention(case.q, case.k_cache, case.v_cache, case.step, 0.5, None, "NHD")
    assert_close(actual.double(), dense_attention(case, 0.5, None), rtol=1e-5, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_attention_reads_caches_of_another_dtype(cache_dtype: torch.dtype, layout: str) -> None:
    case = make_case([(1, 9), (6, 6)], cache_dtype=cache_dtype, layout=layout)
    actual = attention(case.q, case.k_cache, case.v_cache, case.step, 0.3, 4, layout)
    assert actual.dtype == torch.float32
    assert_close(actual.double(), dense_attention(case, 0.3, 4), rtol=1e-5, atol=1e-5)


def test_attention_softmax_is_float32_for_bfloat16_queries() -> None:
    case = make_case([(1, 30), (7, 7)], dtype=torch.bfloat16)
    actual = attention(case.q, case.k_cache, case.v_cache, case.step, 0.3, None, "NHD")
    assert_close(actual.double(), dense_attention(case, 0.3, None), rtol=2**-7, atol=1e-3)


def test_attention_takes_non_contiguous_queries() -> None:
    case = make_case([(4, 9)])
    strided = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    actual = attention(strided, case.k_cache, case.v_cache, case.step, 0.3, None, "NHD")
    assert_close(actual.double(), dense_attention(case, 0.3, None), rtol=1e-5, atol=1e-5)


@LAYOUTS
def test_kv_write_puts_each_token_in_its_slot_and_touches_no_other(layout: str) -> None:
    shape = (4, 2, 3, 5) if layout == "NHD" else (4, 3, 2, 5)
    k_cache, v_cache = torch.zeros(shape), torch.zeros(shape)
    k, v = torch.randn(3, 3, 5), torch.randn(3, 3, 5)
    kv_write(k, v, k_cache, v_cache, torch.tensor([5, 0, 7]), layout)
    for cache, new in ((k_cache, k), (v_cache, v)):
        slots = (cache if layout == "NHD" else cache.transpose(1, 2)).reshape(8, 3, 5)
        assert_close(slots[[5, 0, 7]], new)
        assert not slots[[1, 2, 3, 4, 6]].any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_kv_write_saturates_where_the_cache_reaches_less_far(dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.zeros((1, 1, 1, 2), dtype=dtype), torch.zeros((1, 1, 1, 2), dtype=dtype)
    large = torch.tensor([[[1e6, -1e6]]])
    kv_write(large, large, k_cache, v_cache, torch.tensor([0]), "NHD")
    assert k_cache.float().flatten().tolist() == [torch.finfo(dtype).max, -torch.finfo(dtype).max]


@LAYOUTS
def test_gather_kv_returns_tokens_in_order_of_position(layout: str) -> None:
    case = make_case([(1, 3), (1, 10)], layout=layout)
    k, v = gather_kv(case.k_cache, case.v_cache, case.step.block_table[1], 10, layout)
    assert_close(k, case.keys[1])
    assert_close(v, case.values[1])


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_prepare_step_equals_a_loop(index_dtype: torch.dtype) -> None:
    def index(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=index_dtype)

    rows, start, counts, block = [3, 0, 2], [6, 0, 5], [1, 4, 3], 4
    tables = torch.tensor([[9, 8, 7], [0, 0, 0], [1, 2, 3], [4, 5, 6]], dtype=index_dtype)
    last = index(100, 101, 102, 103)
    host = [-1, 10, 11, 12, 13, 20, 21, 22]
    actual = prepare_step(index(*host), index(*rows), index(0, 1, 5, 8), index(*start), last, tables, block, 2)
    tokens, positions, slots = [], [], []
    for row, first, count in zip(rows, start, counts, strict=True):
        for position in range(first, first + count):
            token = host[len(tokens)]
            tokens.append(token if token >= 0 else int(last[row]))
            positions.append(position)
            slots.append(int(tables[row, position // block]) * block + position % block)
    seq_lens = [s + n for s, n in zip(start, counts, strict=True)]
    assert [t.tolist() for t in actual] == [tokens, positions, slots, seq_lens, tables[rows, :2].tolist()]
    assert {t.dtype for t in actual} == {index_dtype}


# --- what kernels prepare of a step ---------------------------------------------------------------


def lengths(step: AttentionInputs, factor: int = 1) -> list[int]:
    return [n * factor for n in step.seq_lens_host or ()]


def others(step: AttentionInputs, factor: int = 1) -> list[int]:
    return lengths(step, -factor)


def test_what_is_prepared_of_a_step_is_made_once_for_its_layers() -> None:
    step = make_case([(1, 5), (2, 4)]).step
    first = step.once(lengths, 2)
    assert first == [10, 8]
    assert step.once(lengths, 2) is first


def test_each_kernel_and_each_choice_of_arguments_has_its_own() -> None:
    step = make_case([(1, 5)]).step
    assert [step.once(lengths), step.once(lengths, 3), step.once(others)] == [[5], [15], [-5]]


def test_a_changed_step_has_nothing_prepared() -> None:
    step = make_case([(1, 5)]).step
    step.once(lengths)
    assert replace(step, seq_lens_host=[7]).once(lengths) == [7]
