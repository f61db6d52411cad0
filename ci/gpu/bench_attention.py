"""Attention of the CUDA platform on a GPU: each variant against float32, then timed. `python ci/gpu/bench_attention.py`

Prints a table with the best candidate of each cell, and the table of all candidates with --all; the same as JSON in
$OUT/attention.json. Candidates are compiled by processes of their own first. A variant that fails or is wrong is
listed as such. Decodes are timed as CUDA graphs over more caches than the second-level cache
holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.attention import AttentionInputs, gather_kv
from hotplug.platforms.cuda.kernels import (
    decode_attention,
    flashinfer_attention,
    gathered_attention,
    prefill_attention,
    prefill_hopper,
)
from hotplug.platforms.cuda.kernels.decode_attention import DecodeConfig as D
from hotplug.platforms.cuda.kernels.gathered_attention import chunks_of, gather
from hotplug.platforms.cuda.kernels.prefill_attention import PrefillConfig as P

LAYOUTS = {"8B": (32, 8, 128), "1B": (32, 8, 64), "30B-A3B": (32, 4, 128)}
DECODES = ((1, 256), (1, 4096), (64, 1100), (256, 384), (8, 32000))
PREFILLS = (("4x4096", [(4096, 4096)] * 4), ("16x1024", [(1024, 1024)] * 16), ("16384+16384", [(16384, 32768)]),
            ("32000", [(32000, 32000)]))  # fmt: skip
TOLERANCE = 1e-2
"""Norm of the error over the norm of the result: bfloat16 probabilities and results."""
DEADLINE_S = 85.0
PROCESSES = 12
LIBRARIES = ("fa3", "flash", "flashinfer fa3", "flashinfer fa2")
"""Built elsewhere; FlashInfer where it is first called, which takes minutes."""
CAPACITY = 64
"""Entries of a block table beyond the context, as engines have them."""


def decode_candidates(batch: int, dim: int) -> list[tuple[int, D]]:
    """(block size, configuration)."""
    if batch == 1:
        return [(64, D(keys=64, stages=3, programs=2)), (64, D(keys=64, stages=3, programs=4)),
                (64, D(keys=64, stages=3, programs=2, least=2)), (64, D(keys=64, stages=5, programs=2, least=4)),
                (64, D(keys=64, stages=3, programs=2, tma=True)), (64, D(keys=32, stages=3, programs=4)),
                (64, D(keys=64, stages=5, programs=2, least=16)), (16, D(keys=64, stages=3, programs=2))]  # fmt: skip
    return [(64, D(keys=64, stages=5, programs=3)), (64, D(keys=64, stages=7, programs=2)),
            (64, D(keys=64, stages=7, programs=4)), (64, D(keys=64, stages=5, programs=8, least=2)),
            (64, D(keys=64, stages=5, programs=4, tma=True)), (128, D(keys=128, warps=8 if dim > 64 else 4, stages=5)),
            (64, D(keys=64, warps=2, stages=5, programs=4)), (16, D(keys=64, stages=5, programs=4))]  # fmt: skip


PREFILL_CANDIDATES = (
    (64, P()), (64, P(keys=128, stages=2)), (64, P(tma=True)), (64, P(rows=64, warps=4)),
    (64, P(rows=64, warps=4, tma=True)), (128, P(keys=128, stages=2, tma=True)),
    (64, P(tma=True, overlap=True)),
)  # fmt: skip
GATHERED_CANDIDATES = (
    P(keys=128, stages=2, tma=True), P(keys=128, stages=2, tma=True, overlap=True), P(rows=64, warps=4, tma=True),
)  # fmt: skip


@dataclass
class Problem:
    """A step with its caches."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    step: AttentionInputs
    lens: list[tuple[int, int]]


@dataclass
class Cell:
    """One line of the table."""

    name: str
    results: dict[str, float | str] = field(default_factory=dict)
    """Microseconds of each candidate, or why there are none."""
    rate: Callable[[float], str] = str

    def best(self) -> tuple[str, float] | None:
        times = {k: v for k, v in self.results.items() if isinstance(v, float)}
        return min(times.items(), key=lambda item: item[1]) if times else None


