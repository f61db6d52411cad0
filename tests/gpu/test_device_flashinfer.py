"""FlashInfer itself, where it is installed, against the op's reference. Its kernels are built at first: minutes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, make_case
from torch import Tensor
from torch.testing import assert_close

from hotplug.core.ops.attention import attention as reference
from hotplug.platforms.cuda.kernels import flashinfer_attention

pytestmark = pytest.mark.timeout(900)
MIXED = [(1, 37), (1, 640), (200, 200), (9, 750), (128, 1300)]
CHUNKS = [(330, 330), (5, 480), (160, 2000)]


@pytest.fixture(autouse=True)
def library() -> None:
    if flashinfer_attention.missing():
        pytest.skip(flashinfer_attention.missing())


def case_of(lens: list[tuple[int, int]], dim: int = 128, seed: int = 0) -> Case:
    case = make_case(lens, heads=8, kv_heads=2, dim=dim, block=64, dtype=torch.bfloat16, index_dtype=torch.int32,
                     unused=float("nan"), seed=seed)  # fmt: skip
    step = case.step
    moved = {name: getattr(step, name).cuda() for name in ("block_table", "query_start", "seq_lens")}
    q, k_cache, v_cache = (x.cuda() for x in (case.q, case.k_cache, case.v_cache))
    return replace(case, q=q, k_cache=k_cache, v_cache=v_cache, step=replace(step, **moved))


def run(case: Case, window: int | None = None, soft_cap: float | None = None) -> Tensor:
    return flashinfer_attention.attention(
        case.q, case.k_cache, case.v_cache, case.step, None, scale=0.1, window=window, soft_cap=soft_cap
    )


def check(out: Tensor, case: Case, window: int | None = None, soft_cap: float | None = None) -> None:
    expected = reference(case.q, case.k_cache, case.v_cache, case.step, 0.1, window, "NHD", None, soft_cap)
    assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("dim", "window", "soft_cap"),
    [(64, None, None), (128, None, None), (128, 300, None), (128, 1, None), (128, None, 20.0), (256, 300, 20.0)],
)
@torch.inference_mode()
def test_chunks_equal_the_reference(dim: int, window: int | None, soft_cap: float | None) -> None:
    for seed, lens in enumerate((MIXED, CHUNKS, [(7, 7)])):
        case = case_of(lens, dim, seed)
        check(run(case, window, soft_cap), case, window, soft_cap)


@torch.inference_mode()
def test_steps_may_be_launched_before_the_one_before_has_begun() -> None:
    cases = [case_of(lens, seed=i) for i, lens in enumerate((CHUNKS, MIXED, [(300, 300)], [(90, 900)] * 5) * 4)]
    check(run(cases[0]), cases[0])
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # the device waits while the host plans and launches
    outs = [run(case) for case in cases]
    for out, case in zip(outs, cases, strict=True):
        check(out, case)
