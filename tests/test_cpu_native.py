"""The native CPU library: its products against float64, and what it says where it cannot serve.

gguf's own `dequantize` says what a weight means. A result is compared twice: with the rounding of activations (and for
AMX of weights) modelled exactly, where only float32 sums may differ, and with the values themselves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.ops.registry import SiteSpec
from hotplug.platforms.cpu import kernels
from hotplug.platforms.cpu.native import build, library
from hotplug.platforms.cpu.native.linear import (
    KINDS,
    Packed,
    linear,
    linear_float32,
    linear_silu_mul,
    pack,
    packed_shape,
)
from hotplug.vendor import PlatformError

Array = npt.NDArray[np.float64]
BUILT = library.PATH.exists()
MANY = 25
"""Rows from which on AMX multiplies in bfloat16; below it multiplies as AVX-512 does."""
ISAS = library.load().instruction_sets if BUILT else []
HERE = SiteSpec("linear", "layers.0.attn.qkv", "float32", "avx2", {"scheme": "none"})

needs_library = pytest.mark.skipif(not BUILT, reason="the native library is not built")
each_isa = pytest.mark.parametrize("isa", ISAS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    if BUILT:
        library.load().use(ISAS[0])
        library.load().set_threads(2)


def test_the_library_is_built_where_it_can_be() -> None:
    assert BUILT or build.obstacle() is not None, "run `make native`"


# --- what a product must be -----------------------------------------------------------------------


def quantized(kind: str, weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], Array]:
    """GGUF bytes of a weight, and what they mean."""
    raw = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    return raw, meaning(kind, raw)


def meaning(kind: str, raw: npt.NDArray[np.uint8]) -> Array:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float64)


def in_int8(x: npt.NDArray[np.float32]) -> Array:
    """Activations as the kernels round them: groups of 32 to -127..127 by their largest magnitude."""
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    zero = largest < 2.0**-118
    inverse = np.where(zero, 0, np.float32(127) / np.where(zero, 1, largest)).astype(np.float32)
    scale = np.where(zero, 0, largest / np.float32(127)).astype(np.float32)
    return (np.rint(groups * inverse).astype(np.float64) * scale).reshape(x.shape)


def in_bfloat16(x: npt.NDArray[np.float32]) -> Array:
    return torch.from_numpy(x).bfloat16().double().numpy()


def rounded(isa: str, x: npt.NDArray[np.float32], weight: Array) -> tuple[Array, Array]:
    """What is multiplied for activations and a weight, whose values are float32."""
    if isa == "amx" and len(x) >= MANY:
        return in_bfloat16(x), in_bfloat16(weight.astype(np.float32))
    return in_int8(x), weight


def product(isa: str, x: npt.NDArray[np.float32], weight: Array) -> Array:
    multiplied, by = rounded(isa, x, weight)
    return multiplied @ by.T


def normal(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(x: npt.NDArray[np.float32], packed: Packed, bias: npt.NDArray[np.float32] | None = None) -> Array:
    out = linear(torch.from_numpy(x), packed, None if bias is None else torch.from_numpy(bias))
    return out.numpy().astype(np.float64)


def off(result: Array, expected: Array) -> float:
    """Norm of the difference, relative to the expectation's."""
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


@needs_library
@each_isa
@each_kind
@pytest.mark.parametrize(("rows", "cols"), [(576, 576), (37, 64), (5, 32), (33, 1536)])
def test_products_equal_float64(isa: str, kind: str, rows: int, cols: int) -> None:
    library.load().use(isa)
    raw, weight = quantized(kind, normal(0, rows, cols))
    packed, bias = pack(kind, raw, rows, cols), normal(1, rows)
    for n in (*range(1, 41), 49, 300) if rows < 40 else (1, 8, 25, 300):
        x = normal(n, n, cols)
        result = run(x, packed, bias)
        assert off(result, product(isa, x, weight) + bias) < 1e-6
        assert off(result, x.astype(np.float64) @ weight.T + bias) < 1.5e-2


