"""Norms, activations and rotation: one pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotplug.platforms.cuda.kernels import pdl
from hotplug.platforms.cuda.target import target
from hotplug.platforms.cuda.tuning import Case, Config, Key, Tunable, tuned


@triton.jit
def _rms_norm(x, weight, out, inner, outer_stride, inner_stride, n, eps, BLOCK: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    """A program a row of x [outer, inner, n]; out is dense."""
    pdl.release(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    factor = tl.load(weight + cols, mask=mask)
    pdl.wait(PDL)
    source = x + (row // inner) * outer_stride + (row % inner) * inner_stride
    value = tl.load(source + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / n + eps)
    normed = (value * scale).to(x.dtype.element_ty)
    tl.store(out + row * n + cols, normed * factor, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [num_tokens, n] or [num_tokens, heads, n], rows dense in the last dimension."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        n = x.shape[-1]
        inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
        block = triton.next_power_of_2(n)
        _rms_norm[(x.shape[0] * inner,)](x, weight, out, inner, x.stride(0), inner_stride, n, eps, BLOCK=block,
                                         num_warps=_warps(block), **pdl.options(x.device))  # fmt: skip
    return out


@triton.jit
def _add_rms_norm(x, residual, weight, out, total, x_stride, residual_stride, n, eps, BLOCK: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    pdl.release(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    factor = tl.load(weight + cols, mask=mask)
    pdl.wait(PDL)
    value = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual + row * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
    rounded = value.to(x.dtype.element_ty)
    tl.store(total + row * n + cols, rounded, mask=mask)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / n + eps)
    normed = (wide * scale).to(x.dtype.element_ty)
    tl.store(out + row * n + cols, normed * factor, mask=mask)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[num_tokens, n] each; the normalized sum, and the sum."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel():
        n = x.shape[-1]
        block = triton.next_power_of_2(n)
        _add_rms_norm[(x.shape[0],)](x, residual, weight, out, total, x.stride(0), residual.stride(0), n, eps,
                                     BLOCK=block, num_warps=_warps(block), **pdl.options(x.device))  # fmt: skip
    return out, total


@triton.jit
def _silu_mul(gate_up, out, stride, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl.release(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    gate = tl.load(gate_up + row * stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + n + cols, mask=mask, other=0.0)
    silu = (gate / (1 + tl.exp(-gate))).to(gate_up.dtype.element_ty)
    tl.store(out + row * n + cols, silu * up, mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[num_tokens, 2n] to [num_tokens, n]."""
    tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    dtype = str(gate_up.dtype).removeprefix("torch.")
    config = tuned(target(gate_up.device)).lookup("silu_mul", dtype, width=n, tokens=tokens)
    return _silu_mul_with(gate_up, config or _silu_mul_default(n))


def _silu_mul_default(n: int) -> Config:
    return {"BLOCK": min(triton.next_power_of_2(n), 1024), "num_warps": 4}


def _silu_mul_with(gate_up: Tensor, config: Config) -> Tensor:
    tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, n), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _silu_mul[(tokens, triton.cdiv(n, config["BLOCK"]))](gate_up, out, gate_up.stride(0), n, **config,
                                                             **pdl.options(gate_up.device))  # fmt: skip
    return out


def _silu_mul_case(key: Key, device: torch.device) -> Case:
    n, tokens = key["width"], key["tokens"]
    x = torch.randn((tokens, 2 * n), device=device).to(getattr(torch, key.dtype))

    def reference() -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.float()).to(x.dtype) * up

    return Case(lambda config: _silu_mul_with(x, config), reference, 3 * tokens * n * x.element_size())


@triton.jit
def _rope(q, k, q_out, k_out, positions, cos_sin, q_token, q_head, k_token, k_head, heads, kv_heads, dim, half,
          BLOCK: tl.constexpr):  # fmt: skip
    """A program a token and head; the first `heads` are the queries'."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * half)
    if head < heads:  # a pointer to one or the other is more than AMD's compiler takes
        _rotate(q + token * q_token + head * q_head, q_out + (token * heads + head) * dim, table, dim, half, BLOCK)
    else:
        head -= heads
        _rotate(k + token * k_token + head * k_head, k_out + (token * kv_heads + head) * dim, table, dim, half, BLOCK)


@triton.jit
def _rotate(source, target, table, dim, half, BLOCK: tl.constexpr):
    """One head: [dim], of which the first two halves are rotated."""
    cols = tl.arange(0, BLOCK)
    mask = cols < half
    cos, sin = tl.load(table + cols, mask=mask), tl.load(table + half + cols, mask=mask)
    first = tl.load(source + cols, mask=mask).to(tl.float32)
    second = tl.load(source + half + cols, mask=mask).to(tl.float32)
    tl.store(target + cols, first * cos - second * sin, mask=mask)
    tl.store(target + half + cols, second * cos + first * sin, mask=mask)
    for start in range(2 * half, dim, BLOCK):  # dimensions that are not rotated
        rest = start + cols
        tl.store(target + rest, tl.load(source + rest, mask=rest < dim), mask=rest < dim)


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """`q` [num_tokens, heads, head_dim] and `k` [num_tokens, kv_heads, head_dim], new tensors."""
    tokens, heads, dim = q.shape
    kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if tokens:
        _rope[(tokens, heads + kv_heads)](
            q, k, q_out, k_out, positions, cos_sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), heads,
            kv_heads, dim, half, BLOCK=max(triton.next_power_of_2(half), 16), num_warps=1,
        )  # fmt: skip
    return q_out, k_out


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


TUNABLES = (
    Tunable(
        kernel="silu_mul",
        op="silu_mul",
        shape=lambda spec: {"width": spec["width"]},
        default=lambda key: _silu_mul_default(key["width"]),
        candidates=lambda key: [
            {"BLOCK": block, "num_warps": warps}
            for block in (256, 512, 1024, 2048, 4096)
            for warps in (1, 2, 4, 8)
            if block <= triton.next_power_of_2(key["width"]) and 32 * warps <= block <= 1024 * warps
        ],
        make=_silu_mul_case,
    ),
)
