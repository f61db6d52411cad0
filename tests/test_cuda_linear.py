"""Linear layers of few rows: both kernels against PyTorch, interpreted where there is no GPU, and what is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from hotplug.platforms.cuda.kernels import gpu, linear, linear_few
from hotplug.platforms.cuda.tuning import Key, Tuned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(rows: int, k: int, n: int, dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [rows, k], weight [n, k] and bias [n] or none."""
    random = torch.Generator().manual_seed(rows + k + n)
    x, weight, more = (torch.randn(size, generator=random).to(dtype).to(DEVICE) for size in ((rows, k), (n, k), (n,)))
    return x, weight / k**0.5, more if bias else None


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool) -> Tensor:
    """In float64."""
    product = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if not gated:
        return product
    gate, up = product.chunk(2, dim=-1)
    return F.silu(gate) * up


def check(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> None:
    wanted = expected(x, weight, bias, gated=gated)
    tolerance = 1e-5 if actual.dtype is FULL else 2e-2
    assert actual.shape == wanted.shape
    assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


# --- one row --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "gated", "bias", "dtype"),
    [
        (8, 64, False, False, HALF),  # whole tiles
        (7, 100, False, True, HALF),  # the last tile is not whole, either way
        (5, 48, True, False, HALF),
        (9, 130, True, True, FULL),
        (1, 3, False, False, FULL),
    ],
)
def test_one_row(n: int, k: int, gated: bool, bias: bool, dtype: torch.dtype) -> None:
    x, weight, more = inputs(1, k, 2 * n if gated else n, dtype, bias=bias)
    got = linear_few.gemv(x, weight, more, gated=gated, dtype=dtype, rows=2, cols=32, warps=4)
    assert got.dtype is dtype
    check(got, x, weight, more, gated=gated)


# --- few rows -------------------------------------------------------------------------------------

SMALL = {"rows": 16, "cols": 32, "stages": 2, "warps": 4}


