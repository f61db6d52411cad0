"""Prompt chunks on Hopper: the kernel's machine code and its order of waiting, and which calls it is given.

Its results are checked on a GPU, in `tests/gpu/test_device_prefill_hopper.py`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Case, dense_attention, make_case
from torch import Tensor
from torch.testing import assert_close

from hotplug.vendor import Bucket, SiteSpec

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton's compiler")

STATIC = {"scale": 0.3, "window": None, "soft_cap": None}
SHARED = 227 << 10
"""Bytes of shared memory that a program may have."""
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Hopper())
from attention_cases import make_case
from hotplug.platforms.cuda.kernels import prefill_hopper
case = json.loads(sys.argv[1])
made = make_case([(200, 300), (130, 130)], heads=8, kv_heads=2, dim=case.pop("dim"), block=case.pop("block"),
                 dtype=getattr(torch, case.pop("dtype")), index_dtype=torch.int32)
config = prefill_hopper.config_for(made.q.shape[2])._replace(**case)
kernel = prefill_hopper.compile_for(made.q, made.k_cache, made.v_cache, made.step, made.q, 0.1, config)
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(kernel.asm["cubin"])
    file.flush()
    def tool(name, *options):
        return subprocess.run([tools / name, *options, file.name], capture_output=True, text=True, check=True).stdout
    stack = int(re.search(r"STACK:(\\d+)", tool("cuobjdump", "-res-usage"))[1])
    code = tool("nvdisasm", "-c")
ops = re.findall(r"\\b(HGMMA\\S* R\\d+, (?:gdesc|R\\d+)|WARPGROUP\\.DEPBAR\\S* gsb0, 0x\\d|MUFU\\.EX2|BRA|"
                 r"SYNCS\\.PHASECHK)", code)
print(json.dumps({"stack": stack, "shared": kernel.metadata.shared, "ops": ops,
                  "registers": re.findall(r"setmaxnreg\\.inc\\S* \\t?(\\d+)", kernel.asm["ptx"]),
                  "copies": kernel.asm["ttgir"].count("async_tma_copy_global_to_local")}))
"""


