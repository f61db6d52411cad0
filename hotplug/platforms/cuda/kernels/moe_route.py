"""Routing of a mixture of experts: scores of all experts, then the best few and their shares.

Two kernels, since one program reads a router's weight far too slowly: 512 KB of Qwen3-30B's at 64 bytes a cycle take
5 us, and they come from memory, not the cache, with 6 GB of other weights between two uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hotplug.platforms.cuda.kernels import pdl

FEW_TOKENS = 16
"""Up to here the scores come from `_scores`, which reads the weight before it waits; above it from cuBLAS."""
WIDEST = 8192
"""Elements of a weight's row that `_scores` keeps in registers."""


@triton.jit(do_not_specialize=["tokens"])
def _scores(x, weight, out, x_stride, tokens, experts, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """A program some rows of weight [experts, HIDDEN], for all tokens of x; out [tokens, experts] in x's dtype."""
    pdl.release(PDL)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = cols < HIDDEN
    mask = (rows < experts)[:, None] & inside[None, :]
    tile = tl.load(weight + rows[:, None] * HIDDEN + cols[None, :], mask=mask, other=0.0)
    pdl.wait(PDL)
    for token in range(tokens):
        row = tl.load(x + token * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(tile.to(tl.float32) * row[None, :], 1)
        tl.store(out + token * experts + rows, score.to(out.dtype.element_ty), mask=rows < experts)


@triton.jit
def _best(scores, weights, chosen, experts, RENORMALIZE: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
          SLOTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program a token: its TOP_K experts by score, and their softmax."""
    pdl.release(PDL)
    pdl.wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    ids, slots = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    # + 0.0 makes -0.0 a zero, which the order of bits would tell apart from it.
    score = tl.load(scores + token * experts + ids, mask=ids < experts, other=float("-inf")).to(tl.float32) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    # One key to take the largest of: the score above, and below it what makes the lower expert the larger.
    keys = (ordered.to(tl.int64) << 32) | (BLOCK - 1 - ids)
    least: tl.constexpr = -(1 << 63)
    keys = tl.where(ids < experts, keys, least)
    best_score = tl.full([SLOTS], float("-inf"), tl.float32)
    best = tl.zeros([SLOTS], tl.int32)
    for i in tl.static_range(TOP_K):
        key = tl.max(keys, 0)
        top = (key >> 32).to(tl.int32)
        value = tl.where(top < 0, top ^ 0x7FFFFFFF, top).to(tl.float32, bitcast=True)
        best_score = tl.where(slots == i, value, best_score)
        best = tl.where(slots == i, BLOCK - 1 - (key & 0xFFFFFFFF).to(tl.int32), best)
        keys = tl.where(keys == key, least, keys)
    largest = tl.max(score, 0)
    share = tl.exp(best_score - largest)
    odds = share if RENORMALIZE else tl.exp(score - largest)
    share = share / tl.sum(odds, 0)
    tl.store(weights + token * TOP_K + slots, share, mask=slots < TOP_K)
    tl.store(chosen + token * TOP_K + slots, best, mask=slots < TOP_K)


def moe_route(x: Tensor, weight: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`x` [num_tokens, hidden], `weight` [num_experts, hidden]; float32 weights and int32 experts."""
    tokens, experts = x.shape[0], weight.shape[0]
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=x.device)
    chosen = torch.empty((tokens, top_k), dtype=torch.int32, device=x.device)
    if tokens:
        scores = _score(x, weight)
        block = max(triton.next_power_of_2(experts), 32)
        _best[(tokens,)](
            scores, weights, chosen, experts, renormalize, top_k, block, triton.next_power_of_2(top_k),
            num_warps=1 if block <= 256 else 4, **pdl.options(x.device),
        )  # fmt: skip
    return weights, chosen


def _score(x: Tensor, weight: Tensor) -> Tensor:
    """[num_tokens, num_experts] in the dtype of `x`."""
    tokens, (experts, hidden) = x.shape[0], weight.shape
    if tokens > FEW_TOKENS or hidden > WIDEST:
        return F.linear(x, weight)
    scores = torch.empty((tokens, experts), dtype=x.dtype, device=x.device)
    cols = triton.next_power_of_2(hidden)
    rows = 2 if cols <= 4096 else 1
    _scores[(triton.cdiv(experts, rows),)](
        x, weight, scores, x.stride(0), tokens, experts, hidden, rows, cols, num_warps=4 if cols <= 4096 else 8,
        **pdl.options(x.device),
    )  # fmt: skip
    return scores