@needs_library
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    isa=st.sampled_from(ISAS or [""]), kind=st.sampled_from(list(KINDS)), rows=st.integers(1, 50),
    groups=st.integers(1, 6), n=st.integers(1, 40), spread=st.floats(-30, 30), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_bytes_and_magnitudes_equal_float64(
    isa: str, kind: str, rows: int, groups: int, n: int, spread: float, seed: int
) -> None:
    """Random bits as quants, so that every value occurs; scales and activations of all magnitudes."""
    library.load().use(isa)
    rng, cols = np.random.default_rng(seed), 32 * groups
    per_group = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = rng.integers(0, 256, (rows, groups, per_group), dtype=np.uint8)
    header = 2 if kind == "Q4_1" else 1
    blocks[..., : 2 * header] = rng.standard_normal((rows, groups, header)).astype(np.float16).view(np.uint8)
    raw = blocks.reshape(rows, -1)
    x = (rng.standard_normal((n, cols)) * np.exp(spread * rng.random((n, cols)))).astype(np.float32)
    result, weight = run(x, pack(kind, raw, rows, cols)), meaning(kind, raw)
    multiplied, by = rounded(isa, x, weight)
    # What is summed bounds what float32 sums may lose; a weight is a sum itself, of its scaled quant and its minimum.
    parts = np.abs(multiplied) @ (np.abs(weight) + 16 * group_scales(kind, blocks)).T
    assert np.all(np.abs(result - multiplied @ by.T) <= 1e-6 * parts + 1e-35)


def group_scales(kind: str, blocks: npt.NDArray[np.uint8]) -> Array:
    scales = np.abs(blocks[..., :2].copy().view(np.float16).astype(np.float64)).reshape(len(blocks), -1)
    if kind == "Q4_1":
        scales += np.abs(blocks[..., 2:4].copy().view(np.float16).astype(np.float64)).reshape(len(blocks), -1)
    return np.repeat(scales, 32, axis=1)


@needs_library
@each_isa
@each_kind
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values_do_not_saturate(isa: str, kind: str, sign: int) -> None:
    """All quants at their extreme, -128 of 8 bits too, which no quantizer writes, and all activations equal."""
    library.load().use(isa)
    one = np.float16(1).tobytes()
    groups = {
        "Q4_0": [one + b"\xff" * 16, one + b"\x00" * 16],
        "Q4_1": [one + np.float16(0).tobytes() + b"\xff" * 16, one + np.float16(-15).tobytes() + b"\x00" * 16],
        "Q8_0": [one + b"\x80" * 32, one + b"\x7f" * 32],
    }[kind]
    for group in groups:
        raw = np.frombuffer(group * 3, np.uint8).reshape(1, -1)
        for n in (5, 40):
            x = np.full((n, 96), sign, np.float32)
            expected = float(meaning(kind, raw).sum()) * sign
            assert_close(run(x, pack(kind, raw, 1, 96)), np.full((n, 1), expected), rtol=1e-6, atol=0)


@needs_library
@each_isa
@each_kind
@pytest.mark.parametrize("n", [12, 44])
def test_what_is_not_finite_stays_in_its_row(isa: str, kind: str, n: int) -> None:
    library.load().use(isa)
    raw, _ = quantized(kind, normal(0, 20, 96))
    packed, x = pack(kind, raw, 20, 96), normal(1, n, 96)
    before = run(x, packed)
    x[2, 5], x[7, 95], x[9, 40] = np.nan, np.inf, -np.inf
    after = run(x, packed)
    assert np.isnan(after[[2, 7, 9]]).all()
    finite = [i for i in range(n) if i not in (2, 7, 9)]
    assert np.array_equal(after[finite], before[finite])


@needs_library
@each_isa
@each_kind
@pytest.mark.parametrize("n", [4, 30])
def test_zero_groups_and_the_smallest_and_largest_floats(isa: str, kind: str, n: int) -> None:
    library.load().use(isa)
    weights = normal(0, 17, 128)
    weights[3] = 0
    raw, weight = quantized(kind, weights)
    x = normal(1, n, 128)
    x[0, 32:64], x[1], x[2, :32], x[3] = 0, 0, 1e-42, x[3] * 1e30
    result = run(x, pack(kind, raw, 17, 128))
    assert not result[1].any() and not result[:, 3].any()
    for i in (0, 2, 3):
        assert off(result[i], product(isa, x, weight)[i]) < 1e-6


