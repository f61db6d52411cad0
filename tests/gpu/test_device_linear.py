"""The kernels for Hopper against float64: every way that few rows are dealt out, and tiles that stick out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

CASES = [  # rows of x, outputs, inputs, gated, bias, dtype of the result; rows, cols, stages, programs, warps, overlap
    (64, 6144, 4096, False, False, torch.bfloat16, (128, 64, 8, 132, 4, False)),
    (33, 1003, 1032, False, True, torch.bfloat16, (64, 64, 6, 132, 4, True)),
    (16, 4096, 4096, False, False, torch.float32, (64, 128, 8, 128, 4, True)),
    (5, 1000, 2048, False, True, torch.float32, (64, 256, 4, 264, 4, True)),
    (1, 2048, 8192, False, False, torch.bfloat16, (128, 64, 8, 132, 8, True)),
    (64, 14336, 4096, True, False, torch.bfloat16, (64, 64, 8, 112, 4, True)),
    (64, 1003, 1032, True, True, torch.bfloat16, (128, 64, 5, 132, 8, True)),
]
NAMES = ("rows", "cols", "stages", "programs", "warps", "overlap")


@pytest.mark.parametrize(("m", "n", "k", "gated", "biased", "dtype", "config"), CASES)
def test_equals_the_product_in_float64_each_time(
    m: int, n: int, k: int, gated: bool, biased: bool, dtype: torch.dtype, config: tuple[int, ...]
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is Hopper's")
    from hotplug.platforms.cuda.kernels.linear_hopper import stream

    torch.manual_seed(0)
    total = 2 * n if gated else n
    x = torch.randn((m, k), device="cuda").bfloat16()
    weight = torch.randn((total, k), device="cuda").bfloat16() / k**0.5
    bias = torch.randn(total, device="cuda").bfloat16() if biased else None
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if gated:
        want = F.silu(want[:, :n]) * want[:, n:]
    options = dict(zip(NAMES, config, strict=True))
    got = [stream(x, weight, bias, gated=gated, dtype=dtype, **options) for _ in range(3)]  # type: ignore[arg-type]
    assert got[0].dtype is dtype
    assert float((got[0].double() - want).norm() / want.norm()) < 1e-2
    assert all(torch.equal(got[0], other) for other in got)


@pytest.mark.parametrize(
    ("m", "n", "k", "biased", "group"),
    [
        (1, 128, 256, False, 16),
        (300, 1024, 1032, True, 16),
        (1024, 14336, 4096, False, 16),
        (5000, 3072, 2048, True, 4),
    ],
)
def test_the_gated_product_of_many_rows_equals_it_in_float64(m: int, n: int, k: int, biased: bool, group: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is Hopper's")
    from hotplug.platforms.cuda.kernels.gated_hopper import gated

    torch.manual_seed(0)
    x = torch.randn((m, k), device="cuda").bfloat16()
    weight = torch.randn((2 * n, k), device="cuda").bfloat16() / k**0.5
    bias = torch.randn(2 * n, device="cuda").bfloat16() if biased else None
    both = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    want = F.silu(both[:, :n]) * both[:, n:]
    torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")  # freed: what the result is made from
    got = [gated(x, weight, bias, group=group) for _ in range(3)]
    assert float((got[0].double() - want).norm() / want.norm()) < 1e-2
    assert all(torch.equal(got[0], other) for other in got)
