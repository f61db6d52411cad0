"""The prefill kernel for Hopper against the op's reference in float32; cells that nobody wrote hold NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, make_case
from torch.testing import assert_close

from hotplug.core.ops.attention import attention as reference

SCALE = 0.1
MIXED = [(1, 37), (1, 640), (200, 200), (9, 750), (128, 1300)]
CHUNKS = [(330, 330), (5, 480), (160, 2000)]
ONES = [(1, 1), (1, 64), (2, 2), (1, 65)]
MANY = [(257, 257), (128, 128), (129, 4000), (64, 129)] * 6


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is Hopper's")


def case_of(lens: list[tuple[int, int]], dim: int = 128, block: int = 64, dtype: torch.dtype = torch.bfloat16,
            group: int = 4, seed: int = 0) -> Case:  # fmt: skip
    """A case on the device, whose queries are part of a wider product."""
    case = make_case(lens, heads=2 * group, kv_heads=2, dim=dim, block=block, dtype=dtype, index_dtype=torch.int32,
                     unused=float("nan"), seed=seed)  # fmt: skip
    step = case.step
    moved = {name: getattr(step, name).cuda() for name in ("block_table", "query_start", "seq_lens")}
    wide = torch.full((len(case.q), (2 * group + 4) * dim), float("nan"), dtype=dtype, device="cuda")
    wide[:, : 2 * group * dim] = case.q.flatten(1).cuda()
    q = wide[:, : 2 * group * dim].unflatten(1, (2 * group, dim))
    return replace(case, q=q, k_cache=case.k_cache.cuda(), v_cache=case.v_cache.cuda(), step=replace(step, **moved))


def expected(case: Case) -> torch.Tensor:
    q, k_cache, v_cache = (x.float() for x in (case.q, case.k_cache, case.v_cache))
    return reference(q, k_cache, v_cache, case.step, scale=SCALE, window=None, layout="NHD")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "block", "group"), [(128, 64, 4), (64, 64, 1), (128, 128, 1), (64, 192, 4)])
@torch.inference_mode()
def test_steps_equal_the_reference_each_time(dim: int, block: int, group: int, dtype: torch.dtype) -> None:
    from hotplug.platforms.cuda.kernels.prefill_hopper import attention

    for seed, lens in enumerate((MIXED, CHUNKS, ONES, MANY)):
        case = case_of(lens, dim, block, dtype, group, seed)
        static = {"scale": SCALE, "window": None, "soft_cap": None}
        got = [attention(case.q, case.k_cache, case.v_cache, case.step, None, **static) for _ in range(3)]
        assert_close(got[0].float(), expected(case), rtol=2e-2, atol=2e-2)
        assert all(torch.equal(got[0], other) for other in got)


@pytest.mark.parametrize("config", [{}, {"keys": 64, "stages": 4}, {"keys": 64, "stages": 3}])
@torch.inference_mode()
def test_every_configuration_gives_the_same_and_writes_nothing_else(config: dict[str, int]) -> None:
    from hotplug.platforms.cuda.kernels.prefill_hopper import HopperConfig, prefill

    for lens in (MIXED, CHUNKS, MANY):
        case = case_of(lens)
        decodes = case.step.num_decodes
        want = expected(case)
        got = []
        for _ in range(3):
            out = torch.full_like(want, 7.0, dtype=case.q.dtype)
            prefill(case.q, case.k_cache, case.v_cache, case.step, out, SCALE, HopperConfig(**config))
            got.append(out)
        assert_close(got[0][decodes:].float(), want[decodes:], rtol=2e-2, atol=2e-2)
        assert bool((got[0][:decodes] == 7.0).all())
        assert all(torch.equal(got[0], other) for other in got)