@needs_library
@each_isa
@each_kind
def test_the_gated_product_is_silu_of_one_half_times_the_other(isa: str, kind: str) -> None:
    library.load().use(isa)
    raw, weight = quantized(kind, normal(0, 96, 64) * np.float32(3))
    packed, bias = pack(kind, raw, 96, 64), normal(1, 96)
    for n in (1, 3, 40, 300):
        x = normal(n, n, 64)
        both = product(isa, x, weight) + bias
        gate, up = both[:, :48], both[:, 48:]
        result = linear_silu_mul(torch.from_numpy(x), packed, torch.from_numpy(bias)).numpy()
        with np.errstate(over="ignore"):
            assert off(result, gate / (1 + np.exp(-gate)) * up) < 1e-6


@needs_library
@each_isa
@each_kind
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_does_not_depend_on_the_others(isa: str, kind: str, gated: bool) -> None:
    """The same bits in a call of any number of rows, among those that are rounded alike, and wherever rows lie."""
    library.load().use(isa)
    raw, _ = quantized(kind, normal(0, 96, 96))
    packed, x = pack(kind, raw, 96, 96), torch.from_numpy(normal(1, 300, 96))
    apart = torch.zeros(300, 99)[:, 1:-2].copy_(x)
    call = linear_silu_mul if gated else linear
    many, few = call(x, packed), call(x[: MANY - 1], packed)
    for n in (MANY, 32, 33, 299):
        assert torch.equal(call(x[:n], packed), many[:n])
        assert torch.equal(call(apart[300 - n :], packed), many[300 - n :])
    for n in (1, 3, 8):
        assert torch.equal(call(x[:n], packed), few[:n])
    assert isa == "amx" or torch.equal(many[: MANY - 1], few)


@needs_library
@each_isa
@pytest.mark.parametrize(("rows", "cols"), [(576, 576), (3, 1), (50, 77)])
def test_float32_products_equal_float64(isa: str, rows: int, cols: int) -> None:
    library.load().use(isa)
    weight, bias = normal(0, rows, cols + 3)[:, :cols], normal(1, rows)  # rows apart from each other
    for n in range(20):
        x = normal(n, n, cols)
        result = linear_float32(*map(torch.from_numpy, (x, weight, bias))).numpy()
        expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        assert result.shape == expected.shape
        assert np.all(np.abs(result - expected) <= 1e-6 * (np.abs(x) @ np.abs(weight).T + 1))


# --- packing --------------------------------------------------------------------------------------


