"""Linear layers: which kernel or library serves how many rows, by what was measured on the device.

One row goes to `gemv`, some to `stream` on Hopper or to `skinny`, many to cuBLAS. `hotplug tune` measures.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from hotplug.platforms.cuda.kernels import gpu, linear_hopper
from hotplug.platforms.cuda.kernels.dense import silu_mul
from hotplug.platforms.cuda.kernels.linear_few import MOST_ROWS, gemv, skinny
from hotplug.platforms.cuda.target import target
from hotplug.platforms.cuda.tuning import Case, Config, Key, Tunable, bucket, tuned
from hotplug.vendor import SiteSpec

_SHARED = 227 << 10
"""Bytes of shared memory that a program may have on Hopper."""


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


def library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op `linear` by cuBLAS, for any number of rows."""
    return F.linear(x, weight, bias)


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
