"""Linear layers of few rows, where reading the weight is most of the work: one row by dot products, up to 256 by
matrix instructions with the weight as their left side. Both with the gating of SwiGLU if asked for.

Many rows are cuBLAS's business (`torch.nn.functional.linear`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hotplug.platforms.cuda.kernels import gpu, linear_hopper, pdl
from hotplug.platforms.cuda.kernels.dense import silu_mul
from hotplug.platforms.cuda.target import target
from hotplug.platforms.cuda.tuning import Case, Config, Key, Tunable, bucket, tuned
from hotplug.vendor import SiteSpec

MOST_ROWS = 256
"""Rows of `x` that `skinny` takes."""
_COUNTERS = 1 << 16
_SHARED = 227 << 10
"""Bytes of shared memory that a program may have on Hopper."""


@triton.jit
def _gate(gate, up, dtype: tl.constexpr):
    """SwiGLU's gating of two sums, rounded where the separate operations round."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (silu * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _gemv(x, weight, bias, out, N, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr,
          GATED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program ROWS outputs of one row x [K]; the first COLS of their weights are read before x is waited for."""
    pdl.release(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    there = (rows < N)[:, None]
    source = weight + rows[:, None].to(tl.int64) * K + cols[None, :]
    more = N.to(tl.int64) * K  # from gate to up
    mask = there if EVEN else there & (cols < K)[None, :]
    value = tl.load(source, mask=mask, other=0.0)
    if GATED:
        value_up = tl.load(source + more, mask=mask, other=0.0)
    pdl.wait(PDL)
    vector = tl.load(x + cols).to(tl.float32) if EVEN else tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
    total = value.to(tl.float32) * vector[None, :]
    if GATED:
        total_up = value_up.to(tl.float32) * vector[None, :]
    for start in range(COLS, K, COLS):
        if EVEN:
            mask = there
            vector = tl.load(x + start + cols).to(tl.float32)
        else:
            mask = there & (start + cols < K)[None, :]
            vector = tl.load(x + start + cols, mask=start + cols < K, other=0.0).to(tl.float32)
        total += tl.load(source + start, mask=mask, other=0.0).to(tl.float32) * vector[None, :]
        if GATED:
            total_up += tl.load(source + more + start, mask=mask, other=0.0).to(tl.float32) * vector[None, :]
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    if GATED:
        result_up = tl.sum(total_up, 1)
        if BIAS:
            result_up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)
        tl.store(out + rows, _gate(result, result_up, x.dtype.element_ty), mask=rows < N)
    else:
        tl.store(out + rows, result, mask=rows < N)


@triton.jit(do_not_specialize=["M"])
def _skinny(x, tiles_of_x, tiles_of_weight, tiles_of_out, bias, out, partial, counters, M, N, K: tl.constexpr,
            TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PROGRAMS: tl.constexpr, SPLIT: tl.constexpr,
            STAGES: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ALIGNED: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """All M <= TOKENS rows of x; tiles of ROWS outputs times steps over K, dealt evenly to the programs (stream-K,
    Osama et al., 2023).

    SPLIT: whether some tile has several programs. Of those the last one to end sums their parts, in order, so that the
    result is always the same. What a descriptor reads beyond its tensor is 0, and what it writes there is dropped.
    """
    pdl.release(PDL)
    steps: tl.constexpr = triton.cdiv(K, COLS)
    tiles = tl.cdiv(N, ROWS)
    share = tl.cdiv(tiles * steps, PROGRAMS)
    at = tl.program_id(0) * share
    end = tl.minimum(at + share, tiles * steps)
    pdl.wait(PDL)
    tokens = tl.arange(0, TOKENS)
    cells = tl.arange(0, ROWS)[:, None] * TOKENS + tokens[None, :]
    size: tl.constexpr = ROWS * TOKENS * (2 if GATED else 1)
    most = (steps - 1) // share + 2  # parts that a tile can have
    while at < end:
        tile = at // steps
        begin = at - tile * steps
        stop = tl.minimum(end - tile * steps, steps)
        rows = tile * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        total_up = tl.zeros([ROWS, TOKENS], tl.float32)
        for step in tl.range(begin, stop, num_stages=STAGES):
            vectors = tl.trans(tiles_of_x.load([0, step * COLS]))
            value = tiles_of_weight.load([tile * ROWS, step * COLS])
            total = tl.dot(value, vectors, total, input_precision="ieee")
            if GATED:
                value_up = tiles_of_weight.load([N + tile * ROWS, step * COLS])
                total_up = tl.dot(value_up, vectors, total_up, input_precision="ieee")
        last = True
        if SPLIT and stop - begin < steps:
            first = tile * steps // share
            parts = (tile * steps + steps - 1) // share - first + 1
            place = partial + tile.to(tl.int64) * most * size + cells
            tl.store(place + (tl.program_id(0) - first) * size, total)
            if GATED:
                tl.store(place + (tl.program_id(0) - first) * size + ROWS * TOKENS, total_up)
            tl.debug_barrier()  # every thread's part is written before it is counted
            last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == parts - 1
            if last:
                tl.store(counters + tile, 0)
                total = tl.zeros([ROWS, TOKENS], tl.float32)
                total_up = tl.zeros([ROWS, TOKENS], tl.float32)
                for i in tl.range(0, parts, num_stages=1):
                    total += tl.load(place + i * size, cache_modifier=".cg")
                    if GATED:
                        total_up += tl.load(place + i * size + ROWS * TOKENS, cache_modifier=".cg")
        if last:
            if BIAS:
                total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
            if GATED:
                if BIAS:
                    total_up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
                result = _gate(total, total_up, x.dtype.element_ty)
            else:
                result = total.to(out.dtype.element_ty)
            if ALIGNED:
                tiles_of_out.store([0, tile * ROWS], tl.trans(result))
            else:
                mask = (rows < N)[:, None] & (tokens < M)[None, :]
                tl.store(out + tokens[None, :].to(tl.int64) * N + rows[:, None], result, mask=mask)
        at = tile * steps + stop


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that `_skinny` counts in and leaves zero."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, dtype: torch.dtype, rows: int, cols: int,
         warps: int) -> Tensor:  # fmt: skip
    """`x` [1, K] times `weight` [N or 2N, K] transposed, gated if asked; [1, N] of `dtype`."""
    k, n = weight.shape[1], weight.shape[0] // (2 if gated else 1)
    out = torch.empty((1, n), dtype=dtype, device=x.device)
    cols = min(cols, triton.next_power_of_2(k))
    _gemv[(triton.cdiv(n, rows),)](x, weight, bias, out, n, k, rows, cols, k % cols == 0, gated, bias is not None,
                                   num_warps=warps, **pdl.options(x.device))  # fmt: skip
    return out


def skinny(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, dtype: torch.dtype, rows: int, cols: int,
           programs: int, stages: int, warps: int) -> Tensor:  # fmt: skip
    """`x` [M <= 256, K] times `weight` [N or 2N, K] transposed, gated if asked; [M, N] of `dtype`."""
    m, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    tokens = max(triton.next_power_of_2(m), 16)
    tiles, steps = triton.cdiv(n, rows), triton.cdiv(k, cols)
    share = triton.cdiv(tiles * steps, programs)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    partial: Any = out
    split = share % steps != 0
    if split:
        size = tiles * ((steps - 1) // share + 2) * rows * tokens * (2 if gated else 1)
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    tiles_of_x = TensorDescriptor.from_tensor(x, [tokens, cols])
    tiles_of_weight = TensorDescriptor.from_tensor(weight, [rows, cols])
    aligned = n * out.element_size() % 16 == 0
    tiles_of_out = TensorDescriptor.from_tensor(out, [tokens, rows]) if aligned else tiles_of_x
    _skinny[(programs,)](x, tiles_of_x, tiles_of_weight, tiles_of_out, bias, out, partial, _counters(x.device), m, n, k,
                         tokens, rows, cols, programs, split, stages, gated, bias is not None, aligned,
                         num_warps=warps, **pdl.options(x.device))  # fmt: skip
    return out


def _with(config: Config, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gated: bool) -> Tensor:
    """The product by the kernel that `config` names, or by cuBLAS."""
    kernel, options = config["kernel"], {k: v for k, v in config.items() if k != "kernel"}
    if kernel == "gemv":
        return gemv(x, weight, bias, gated=gated, dtype=dtype, **options)
    if kernel == "skinny":
        return skinny(x, weight, bias, gated=gated, dtype=dtype, **options)
    if kernel == "stream":
        return linear_hopper.stream(x, weight, bias, gated=gated, dtype=dtype, **options)
    if gated:
        return silu_mul(F.linear(x, weight, bias))
    if dtype != x.dtype and bias is None and x.is_cuda and len(x):  # without a narrow result to convert
        return torch.mm(x, weight.t(), out_dtype=dtype)
    return F.linear(x, weight, bias).to(dtype)


def _default(key: Key) -> Config:
    """What serves shapes that nobody measured, from Hopper on: what was best on most of those that were (one H200)."""
    n, k, tokens, gated = key["n"], key["k"], key["tokens"], key.kernel == "linear_silu_mul"
    if tokens == 1:
        return {"kernel": "gemv", "rows": 1 if gated else 2, "cols": 1024 if gated or k <= 2048 else 2048, "warps": 4}
    if key.dtype == "float32" or tokens > 64 or k % 8 or k < 1024:
        return _PLAIN
    if key.kernel == "logits" and tokens > 16:
        return {"kernel": "skinny", "rows": 128, "cols": 64, "programs": triton.cdiv(n, 128), "stages": 4, "warps": 4}
    if gated or key.kernel == "logits":
        return {"kernel": "skinny", "rows": 64, "cols": 128, "programs": triton.cdiv(n, 64),
                "stages": 5 if tokens <= 16 else 4, "warps": 4}  # fmt: skip
    if tokens <= 16:
        return {"kernel": "skinny", "rows": 64, "cols": 256, "programs": 132, "stages": 4, "warps": 4}
    return _PLAIN


def _on_hopper(key: Key) -> Config:
    """`_default` with `stream`, which is for Hopper alone, where it was better."""
    n, k, tokens, gated = key["n"], key["k"], key["tokens"], key.kernel == "linear_silu_mul"
    if key.dtype != "bfloat16" or not 1 < tokens <= 64 or k % 8 or k < 1024 or key.kernel == "logits":
        return _default(key)
    cols, stages = (256, 5) if tokens <= 16 and not gated else (128, 5 if tokens <= 16 else 4 if gated else 6)
    return {"kernel": "stream", "rows": 64, "cols": cols, "stages": stages, "programs": even(triton.cdiv(n, 64)),
            "warps": 4}  # fmt: skip


def even(tiles: int, most: int = 132) -> int:
    """Programs, `most` at most, that share `tiles` evenly: several tiles each, or several programs a tile.

    `most` itself where that would leave more than a third of them without work.
    """
    each = triton.cdiv(tiles, most)
    programs = tiles * (most // tiles) if tiles <= most else tiles // each if tiles % each == 0 else most
    return programs if 3 * programs >= 2 * most else most


_PLAIN: Config = {"kernel": "library"}
"""Also of GPUs before Hopper: the defaults rest on copies by descriptor."""


def _serves(config: Config, key: Key) -> bool:
    """Whether a configuration can take so many rows: it may have been measured for fewer."""
    tokens = key["tokens"]
    match config["kernel"]:
        case "gemv":
            return tokens == 1
        case "stream":
            return tokens <= linear_hopper.MOST_ROWS
        case "skinny":
            return _shared(config["rows"], config["cols"], config["stages"], key) <= _SHARED
    return True


def _shared(rows: int, cols: int, stages: int, key: Key) -> int:
    """Bytes of shared memory that `skinny` takes, about."""
    weights = rows * (2 if key.kernel == "linear_silu_mul" else 1)
    return stages * cols * (4 if key.dtype == "float32" else 2) * (weights + max(16, key["tokens"])) + 2048


def _streams(device: torch.device) -> bool:
    """Whether `stream` runs there."""
    return device.type != "cpu" and gpu.capability(device) == gpu.HOPPER


def _few(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    name = str(x.dtype).removeprefix("torch.")
    gated = op == "linear_silu_mul"
    if not 0 < x.shape[0] <= MOST_ROWS:  # a step that samples nothing has no row to score
        return _with(_PLAIN, x, weight, bias, dtype, gated=gated)
    shape = {"n": weight.shape[0] // (2 if gated else 1), "k": weight.shape[1], "tokens": x.shape[0]}
    config = tuned(target(x.device)).lookup(op, name, **shape)
    key = Key.of(op, name, {**shape, "tokens": bucket(x.shape[0])})
    if config is None or not _serves(config, key):
        if _streams(x.device):
            config = _on_hopper(key)
        else:
            config = _default(key) if gpu.capability(x.device) >= gpu.HOPPER else _PLAIN
    return _with(config, x, weight, bias, dtype, gated=gated)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `linear`, for few rows."""
    return _few("linear", x, weight, bias, x.dtype)