@cache
def compiled(case: str) -> dict[str, Any]:
    """Figures of the kernel, compiled in a process without the interpreter that this one's tests set."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", COMPILE, case], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def kernel(dim: int = 128, block: int = 64, dtype: str = "bfloat16", **config: Any) -> dict[str, Any]:
    return compiled(json.dumps({"dim": dim, "block": block, "dtype": dtype, **config}))


VARIANTS: list[dict[str, Any]] = [{}, {"dim": 64, "dtype": "float16"}, {"block": 128}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_stay_in_registers_and_the_ring_fits(variant: dict[str, Any]) -> None:
    found = kernel(**variant)
    assert found["stack"] == 0
    assert found["shared"] <= SHARED
    assert "240" in found["registers"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_go_to_the_second_product_in_registers(variant: dict[str, Any]) -> None:
    products = [op for op in kernel(**variant)["ops"] if op.startswith("HGMMA")]
    dim = variant.get("dim", 128)
    first = sum("gdesc" in op for op in products)
    # Of each half: a first product before the loops, a pair in either loop, a second product after them.
    assert (first, len(products) - first) == (2 * 3 * dim // 16, 2 * 3 * 128 // 16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_softmax_comes_before_the_second_product_is_waited_for(variant: dict[str, Any]) -> None:
    """ptxas would move the wait up, were there no loop in between."""
    kinds = [op if op.startswith("WARPGROUP") else op.split(".")[0].split(" ")[0] for op in kernel(**variant)["ops"]]
    overlapped = [i for i, kind in enumerate(kinds) if kind.endswith("gsb0, 0x1")]
    assert len(overlapped) == 2 * 2
    for begin in overlapped:
        end = next(i for i in range(begin, len(kinds)) if kinds[i].endswith("gsb0, 0x0"))
        # of 64 queries times 128 keys a thread has 64; two more for what older sums are times
        assert kinds[begin:end].count("MUFU") == 66
        assert "HGMMA" not in kinds[begin:end]


@pytest.mark.parametrize(("block", "dim", "boxes"), [(64, 128, 4), (128, 128, 2), (64, 64, 2), (128, 64, 1)])
def test_a_tile_is_copied_in_boxes_of_one_block_and_64_columns(block: int, dim: int, boxes: int) -> None:
    assert kernel(dim, block)["copies"] == 2 * boxes + 2  # keys and values; queries of both halves


# --- who waits for whom ---------------------------------------------------------------------------


class Barrier:
    """An mbarrier: waiting for a parity returns once the phase of that parity is over."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.phase = count, count, 0

    def arrive(self) -> None:
        self.pending -= 1
        if not self.pending:
            self.pending, self.phase = self.count, self.phase + 1

    def over(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Program:
    """One program of the kernel: its three parts yield the barrier and parity that they wait for, in its order."""

    def __init__(self, config: Any, requests: list[tuple[int, int]], heads: int, program: int, programs: int) -> None:
        from hotplug.platforms.cuda.kernels import prefill_hopper as kernel

        self.k, self.config, self.requests, self.heads = kernel, config, requests, heads
        self.program, self.programs = program, programs
        stages = config.stages
        self.full = {name: [Barrier(1) for _ in range(n)] for name, n in (("q", 2), ("k", stages), ("v", stages))}
        self.empty = {name: [Barrier(2 if name != "q" else 1) for _ in bars] for name, bars in self.full.items()}
        self.held: dict[tuple[str, int], Any] = {}
        self.copies: list[tuple[str, int, Any]] = []
        self.seen: list[list[Any]] = [[], []]

    def items(self) -> Iterator[tuple[tuple[int, int, int], int, int, int]]:
        rows = 2 * self.k.ROWS
        tiles = -(-max(queries for queries, _ in self.requests) // rows)
        total = self.heads * len(self.requests) * tiles
        for n in range(-(-total // self.programs)):
            item = self.k.nth_item.fn(n, self.program, self.programs)
            if item < total:
                place = self.k.place_of.fn(item, self.heads, len(self.requests), tiles)
                request, tile, _ = place
                queries, length = self.requests[request]
                if tile * rows < queries:
                    before = length - queries + tile * rows
                    yield place, before, length, self.k.key_tiles.fn(before, rows, length, self.config.keys)

    def slot(self, n: int) -> tuple[int, int]:
        found: tuple[int, int] = self.k.slot_of.fn(n, self.config.stages)
        return found

    def copy(self, name: str, slot: int, what: Any) -> None:
        self.copies.append((name, slot, what))

    def read(self, half: int, name: str, slot: int, what: Any) -> None:
        assert self.held[name, slot] == what
        self.seen[half].append((name, what))

    def produce(self) -> Iterator[tuple[Barrier, int]]:
        done = 0
        for taken, (place, _, _, last) in enumerate(self.items()):
            for j in range(last):
                slot, parity = self.slot(done)
                yield self.empty["k"][slot], parity ^ 1
                self.copy("k", slot, (place, j))
                if j == 0:
                    for half in range(2):
                        yield self.empty["q"][half], (taken & 1) ^ 1
                        self.copy("q", half, place)
                yield self.empty["v"][slot], parity ^ 1
                self.copy("v", slot, (place, j))
                done += 1

    def consume(self, half: int) -> Iterator[tuple[Barrier, int]]:
        done = 0
        for taken, (place, before, length, last) in enumerate(self.items()):
            first = before + half * self.k.ROWS
            whole = self.k.whole_tiles.fn(first, last, self.config.keys)
            assert whole * self.config.keys <= min(first + 1, length + self.config.keys - 1)
            yield self.full["q"][half], taken & 1
            slot, parity = self.slot(done)
            yield self.full["k"][slot], parity
            self.read(half, "q", half, place)
            self.read(half, "k", slot, (place, 0))
            self.empty["k"][slot].arrive()
            done += 1
            slot, parity = self.slot(done)
            if last > 1:
                yield self.full["k"][slot], parity
            for j in (*range(1, whole), *range(max(whole, 1), last)):
                slot, before_slot, after = self.slot(done)[0], self.slot(done - 1), self.slot(done + 1)
                self.read(half, "q", half, place)
                self.read(half, "k", slot, (place, j))
                yield self.full["v"][before_slot[0]], before_slot[1]
                self.read(half, "v", before_slot[0], (place, j - 1))
                self.empty["k"][slot].arrive()
                if j + 1 < last:
                    yield self.full["k"][after[0]], after[1]
                self.read(half, "v", before_slot[0], (place, j - 1))
                self.empty["v"][before_slot[0]].arrive()
                done += 1
            self.empty["q"][half].arrive()
            slot, parity = self.slot(done - 1)
            yield self.full["v"][slot], parity
            self.read(half, "v", slot, (place, last - 1))
            self.empty["v"][slot].arrive()

    def run(self, rng: random.Random) -> None:
        """Steps of the parts and ends of copies in a random order, until none is left; fails where all wait."""
        parts = {part: next(part, None) for part in (self.produce(), self.consume(0), self.consume(1))}
        while True:
            ready = [part for part, wait in parts.items() if wait is not None and wait[0].over(wait[1])]
            moves: list[Any] = [*ready, *range(len(self.copies))]
            if not moves:
                assert all(wait is None for wait in parts.values()), "all wait"
                return
            move = rng.choice(moves)
            if isinstance(move, int):
                name, slot, what = self.copies.pop(move)
                self.held[name, slot] = what
                self.full[name][slot].arrive()
            else:
                parts[move] = next(move, None)


REQUESTS = [(1, 1), (130, 130), (5, 700), (128, 128), (300, 1029), (64, 190), (0, 0), (257, 640)]


@pytest.mark.parametrize(("keys", "stages"), [(128, 2), (64, 4), (128, 4)])
def test_the_parts_of_a_program_wait_for_each_other_and_never_all_at_once(keys: int, stages: int) -> None:
    from hotplug.platforms.cuda.kernels.prefill_hopper import HopperConfig

    for seed, programs in enumerate((1, 3, 7, 400) * 3):
        rng = random.Random(seed)
        seen: list[Any] = []
        for program in range(programs):
            one = Program(HopperConfig(keys, stages), REQUESTS, 2, program, programs)
            one.run(rng)
            assert one.seen[0] == one.seen[1]
            seen += [what for name, what in one.seen[0] if name == "v"]
        # every tile of values that a query sees, once for each of the two reads of its product but the last
        tiles = {(place, j) for place, j in seen}
        assert len({place for place, _ in tiles}) == 2 * sum(-(-queries // 128) for queries, _ in REQUESTS)
        assert all((place, j - 1) in tiles for place, j in tiles if j)


# --- which calls it is given ----------------------------------------------------------------------

SITE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "block_size": 64, "layout": "NHD", "kv_dtype": "bfloat16",
        "window": None, "sinks": False, "soft_cap": None, "static": False}  # fmt: skip


def reason_of(arch: str = "sm_90", **changes: Any) -> str:
    from hotplug.platforms.cuda.kernels.prefill_hopper import KERNELS

    site = {**SITE, **changes}
    verdict = KERNELS[0].check(SiteSpec("attention", "s", site.pop("dtype", "bfloat16"), arch, site))
    assert verdict.ok == (not verdict.reason)
    return verdict.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""), ({"dtype": "float16", "kv_dtype": "float16", "head_dim": 64, "block_size": 192}, ""),
        ({"arch": "sm_100"}, "is for sm_90, not sm_100"), ({"window": 7}, "has no sliding window"),
        ({"sinks": True}, "has no sinks"), ({"soft_cap": 1.0}, "has no soft cap"),
        ({"layout": "HND"}, "reads NHD caches"), ({"kv_dtype": "float8_e4m3fn"}, "not NHD of float8_e4m3fn"),
        ({"dtype": "float32", "kv_dtype": "float32"}, "computes in bfloat16 or float16, not float32"),
        ({"head_dim": 96}, "has heads of 64 or 128, not 96"), ({"block_size": 32}, "reads blocks of whole 64s, not 32"),
    ],
)  # fmt: skip
def test_what_it_lacks_is_refused_by_name(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = reason_of(**changes)
    assert (reason in found) and bool(reason) == bool(found)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in reason_of()


def test_steps_whose_chunks_fill_no_tile_are_left_to_the_triton_kernel() -> None:
    from hotplug.platforms.cuda.kernels.prefill_hopper import KERNELS

    short, whole = (kernel.accepts for kernel in KERNELS)
    assert short is not None and whole is not None
    lengths = (1, 127, 128, 2048, 2049, 8192)
    assert [short(Bucket(8192, longest)) for longest in lengths] == [False, False, True, True, False, False]
    assert [whole(Bucket(8192, longest)) for longest in lengths] == [False, False, True, True, True, True]


def test_long_chunks_go_to_flash_attention_3_before_it_and_short_ones_after() -> None:
    from hotplug.platforms.cuda.kernels import KERNELS

    ranks = {kernel.provider: kernel.rank for kernel in KERNELS if kernel.op == "attention"}
    assert ranks["cuda.hopper"] > ranks["cuda.fa3"] > ranks["cuda.hopper_long"] > ranks["cuda.triton"]
    assert ranks["cuda.triton"] > ranks["cuda.flash"] > ranks["cuda.flashinfer"]  # which have to be forced


@pytest.mark.parametrize(
    ("change", "error"),
    [({"dtype": torch.float32}, TypeError), ({"dim": 80}, ValueError), ({"block": 32}, ValueError),
     ({"scale": 0.0}, ValueError), ({"keys": 96}, ValueError)],
)  # fmt: skip
def test_calls_that_it_cannot_serve_are_refused(change: dict[str, Any], error: type[Exception]) -> None:
    from hotplug.platforms.cuda.kernels.prefill_hopper import HopperConfig, prefill

    case = make_case([(130, 130)], heads=4, kv_heads=2, dim=change.get("dim", 64), block=change.get("block", 64),
                     dtype=change.get("dtype", torch.bfloat16), index_dtype=torch.int32)  # fmt: skip
    with pytest.raises(error):
        prefill(case.q, case.k_cache, case.v_cache, case.step, case.q, change.get("scale", 0.1),
                HopperConfig(keys=change.get("keys", 128)))  # fmt: skip


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel, replaced by the Triton one, and the queries of each call."""
    from cuda_target import HAS_GPU

    from hotplug.platforms.cuda.kernels import prefill_hopper
    from hotplug.platforms.cuda.kernels.prefill_attention import prefill

    if HAS_GPU:
        pytest.skip("cases lie on the host")
    calls = []

    def stand_in(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: Any, out: Tensor, scale: float) -> None:
        calls.append(len(q) - step.num_decodes)
        prefill(q, k_cache, v_cache, step, out, scale, None, None, None)

    monkeypatch.setattr(prefill_hopper, "prefill", stand_in)
    return calls


def run(case: Case, step: Any = None) -> None:
    from hotplug.platforms.cuda.kernels.prefill_hopper import attention

    out = attention(case.q, case.k_cache, case.v_cache, step or case.step, None, **STATIC)
    assert_close(out.double(), dense_attention(case, 0.3, None), rtol=2e-2, atol=2e-2)


def case_of(lens: list[tuple[int, int]]) -> Case:
    return make_case(lens, heads=2, kv_heads=1, dim=16, block=16, dtype=torch.bfloat16, index_dtype=torch.int32,
                     unused=float("nan"))  # fmt: skip


def test_decodes_go_to_the_decode_kernel_and_chunks_to_this_one_without_lengths_on_the_host(chunks: list[int]) -> None:
    for lens in ([(1, 37), (1, 5), (20, 20), (9, 75)], [(20, 20), (9, 75)]):
        case = case_of(lens)
        run(case)
        run(case, replace(case.step, query_lens_host=None, seq_lens_host=None))
    assert chunks == [29] * 4
    run(case_of([(1, 37), (1, 5)]))
    assert chunks == [29] * 4


def test_queries_between_addresses_of_16_bytes_go_to_the_triton_kernel(chunks: list[int]) -> None:
    case = case_of([(20, 20)])
    wide = torch.zeros((20, 36), dtype=torch.bfloat16)
    wide[:, 4:] = case.q.flatten(1)
    run(replace(case, q=wide[:, 4:].unflatten(1, (2, 16))))  # rows of 72 bytes
    assert chunks == []


def test_tokens_of_no_request_are_zero_in_static_steps(chunks: list[int]) -> None:
    from hotplug.platforms.cuda.kernels.prefill_hopper import attention

    case = case_of([(20, 20)])
    q = torch.cat((case.q, torch.full((3, *case.q.shape[1:]), float("nan"), dtype=case.q.dtype)))
    step = replace(case.step, query_lens_host=None, seq_lens_host=None)
    out = attention(q, case.k_cache, case.v_cache, step, None, **STATIC)
    assert not out[20:].any()