@pytest.mark.parametrize(
    ("m", "n", "k", "programs"),
    [
        (16, 64, 128, 4),  # a tile a program
        (3, 40, 104, 3),  # 3 tiles of 4 steps; the last tile, the last step and the rows are not whole
        (5, 48, 96, 2),  # 9 steps: the second program begins in the middle of a tile and ends the matrix
        (17, 33, 160, 7),  # 15 steps dealt by 3: a tile of several programs, a program of several tiles
        (2, 16, 256, 8),  # every step of the only tile is a program's
        (1, 16, 64, 9),  # programs without work
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_few_rows_however_tiles_are_dealt(m: int, n: int, k: int, programs: int, gated: bool) -> None:
    x, weight, bias = inputs(m, k, 2 * n if gated else n, HALF, bias=gated)
    for _ in range(2):  # the first leaves its counters as the second needs them
        got = linear_few.skinny(x, weight, bias, gated=gated, dtype=HALF, programs=programs, **SMALL)
        check(got, x, weight, bias, gated=gated)
    assert not linear_few._counters(DEVICE).any()


def test_few_rows_of_float32() -> None:
    x, weight, bias = inputs(4, 72, 24, FULL, bias=True)
    check(linear_few.skinny(x, weight, bias, gated=False, dtype=FULL, programs=2, **SMALL), x, weight, bias)


def test_scores_of_narrow_inputs_are_float32_and_were_never_narrower() -> None:
    x, weight, _ = inputs(2, 64, 32, HALF, bias=False)
    for got in (
        linear_few.skinny(x, weight, None, gated=False, dtype=FULL, programs=3, **SMALL),
        torch.cat([linear_few.gemv(x[i : i + 1], weight, None, gated=False, dtype=FULL, rows=2, cols=32, warps=4)
                   for i in range(2)]),
    ):  # fmt: skip
        assert got.dtype is FULL
        check(got, x, weight, None)


# --- the choice -----------------------------------------------------------------------------------


def choice(monkeypatch: pytest.MonkeyPatch, op: str, rows: int, k: int, n: int, dtype: torch.dtype = HALF,
           entries: dict[Key, dict[str, Any]] | None = None,
           capability: tuple[int, int] = gpu.HOPPER) -> dict[str, Any]:  # fmt: skip
    """The configuration that a call runs with."""
    chosen: list[dict[str, Any]] = []
    monkeypatch.setattr(linear, "tuned", lambda device: Tuned(entries or {}))
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    monkeypatch.setattr(linear, "_with", lambda config, *_, **__: chosen.append(dict(config)))
    x, weight = torch.empty((rows, k), dtype=dtype), torch.empty((n, k), dtype=dtype)
    getattr(linear, op)(x, weight, None)
    return chosen[0]


@pytest.mark.parametrize(
    ("op", "rows", "kernel"),
    [
        ("linear", 1, "gemv"), ("linear", 5, "skinny"), ("linear", 17, "library"),
        ("linear_silu_mul", 1, "gemv"), ("linear_silu_mul", 64, "skinny"), ("linear_silu_mul", 65, "library"),
        ("logits", 1, "gemv"), ("logits", 33, "skinny"), ("logits", 65, "library"), ("logits", 0, "library"),
    ],
)  # fmt: skip
def test_the_kernel_where_nothing_was_measured(
    op: str, rows: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choice(monkeypatch, op, rows, 1024, 256)["kernel"] == kernel


@pytest.mark.parametrize(
    ("op", "rows", "kernel"),
    [("linear", 1, "gemv"), ("linear", 5, "stream"), ("linear_silu_mul", 64, "stream"), ("linear", 65, "library"),
     ("logits", 33, "skinny")],
)  # fmt: skip
def test_hopper_has_a_kernel_of_its_own(op: str, rows: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_streams", lambda device: True)
    assert choice(monkeypatch, op, rows, 1024, 256)["kernel"] == kernel


def test_what_was_measured_goes_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"kernel": "skinny", "rows": 64, "cols": 128, "programs": 4, "stages": 2, "warps": 4}
    entries = {Key.of("linear", "bfloat16", {"n": 256, "k": 1024, "tokens": 64}): measured}
    assert choice(monkeypatch, "linear", 20, 1024, 256, entries=entries) == measured
    assert choice(monkeypatch, "linear", 20, 1024, 512, entries=entries)["kernel"] == "library"


@pytest.mark.parametrize(("rows", "k", "dtype"), [(4, 1024, FULL), (4, 1028, HALF), (4, 512, HALF)])
def test_rows_that_no_descriptor_serves_well_go_to_the_library(
    rows: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choice(monkeypatch, "linear", rows, k, 256, dtype)["kernel"] == "library"


@pytest.mark.parametrize("rows", [1, 16])
def test_other_gpus_than_hopper_use_the_library(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice(monkeypatch, "linear", rows, 1024, 256, capability=(8, 9))["kernel"] == "library"


@pytest.mark.parametrize(("tiles", "programs"), [(1, 132), (64, 128), (96, 96), (100, 100), (224, 112), (140, 132)])
def test_programs_share_tiles_evenly_unless_that_leaves_many_without_work(tiles: int, programs: int) -> None:
    assert linear.even(tiles) == programs


def test_a_step_that_samples_nothing_has_no_scores() -> None:
    x, weight, _ = inputs(0, 1024, 32, HALF, bias=False)
    got = linear.logits(x, weight, None)
    assert (got.shape, got.dtype) == ((0, 32), FULL)


def test_every_default_and_candidate_fits_into_shared_memory() -> None:
    for op, n, k, tokens in (("linear", 4096, 4096, 64), ("linear_silu_mul", 14336, 4096, 64),
                             ("logits", 128256, 4096, 64), ("linear", 2048, 2048, 16)):  # fmt: skip
        key = Key.of(op, "bfloat16", {"n": n, "k": k, "tokens": tokens})
        for config in (linear._default(key), *linear.candidates(key)):
            if config["kernel"] == "skinny":
                tiles = config["rows"] * (2 if op == "linear_silu_mul" else 1) + tokens
                assert 2 * config["stages"] * config["cols"] * tiles < linear._SHARED, (op, config)