def linear_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `linear_silu_mul`, for few rows."""
    return _few("linear_silu_mul", x, weight, bias, x.dtype)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `logits`, for any number of rows: float32 at once."""
    return _few("logits", hidden, weight, bias, torch.float32)


def candidates(key: Key) -> Iterator[Config]:
    """cuBLAS, and what may be better for so many rows."""
    yield {"kernel": "library"}
    gated = key.kernel == "linear_silu_mul"
    if key["tokens"] == 1:
        for rows, cols, warps in ((1, 1024, 4), (1, 2048, 4), (2, 1024, 4), (2, 2048, 4), (4, 1024, 4), (4, 2048, 8)):
            yield {"kernel": "gemv", "rows": rows, "cols": cols, "warps": warps}
        return
    tokens, size = max(16, key["tokens"]), 4 if key.dtype == "float32" else 2
    if key["k"] * size % 16:  # a descriptor's rows begin at multiples of 16 bytes
        return
    small = ((64, 128, 5, 4), (64, 256, 4, 4), (128, 64, 6, 4), (128, 128, 4, 8))
    if key["tokens"] <= 64 and key.dtype == "bfloat16":
        tiles = triton.cdiv(key["n"], 64)
        for cols, stages in ((128, 10), (256, 5)) if tokens <= 16 else ((128, 6), (64, 8)):
            for programs in sorted({even(tiles), min(tiles, 132), 132}):
                yield {"kernel": "stream", "rows": 64, "cols": cols, "stages": stages // (2 if gated else 1),
                       "programs": programs, "warps": 4}  # fmt: skip
    middle = ((64, 64, 4, 4), (64, 64, 6, 4), (64, 128, 3, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 4, 8),
              (128, 128, 4, 8))  # fmt: skip
    large = ((64, 64, 4, 8), (64, 64, 3, 8), (128, 64, 4, 8), (128, 64, 3, 8))
    for rows, cols, stages, warps in small if tokens <= 32 else middle if tokens <= 64 else large:
        shared = _shared(rows, cols, stages, key)
        if shared > _SHARED or rows * tokens * (2 if gated else 1) > 64 * 128 * warps:  # registers for the sums
            continue
        tiles = triton.cdiv(key["n"], rows)
        for programs in sorted({132, 264, tiles, 2 * tiles}):
            if 100 <= programs <= max(tiles, 528) and (programs != 264 or 2 * shared < _SHARED):
                yield {"kernel": "skinny", "rows": rows, "cols": cols, "programs": programs, "stages": stages,
                       "warps": warps}  # fmt: skip


