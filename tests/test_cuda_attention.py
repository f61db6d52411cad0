"""The CUDA platform's attention kernels, interpreted on the CPU, against every query and head by itself in float64.

Cells past a sequence's end and blocks of nobody hold NaN, which must reach no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import Case, dense_attention, make_case
from torch import Tensor
from torch.testing import assert_close
from whole_calls import whole

from hotplug.core.ops.attention import AttentionInputs
from hotplug.core.ops.attention import attention as reference
from hotplug.core.ops.registry import SiteSpec
from hotplug.platforms.cuda.kernels import gathered_attention
from hotplug.platforms.cuda.kernels.attention import attention as paged_attention
from hotplug.platforms.cuda.kernels.decode_attention import DecodeConfig, counters, decode, split_count
from hotplug.platforms.cuda.kernels.gathered_attention import STATIC, Chunks
from hotplug.platforms.cuda.kernels.made import made
from hotplug.platforms.cuda.kernels.prefill_attention import PrefillConfig, prefill

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXED = [(1, 37), (1, 64), (1, 3), (20, 20), (9, 75), (2, 130)]
SMALL = PrefillConfig(rows=32, keys=16)
attention = whole("attention", made(paged_attention, *STATIC))


def gathered(attend: Any) -> Any:
    return whole("attention", made(partial(gathered_attention.attention, attend), *STATIC))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case_of(lens: list[tuple[int, int]], *, heads: int = 4, kv_heads: int = 1, dim: int = 16, block: int = 16,
            dtype: torch.dtype = torch.bfloat16) -> Case:  # fmt: skip
    """On the device, but for the dense keys and values."""
    case = make_case(lens, heads=heads, kv_heads=kv_heads, dim=dim, block=block, dtype=dtype,
                     index_dtype=torch.int32, unused=float("nan"))  # fmt: skip
    step = case.step
    moved = {name: getattr(step, name).to(DEVICE) for name in ("block_table", "query_start", "seq_lens")}
    q, k_cache, v_cache = (x.to(DEVICE) for x in (case.q, case.k_cache, case.v_cache))
    return replace(case, q=q, k_cache=k_cache, v_cache=v_cache, step=replace(step, **moved))


def check(actual: Tensor, case: Case, scale: float, window: int | None = None, sinks: Tensor | None = None,
          soft_cap: float | None = None) -> None:  # fmt: skip
    on_host = replace(case, q=case.q.cpu())
    expected = dense_attention(on_host, scale, window, None if sinks is None else sinks.cpu(), soft_cap)
    tolerance = 1e-5 if case.q.dtype is torch.float32 else 2e-2
    assert_close(actual.double().cpu(), expected, rtol=tolerance, atol=tolerance)


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
    logits = torch.tensor([-1.0, 0.5, 2.0, 4.0], device=DEVICE).bfloat16() if sinks else None
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
    sinks = torch.tensor([0.0, 1.0, 2.0, 3.0], device=DEVICE)
    for _ in range(2):  # the first leaves its counters as the second needs them
        decode(case.q, case.k_cache, case.v_cache, case.step, out, 0.3, window, sinks, None, config)
        check(out, case, 0.3, window, sinks)
    assert not counters(out.device).any()


CONFIGS = [SMALL, SMALL._replace(tma=True), SMALL._replace(keys=32, overlap=True), SMALL._replace(keys=64),
           SMALL._replace(tma=True, overlap=True)]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("window", [None, 1, 30])
def test_chunks_in_tiles_of_any_size_agree(config: PrefillConfig, window: int | None) -> None:
    case = case_of(MIXED[3:], heads=2, kv_heads=2, block=32)
    out = torch.empty_like(case.q)
    prefill(case.q, case.k_cache, case.v_cache, case.step, out, 0.3, window, None, None, config=config)
    check(out, case, 0.3, window)


def naive(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, scale: float, window: int | None,
          soft_cap: float | None) -> Tensor:  # fmt: skip
    """What a library does: chunk by chunk over the gathered keys."""
    out = torch.empty_like(q)
    starts = zip(chunks.query_start.tolist(), chunks.key_start.tolist(), strict=True)
    for (first, key), (last, end) in pairwise(starts):
        table = torch.zeros((1, 1), dtype=torch.int32)
        step = AttentionInputs(table, torch.tensor([0, last - first]), torch.tensor([end - key]), [last - first],
                               [end - key], 0, last - first, end - key)  # fmt: skip
        own = (x[key:end].unsqueeze(0).cpu() for x in (k, v))
        out[first:last] = reference(q[first:last].cpu(), *own, step, scale, window, "NHD", None, soft_cap)
    return out


@pytest.mark.parametrize("lens", [MIXED, MIXED[3:], [(1, 5), (20, 20), (40, 40)]])
def test_chunks_over_gathered_keys(lens: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "LEAST_QUERIES", 0)
    case, calls = case_of(lens), []

    def attend(*args: Any) -> Tensor:
        calls.append(args[3])
        return naive(*args)

    for _ in range(2):
        actual = gathered(attend)(case.q, case.k_cache, case.v_cache, case.step, 0.3, None, "NHD", None, 2.0)
        check(actual, case, 0.3, None, None, 2.0)
    assert calls[0] is calls[1]  # made once a step


@pytest.mark.parametrize("lens", [[(1, 5)], [(4, 300)], [(4, 4), (5, 900)]])
def test_steps_that_gathering_would_slow_go_to_the_kernel_over_blocks(lens: list[tuple[int, int]]) -> None:
    case = case_of(lens)

    def attend(*_: Any) -> Tensor:
        raise AssertionError("gathered")

    check(gathered(attend)(case.q, case.k_cache, case.v_cache, case.step, 0.3, None, "NHD"), case, 0.3)


def test_tiles_over_gathered_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "LEAST_QUERIES", 0)
    case = case_of(MIXED[3:])
    chunks = gathered_attention.chunks_of(case.step, 16, None)
    assert chunks is not None
    k, v = gathered_attention.gather(case.k_cache, case.v_cache, chunks)
    assert_close(k.cpu(), torch.cat(case.keys))
    assert_close(v.cpu(), torch.cat(case.values))
    out, config = torch.empty_like(case.q), SMALL._replace(tma=True)
    prefill(case.q, k, v, case.step, out, 0.3, None, None, None, chunks.key_start, config)
    check(out, case, 0.3)


SITE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 64, "layout": "NHD", "kv_dtype": "bfloat16",
        "window": None, "sinks": False, "soft_cap": None, "static": False}  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "refused"),
    [
        ("fa3", {"window": 7}), ("fa3", {"sinks": True}), ("fa3", {"kv_dtype": "float16", "dtype": "float16"}),
        ("flash", {"soft_cap": 1.0}), ("flash", {"head_dim": 100}), ("flash", {"layout": "HND"}),
        ("flash", {"kv_dtype": "float32", "dtype": "float32"}),
    ],
)  # fmt: skip
def test_libraries_refuse_what_they_lack(
    provider: str, refused: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = dict.fromkeys(("FLASHATTENTION_DISABLE_FP16", "FLASHATTENTION_DISABLE_LOCAL"), True)
    flags = {**lacks, "FLASHATTENTION_DISABLE_SOFTCAP": False}
    monkeypatch.setattr(gathered_attention, "fa3_package", lambda: (None, flags))
    for where, name in ((torch.cuda, "is_available"), (torch.backends.cuda, "is_flash_attention_available")):
        monkeypatch.setattr(where, name, lambda: True)
    impl = next(k for k in gathered_attention.KERNELS if k.provider == f"cuda.{provider}")
    assert impl.check(SiteSpec("attention", "s", "bfloat16", "sm_90", SITE)).ok
    facts = {**SITE, **refused}
    verdict = impl.check(SiteSpec("attention", "s", facts.pop("dtype", "bfloat16"), "sm_90", facts))
    assert not verdict.ok and verdict.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is here")
def test_pytorchs_own_library_is_refused_where_there_is_no_gpu() -> None:
    impl = next(k for k in gathered_attention.KERNELS if k.provider == "cuda.flash")
    assert "no GPU" in impl.check(SiteSpec("attention", "s", "bfloat16", "sm_90", SITE)).reason


def test_fa3_is_refused_where_its_package_is_not() -> None:
    if find_spec("fa3_fwd_interface") or find_spec("flash_attn_interface"):
        pytest.skip("it is here")
    impl = next(k for k in gathered_attention.KERNELS if k.provider == "cuda.fa3")
    assert "no package" in impl.check(SiteSpec("attention", "s", "bfloat16", "sm_90", SITE)).reason


def test_split_count_fills_the_device_and_no_more() -> None:
    config = DecodeConfig(keys=64, programs=2, least=2)
    assert split_count(8, 1 << 17, config, 132) == 33
    assert split_count(8, 512, config, 132) == 4  # parts of two tiles at least
    assert split_count(512, 1 << 17, config, 132) == 1
    assert split_count(1, 1 << 17, config, 132) == 64
