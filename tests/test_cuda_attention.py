"""The CUDA platform's attention kernels, interpreted on the CPU, against every query and head by itself in float64.

Cells past a sequence's end and blocks of nobody hold NaN, which must reach no result.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_cases import Case, dense_attention, make_case
from torch import Tensor
from torch.testing import assert_close

from hotplug.platforms.cuda.kernels.attention import attention
from hotplug.platforms.cuda.kernels.decode_attention import DecodeConfig, counters, decode, split_count
from hotplug.platforms.cuda.kernels.gathered_attention import chunks_of, gather
from hotplug.platforms.cuda.kernels.prefill_attention import PrefillConfig, prefill

MIXED = [(1, 37), (1, 64), (1, 3), (20, 20), (9, 75), (2, 130)]
SMALL = PrefillConfig(rows=32, keys=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case_of(lens: list[tuple[int, int]], *, heads: int = 4, kv_heads: int = 1, dim: int = 16, block: int = 16,
            dtype: torch.dtype = torch.bfloat16) -> Case:  # fmt: skip
    return make_case(lens, heads=heads, kv_heads=kv_heads, dim=dim, block=block, dtype=dtype,
                     index_dtype=torch.int32, unused=float("nan"))  # fmt: skip


def check(actual: Tensor, case: Case, scale: float, window: int | None = None, sinks: Tensor | None = None,
          soft_cap: float | None = None) -> None:  # fmt: skip
    expected = dense_attention(case, scale, window, sinks, soft_cap)
    tolerance = 1e-5 if case.q.dtype is torch.float32 else 2e-2
    assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, torch.bfloat16), (80, torch.float16), (96, torch.bfloat16), (128, torch.float32), (256, torch.bfloat16)],
)
def test_decodes_and_chunks_of_every_head_dim(dim: int, dtype: torch.dtype) -> None:
    case = case_of([(1, 37), (1, 16), (5, 5), (3, 40)], dim=dim, dtype=dtype)
    check(attention(case.q, case.k_cache, case.v_cache, case.step, dim**-0.5, None, "NHD"), case, dim**-0.5)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("window", [None, 1, 19])
def test_mixed_steps_over_blocks_of_every_size(block: int, window: int | None) -> None:
    case = case_of(MIXED, block=block)
    check(attention(case.q, case.k_cache, case.v_cache, case.step, 0.3, window, "NHD"), case, 0.3, window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1), (3, 1)])
def test_groups_of_query_heads_share_keys(heads: int, kv_heads: int) -> None:
    case = case_of([(1, 70), (4, 20)], heads=heads, kv_heads=kv_heads)
    check(attention(case.q, case.k_cache, case.v_cache, case.step, 0.3, None, "NHD"), case, 0.3)


@pytest.mark.parametrize("window", [None, 19])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_sinks_and_soft_cap(sinks: bool, soft_cap: float | None, window: int | None) -> None:
    case = case_of([(1, 200), (1, 3), (20, 50)])
    logits = torch.tensor([-1.0, 0.5, 2.0, 4.0]).bfloat16() if sinks else None
    actual = attention(case.q, case.k_cache, case.v_cache, case.step, 0.5, window, "NHD", logits, soft_cap)
    check(actual, case, 0.5, window, logits, soft_cap)


@pytest.mark.parametrize(
    "config",
    [DecodeConfig(keys=16), DecodeConfig(keys=32, tma=True), DecodeConfig(keys=16, least=3), DecodeConfig(keys=64)],
)
@pytest.mark.parametrize("window", [None, 40])
def test_decodes_split_in_any_way_agree(config: DecodeConfig, window: int | None) -> None:
    case = case_of([(1, 333), (1, 64), (1, 1), (1, 97)], kv_heads=2, block=32)
    out = torch.empty_like(case.q)
    sinks = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for _ in range(2):  # the first leaves its counters as the second needs them
        decode(case.q, case.k_cache, case.v_cache, case.step, out, 0.3, window, sinks, None, config)
        check(out, case, 0.3, window, sinks)
    assert not counters(out.device).any()


@pytest.mark.parametrize("config", [SMALL, SMALL._replace(tma=True), SMALL._replace(keys=32), SMALL._replace(keys=64)])
@pytest.mark.parametrize("window", [None, 1, 30])
def test_chunks_in_tiles_of_any_size_agree(config: PrefillConfig, window: int | None) -> None:
    case = case_of(MIXED[3:], heads=2, kv_heads=2, block=32)
    out = torch.empty_like(case.q)
    prefill(case.q, case.k_cache, case.v_cache, case.step, out, 0.3, window, None, None, config=config)
    check(out, case, 0.3, window)


def test_chunks_over_gathered_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotplug.platforms.cuda.kernels.gathered_attention.LEAST_QUERIES", 0)
    case = case_of(MIXED)
    chunks = chunks_of(case.step, 16)
    assert chunks is not None
    k, v = gather(case.k_cache, case.v_cache, chunks)
    assert_close(k, torch.cat(case.keys[3:]))
    assert_close(v, torch.cat(case.values[3:]))
    out = torch.zeros_like(case.q)
    config = SMALL._replace(tma=True)
    prefill(case.q, k, v, case.step, out, 0.3, None, None, None, chunks.key_start, config)
    assert_close(out[3:].double(), dense_attention(case, 0.3, None)[3:], rtol=2e-2, atol=2e-2)


def test_split_count_fills_the_device_and_no_more() -> None:
    config = DecodeConfig(keys=64, programs=2, least=2)
    assert split_count(8, 1 << 17, config, 132) == 33
    assert split_count(8, 512, config, 132) == 4  # parts of two tiles at least
    assert split_count(512, 1 << 17, config, 132) == 1
    assert split_count(1, 1 << 17, config, 132) == 64