def _sizes(spec: SiteSpec) -> dict[str, int] | None:
    if spec["scheme"] != "none":
        return None
    names = {"linear": ("out_features", "in_features"), "linear_silu_mul": ("width", "in_features"),
             "logits": ("vocab", "hidden")}[spec.op]  # fmt: skip
    return dict(zip("nk", (spec[name] for name in names), strict=True))


def _case(key: Key, device: torch.device) -> Case:
    dtype, gated = getattr(torch, key.dtype), key.kernel == "linear_silu_mul"
    x = torch.randn((key["tokens"], key["k"]), device=device, dtype=dtype)
    weight = torch.randn((key["n"] * (2 if gated else 1), key["k"]), device=device, dtype=dtype) / key["k"] ** 0.5
    out = torch.float32 if key.kernel == "logits" else dtype

    def reference() -> Tensor:
        return _with({"kernel": "library"}, x, weight, None, out, gated=gated)

    return Case(lambda config: _with(config, x, weight, None, out, gated=gated), reference,
                weight.numel() * weight.element_size())  # fmt: skip


TUNABLES = tuple(
    Tunable(op, op, shape=_sizes, default=_default, candidates=candidates, make=_case, tokens=(1, 16, 64, 256))
    for op in ("linear", "linear_silu_mul", "logits")
)