@needs_library
@each_kind
def test_the_packed_layout_is_the_documented_one(kind: str) -> None:
    raw, _ = quantized(kind, normal(0, 18, 64))
    tiles = pack(kind, raw, 18, 64).tiles.numpy()
    source = raw.reshape(18, 2, -1)
    group = {"Q4_0": 288, "Q4_1": 320, "Q8_0": 544}[kind]
    header = 4 if kind == "Q4_1" else 2
    assert tiles.shape == (2, 2 * group)
    for row, g in ((0, 0), (5, 1), (15, 1), (17, 0)):
        mine, r = tiles[row // 16, g * group : (g + 1) * group], row % 16
        assert mine[2 * r : 2 * r + 2].tobytes() == source[row, g, :2].tobytes()
        if kind == "Q4_1":
            assert mine[32 + 2 * r : 34 + 2 * r].tobytes() == source[row, g, 2:4].tobytes()
        lines = mine[16 * header :].reshape(-1, 16, 4)
        assert lines[:, r].tobytes() == source[row, g, header:].tobytes()
    assert not tiles[1].reshape(2, group)[:, 4:32].any(), "outputs beyond the last must be zero"


@needs_library
def test_tiles_of_a_stacked_weight_are_packed_in_place() -> None:
    raw, _ = quantized("Q4_1", normal(0, 48, 64))
    whole = torch.empty(packed_shape("Q4_1", 48, 64), dtype=torch.uint8)
    pack("Q4_1", raw[:32], 32, 64, out=whole[:2])
    pack("Q4_1", raw[32:], 16, 64, out=whole[2:])
    assert torch.equal(whole, pack("Q4_1", raw, 48, 64).tiles)


@needs_library
@each_isa
@each_kind
def test_tiles_may_lie_anywhere_in_memory(isa: str, kind: str) -> None:
    library.load().use(isa)
    raw, _ = quantized(kind, normal(0, 16, 64))
    packed = pack(kind, raw, 16, 64)
    elsewhere = torch.empty(packed.tiles.numel() + 1, dtype=torch.uint8)[1:].view_as(packed.tiles)
    moved = pack(kind, raw, 16, 64, out=elsewhere)
    assert moved.tiles.data_ptr() % 2
    for n in (5, 40):
        assert np.array_equal(run(normal(1, n, 64), moved), run(normal(1, n, 64), packed))


@needs_library
def test_read_only_bytes_of_a_mapped_file_are_packed(tmp_path: Path) -> None:
    raw, _ = quantized("Q8_0", normal(0, 16, 64))
    raw.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    assert torch.equal(pack("Q8_0", mapped, 16, 64).tiles, pack("Q8_0", raw, 16, 64).tiles)


# --- threads --------------------------------------------------------------------------------------


@needs_library
@each_isa
def test_one_thread_and_two_give_the_same_bits(isa: str) -> None:
    loaded = library.load()
    loaded.use(isa)
    raw, _ = quantized("Q4_1", normal(0, 576, 576))
    results = []
    for count in (1, 2):
        assert loaded.set_threads(count) == min(count, len(os.sched_getaffinity(0)))
        packed = pack("Q4_1", raw, 576, 576)
        results.append([run(normal(n, n, 576), packed) for n in (1, 16, 300)])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@needs_library
def test_threads_never_exceed_the_cores() -> None:
    assert library.load().set_threads(4096) <= len(os.sched_getaffinity(0))
    assert library.load().set_threads(0) == 1


@needs_library
def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    cases = []
    for kind, n in (("Q4_0", 1), ("Q4_1", 7), ("Q8_0", 130), ("Q4_1", 1)):
        raw, _ = quantized(kind, normal(n, 64 + n, 96))
        x, packed = normal(n + 1, n, 96), pack(kind, raw, 64 + n, 96)
        cases.append((x, packed, run(x, packed)))
    wrong: list[int] = []

    def call(i: int) -> None:
        x, packed, expected = cases[i]
        wrong.extend(i for _ in range(200) if not np.array_equal(run(x, packed), expected))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def script(body: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own with a packed weight `packed`, activations `x` and their product `expected`."""
    head = """
import os, sys, threading, gguf, numpy as np, torch
from hotplug.platforms.cpu.native import library
from hotplug.platforms.cpu.native.linear import linear, pack
raw = gguf.quants.quantize(np.random.default_rng(0).standard_normal((576, 64), np.float32), gguf.GGMLQuantizationType.Q4_1)
packed, x = pack("Q4_1", raw, 576, 64), torch.randn(40, 64)
expected = linear(x, packed)
"""  # noqa: E501
    return subprocess.run([sys.executable, "-W", "ignore", "-c", head + body], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip


@needs_library
def test_a_forked_child_has_threads_of_its_own() -> None:
    """Forked while another thread is in the middle of calls; the child and the parent both go on."""
    done = script("""
stop = threading.Event()
def busy():
    while not stop.is_set():
        assert torch.equal(linear(x, packed), expected)
other = threading.Thread(target=busy)
other.start()
for _ in range(20):
    if (child := os.fork()) == 0:
        ok = all(torch.equal(linear(x, packed), expected) for _ in range(20))
        os._exit(0 if ok and library.load().threads == min(2, len(os.sched_getaffinity(0))) else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(linear(x, packed), expected)
stop.set()
other.join()
print("fine")
""")
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


@needs_library
def test_a_process_ends_quietly_with_threads_awake_and_asleep() -> None:
    for body in ("linear(x, packed)", "import time; time.sleep(0.01)", "sys.exit(0)"):
        done = script(body)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_library
def test_sleeping_threads_cost_no_processor_time() -> None:
    done = script("""
import time
time.sleep(0.01)
before = time.process_time()
time.sleep(0.3)
print(time.process_time() - before < 0.02)
""")
    assert done.stdout == "True\n", done.stderr


# --- what is refused ------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p, x: pack("Q4_K", p.tiles.numpy(), 16, 64), "Q4_K is not packed, only Q4_0, Q4_1, Q8_0"),
        (lambda p, x: pack("Q4_0", p.tiles.numpy(), 16, 48), "48 inputs are no multiple of 32"),
        (lambda p, x: pack("Q4_0", p.tiles.numpy(), 0, 32), "at least one row, not 0"),
        (lambda p, x: pack("Q4_0", np.zeros(5, np.uint8), 1, 32), "18 contiguous bytes, not 5 of uint8"),
        (lambda p, x: pack("Q4_0", np.zeros(18, np.uint8), 1, 32, out=p.tiles), "out must be contiguous uint8 of"),
        (lambda p, x: linear(x.double(), p), r"float32 \[n, 64\] on the host, not torch.float64"),
        (lambda p, x: linear(x[0], p), r"not torch.float32 \[64\] on cpu"),
        (lambda p, x: linear(x.to("meta"), p), "on meta"),
        (lambda p, x: linear(x[:, :32], p), "32 columns where the weight has 64 inputs"),
        (lambda p, x: linear(x.repeat(1, 2)[:, ::2], p), "must lie side by side"),
        (lambda p, x: linear(x, p, torch.zeros(3)), r"bias must be contiguous float32 \[16\]"),
        (lambda p, x: linear_silu_mul(x, p), "16 rows together are not twice a multiple of 16"),
        (lambda p, x: linear_float32(x, torch.zeros(3, 64).half()), "weight must be float32"),
        (lambda p, x: linear_float32(x, torch.zeros(64, 3).T), "weight must be float32"),
    ],
)
def test_wrong_arguments_are_named(wrong: object, message: str) -> None:
    raw, _ = quantized("Q4_0", normal(0, 16, 64))
    with pytest.raises(ValueError, match=message):
        wrong(pack("Q4_0", raw, 16, 64), torch.zeros(2, 64))  # type: ignore[operator]


@needs_library
def test_no_rows_give_no_rows() -> None:
    raw, _ = quantized("Q4_0", normal(0, 32, 64))
    packed = pack("Q4_0", raw, 32, 64)
    assert linear(torch.zeros(0, 64), packed).shape == (0, 32)
    assert linear_silu_mul(torch.zeros(0, 64), packed).shape == (0, 16)


@needs_library
def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=f"'avx9' is none of {', '.join(ISAS)}"):
        library.load().use("avx9")


@pytest.mark.slow
@needs_library
def test_a_compiler_without_amx_builds_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "old"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {build.find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(library, "PATH", build.build(tmp_path / "libhotplug_cpu.so"))
    assert library.load().instruction_sets == [isa for isa in ISAS if isa != "amx"]


def test_a_missing_library_is_named_with_what_makes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "libhotplug_cpu.so")
    assert library.refusal() == (
        "libhotplug_cpu.so is not there: `python -m hotplug.platforms.cpu.native.build` makes it"
    )
    with pytest.raises(PlatformError, match=r"native CPU kernels are not available: .* is not there"):
        library.load()


def test_a_file_that_is_no_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libhotplug_cpu.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(library, "PATH", path)
    assert "libhotplug_cpu.so cannot be loaded: " in str(library.refusal())


@needs_library
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "VERSION", 99)
    library._open.cache_clear()
    assert re.search(r"libhotplug_cpu.so has version \d+ where 99 is needed", str(library.refusal()))
    library._open.cache_clear()


@needs_library
def test_a_processor_without_avx2_is_served_by_pytorch_and_the_plan_says_why() -> None:
    library.load().use(library.BASELINE)
    verdict = kernels._native_float32(HERE)
    assert not verdict.ok
    assert "the processor has none of the instruction sets they are written for (AVX2" in verdict.reason


@needs_library
@pytest.mark.parametrize(("arch", "ok"), [("avx2", True), ("avx512", False), ("amx", False)])
def test_float32_is_taken_over_where_pytorch_is_slower(arch: str, ok: bool) -> None:
    if ISAS[0] == library.BASELINE:
        pytest.skip("the processor has no AVX2")
    spec = SiteSpec("linear", "site", "float32", arch, {"scheme": "none"})
    assert kernels._native_float32(spec).ok is ok


@needs_library
def test_the_library_exports_its_interface_and_nothing_else() -> None:
    """A second C++ runtime that others can see breaks programs that have one."""
    done = subprocess.run(["nm", "-D", "--defined-only", library.PATH], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no nm")
    assert {line.split()[-1] for line in done.stdout.splitlines()} == {*library._SIGNATURES, "hp_version"}


def test_the_plan_shows_why_the_library_does_not_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "libhotplug_cpu.so")
    registry = builtin_registry()
    for kernel in kernels.KERNELS:
        registry.add(kernel)
    plan = Plan(registry, arch="avx2")
    plan.bind("linear", "layers.0.attn.qkv", "float32", in_features=64, out_features=64, bias=False, scheme="none")
    (choice,) = plan.choices
    assert choice.provider == "reference"
    assert "is not there" in choice.rejected[0].reason