def problem(lens: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, block: int, copies: int = 1,
            dtype: torch.dtype = torch.bfloat16) -> list[Problem]:  # fmt: skip
    """The same step over `copies` caches of their own. The last block's unused cells hold NaN."""
    widths = [-(-seq // block) for _, seq in lens]
    total = sum(widths) + 1
    made = []
    for _ in range(copies):
        caches = [torch.randn((total, block, kv_heads, dim), device="cuda", dtype=dtype) for _ in range(2)]
        ids = (torch.randperm(total - 1, device="cuda") + 1).split(widths)
        table = torch.zeros((len(lens), max(widths) + CAPACITY), dtype=torch.int32, device="cuda")
        for i, (own, (_, seq)) in enumerate(zip(ids, lens, strict=True)):
            table[i, : len(own)] = own
            if seq % block:
                for cache in caches:
                    cache[own[-1], seq % block :] = float("nan")
        queries, seqs = [q for q, _ in lens], [s for _, s in lens]
        step = AttentionInputs(
            table, torch.tensor([0, *queries]).cumsum(0).to("cuda", torch.int32),
            torch.tensor(seqs, dtype=torch.int32, device="cuda"), queries, seqs,
            len(lens) if max(queries) == 1 else 0, max(queries), max(seqs))  # fmt: skip
        q = torch.randn((sum(queries), heads, dim), device="cuda", dtype=dtype)
        made.append(Problem(q, *caches, step, lens))
    return made


def error(p: Problem, out: Tensor, sinks: Tensor | None = None, cap: float | None = None,
          window: int | None = None) -> float:  # fmt: skip
    """Norm of the error over the norm of the result, on the last 256 queries of each request (its last tile too)."""
    wrong = norm = 0.0
    at = 0
    scale = p.q.shape[-1] ** -0.5
    for i, (queries, seq) in enumerate(p.lens):
        at += queries
        count = min(queries, 256)
        if i % max(len(p.lens) // 8, 1):
            continue
        k, v = (x.float() for x in gather_kv(p.k_cache, p.v_cache, p.step.block_table[i], seq, "NHD"))
        q = p.q[at - count : at].float().view(count, k.shape[1], -1, k.shape[2])
        scores = torch.einsum("qhgd,khd->hgqk", q, k) * scale
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        key, place = torch.arange(seq, device="cuda"), torch.arange(seq - count, seq, device="cuda").unsqueeze(1)
        hidden = key > place
        if window is not None:
            hidden |= key <= place - window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            extra = sinks.float().view(k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        expected = torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2)
        wrong += float((out[at - count : at].float() - expected).pow(2).sum())
        norm += float(expected.pow(2).sum())
    return (wrong / norm) ** 0.5


def graph_time(calls: list[Callable[[], Any]], repeats: int, rounds: int = 5) -> float:
    """Median microseconds of one of `calls`, recorded one after another `repeats` times in a graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    return timed(graph.replay, rounds) / (repeats * len(calls))


def timed(call: Callable[[], Any], rounds: int, calls: int = 1) -> float:
    """Median microseconds of a call, `calls` of them at a time; the device waits until they are launched."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[len(times) // 2]


def label(block: int, config: Any) -> str:
    defaults = type(config)._field_defaults
    parts = [f"{k}={v}" for k, v in config._asdict().items() if v != defaults[k]]
    return f"b{block} " + " ".join(parts)


def run_decode(p: Problem, config: D, out: Tensor) -> None:
    decode_attention.decode(p.q, p.k_cache, p.v_cache, p.step, out, p.q.shape[-1] ** -0.5, None, None, None, config)


def decode_cells(left: Callable[[], float]) -> Iterator[Cell]:
    for layout, (heads, kv_heads, dim) in LAYOUTS.items():
        for batch, context in DECODES:
            cell = Cell(f"decode {layout} {batch}x{context}")
            size = 2.0 * batch * context * kv_heads * dim * 2
            copies = int(min(max(1.2e8 // size, 1), 128))  # more than the second-level cache holds, as in a model
            cell.rate = partial(lambda size, us: f"{size / us / 1e6:.2f} TB/s", size)
            made: dict[int, list[Problem]] = {}
            for block, config in decode_candidates(batch, dim):
                name = label(block, config)
                if left() < 30:
                    cell.results[name] = "no time"
                    continue
                try:
                    if block not in made:
                        made[block] = problem([(1, context)] * batch, heads, kv_heads, dim, block, copies)
                    problems = made[block]
                    out = torch.empty_like(problems[0].q)
                    run_decode(problems[0], config, out)
                    wrong = error(problems[0], out)
                    if not wrong < TOLERANCE:
                        cell.results[name] = f"WRONG {wrong:.1e}"
                        continue
                    repeats = max(4, 16 // copies)
                    cell.results[name] = graph_time([partial(run_decode, p, config, out) for p in problems], repeats)
                except Exception as e:
                    cell.results[name] = _reason(e)
            yield cell


def prefill_cells(left: Callable[[], float], only: tuple[str, ...] = ("",)) -> Iterator[Cell]:
    """Prompts by the candidates whose names begin as `only` says."""
    for layout, (heads, kv_heads, dim) in LAYOUTS.items():
        for name, lens in PREFILLS:
            cell = Cell(f"prefill {layout} {name}")
            pairs = sum(q * (s - q) + q * (q + 1) / 2 for q, s in lens)
            cell.rate = partial(lambda flops, us: f"{flops / us / 1e6:.0f} TFLOP/s", 4.0 * pairs * heads * dim)
            made: dict[int, Problem] = {}
            for who, block, call in (c for c in prefill_calls() if c[0].startswith(only)):
                if left() < 3:
                    cell.results[who] = "no time"
                    continue
                try:
                    if block not in made:
                        (made[block],) = problem(lens, heads, kv_heads, dim, block)
                    p = made[block]
                    out = call(p)
                    wrong = error(p, out)
                    if not wrong < TOLERANCE:
                        cell.results[who] = f"WRONG {wrong:.1e}"
                        continue
                    cell.results[who] = timed(partial(call, p), rounds=3, calls=4)
                except Exception as e:
                    cell.results[who] = _reason(e)
            yield cell


def prefill_calls() -> Iterator[tuple[str, int, Callable[[Problem], Tensor]]]:
    """Name, block size and call of each variant; gathering is part of a call that needs it."""

    def triton(config: P, p: Problem) -> Tensor:
        out = torch.empty_like(p.q)
        prefill_attention.prefill(p.q, p.k_cache, p.v_cache, p.step, out, p.q.shape[-1] ** -0.5, None, None, None,
                                  config=config)  # fmt: skip
        return out

    def gathered(config: P, p: Problem) -> Tensor:
        out = torch.empty_like(p.q)
        chunks = chunks_in(p)
        k, v = gather(p.k_cache, p.v_cache, chunks)
        prefill_attention.prefill(p.q, k, v, p.step, out, p.q.shape[-1] ** -0.5, None, None, None, chunks.key_start,
                                  config)  # fmt: skip
        return out

    def library(attend: gathered_attention.Attend, p: Problem) -> Tensor:
        chunks = chunks_in(p)
        return attend(p.q, *gather(p.k_cache, p.v_cache, chunks), chunks, p.q.shape[-1] ** -0.5, None, None)

    def flashinfer(backend: str, p: Problem) -> Tensor:
        return flashinfer_attention.attention(
            p.q, p.k_cache, p.v_cache, p.step, None, scale=p.q.shape[-1] ** -0.5, window=None, soft_cap=None,
            backend=backend,
        )  # fmt: skip

    def hopper(p: Problem) -> Tensor:
        out = torch.empty_like(p.q)
        prefill_hopper.prefill(p.q, p.k_cache, p.v_cache, p.step, out, p.q.shape[-1] ** -0.5)
        return out

    yield "hopper", 64, hopper
    yield "fa3", 64, partial(library, gathered_attention._fa3)
    yield "flash", 64, partial(library, gathered_attention._flash)
    for backend in ("fa3", "fa2"):
        yield f"flashinfer {backend}", 64, partial(flashinfer, backend)
    for config in GATHERED_CANDIDATES:
        yield f"gathered {label(0, config)[3:]}", 64, partial(gathered, config)
    for block, config in PREFILL_CANDIDATES:
        yield f"triton {label(block, config)}", block, partial(triton, config)


def chunks_in(p: Problem) -> gathered_attention.Chunks:
    """The chunks of a step, made once for all layers, as the kernel does."""
    chunks = p.step.once(chunks_of, p.k_cache.shape[1], None)
    assert chunks is not None
    return chunks


FEATURE_DIMS = ((64, torch.float16), (80, torch.bfloat16), (96, torch.bfloat16), (128, torch.float32),
                (256, torch.bfloat16))  # fmt: skip
FEATURE_STEPS = ([(1, 300), (1, 1), (1, 4097)], [(70, 70), (300, 1000)])


def run_feature(dim: int, dtype: torch.dtype, lens: list[tuple[int, int]], *, plain: bool) -> str:
    """Check one step that the timed problems leave out; unless `plain`, with a window, sinks and a soft cap."""
    (p,) = problem(lens, 8, 2, dim, 32, dtype=dtype)
    window, cap, sinks = (None, None, None) if plain else (200, 10.0, torch.randn(8, device="cuda"))
    out = torch.empty_like(p.q)
    call = decode_attention.decode if p.step.num_decodes else prefill_attention.prefill
    call(p.q, p.k_cache, p.v_cache, p.step, out, dim**-0.5, window, sinks, cap)
    wrong = error(p, out, sinks, cap, window)
    return f"{wrong:.0e}" if wrong < (1e-5 if dtype is torch.float32 else TOLERANCE) else f"WRONG {wrong:.1e}"


def features() -> Iterator[Cell]:
    """Other head dims and dtypes, windows, sinks and soft caps."""
    for dim, dtype in FEATURE_DIMS:
        cell = Cell(f"correct d{dim} {str(dtype)[6:]}")
        for lens, plain in itertools.product(FEATURE_STEPS, (True, False)):
            name = f"{'decodes' if lens[0][0] == 1 else 'chunks'} {'plain' if plain else 'w200 cap10 sinks'}"
            try:
                cell.results[name] = run_feature(dim, dtype, lens, plain=plain)
            except Exception as e:
                cell.results[name] = _reason(e)
        yield cell


def compile_all() -> None:
    """Fill Triton's cache from several processes, a share of the candidates each."""
    parts = [subprocess.Popen([sys.executable, __file__, "--compile", str(i)]) for i in range(PROCESSES)]
    for part in parts:
        part.wait()


def compile_share(index: int) -> None:
    """Run every candidate of this share once, on small problems that take the same kernels."""
    jobs: dict[Any, list[Callable[[], Any]]] = {}
    for layout, (heads, kv_heads, dim) in LAYOUTS.items():
        for batch, context in ((1, 256), (1, 4096), (64, 130), (8, 4096), (256, 70)):
            for block, config in decode_candidates(batch, dim):
                kernel = (layout, block, config._replace(programs=0, least=0))
                lens = [(1, context)] * batch
                jobs.setdefault(kernel, []).append(partial(_run_small, lens, heads, kv_heads, dim, block, config))
        for who, block, call in prefill_calls():
            if who not in LIBRARIES:
                jobs[layout, who] = [partial(_call_small, call, heads, kv_heads, dim, block)]
    for (dim, dtype), lens, plain in itertools.product(FEATURE_DIMS, FEATURE_STEPS, (True, False)):
        jobs[dim, lens[0], plain] = [partial(run_feature, dim, dtype, lens, plain=plain)]
    for kernel in list(jobs)[index::PROCESSES]:
        for job in jobs[kernel]:
            try:
                job()
            except Exception as e:
                print(f"does not run: {kernel}: {_reason(e)}")
    torch.cuda.synchronize()


def _run_small(lens: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, block: int, config: D) -> None:
    (p,) = problem(lens, heads, kv_heads, dim, block)
    run_decode(p, config, torch.empty_like(p.q))


def _call_small(call: Callable[[Problem], Tensor], heads: int, kv_heads: int, dim: int, block: int) -> None:
    call(problem([(300, 300)], heads, kv_heads, dim, block)[0])


def _reason(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0][:60]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="print every candidate")
    parser.add_argument("--compile", type=int, help="only compile this share of the candidates")
    parser.add_argument("--only", nargs="+", metavar="PREFIX",
                        help="measure prompts alone, by candidates named so: fa3 flash flashinfer")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=DEADLINE_S)
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(0)
    if arguments.compile is not None:
        compile_share(arguments.compile)
        return
    print(torch.cuda.get_device_name(), torch.__version__)

    def left() -> float:
        return arguments.seconds - (time.monotonic() - began)

    sources = [prefill_cells(left, tuple(arguments.only or ("",)))]
    if not arguments.only:
        compile_all()
        print(f"compiled after {time.monotonic() - began:.0f} s")
        sources = [features(), decode_cells(left), *sources]
    cells: list[Cell] = []
    for source in sources:
        for cell in source:
            cells.append(cell)
            best = cell.best()
            if best is None or cell.name.startswith("correct"):
                bad = [f"{k}: {v}" for k, v in cell.results.items() if "WRONG" in str(v) or ":" in str(v)]
                print(f"{cell.name:30} {'; '.join(bad) or 'ok'}", flush=True)
            else:
                print(f"{cell.name:30} {best[1]:9.1f} us {cell.rate(best[1]):>12}  {best[0]}", flush=True)
            if (arguments.all or cell.name.startswith("prefill")) and best is not None:
                for name, result in cell.results.items():
                    told = f"{result:9.1f} us {cell.rate(result):>12}" if isinstance(result, float) else result
                    print(f"    {told}  {name}")
    out = Path(os.environ.get("OUT", "."))
    rows = [{"cell": c.name, "results": c.results, "best": c.best()} for c in cells]
    (out / "attention.json").write_text(json.dumps(rows, indent=1))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
