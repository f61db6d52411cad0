"""Penalties and log-probabilities: one pass over the vocabulary each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096


@triton.jit
def _penalties(logits, stride, seen, seen_stride, counts, counts_stride, repetition, presence, frequency, out, vocab,
               CHUNK: tl.constexpr):  # fmt: skip
    """A program a chunk and row."""
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.program_id(1).to(tl.int64)
    inside = token < vocab
    x = tl.load(logits + row * stride + token, mask=inside)
    count = tl.load(counts + row * counts_stride + token, mask=inside, other=0)
    occurred = (tl.load(seen + row * seen_stride + token, mask=inside, other=0) != 0) | (count > 0)
    factor = tl.where(occurred, tl.load(repetition + row), 1.0)
    x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
    x = x - tl.load(frequency + row) * count - tl.where(count > 0, tl.load(presence + row), 0.0)
    tl.store(out + row * vocab + token, x, mask=inside)


def penalties(
    logits: Tensor,
    prompt_seen: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Float32 `logits` [rows, vocab] to a new tensor."""
    rows, vocab = logits.shape
    out = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
    repetition, presence, frequency = repetition.contiguous(), presence.contiguous(), frequency.contiguous()
    if rows:
        _penalties[(triton.cdiv(vocab, CHUNK), rows)](
            logits, logits.stride(0), prompt_seen.view(torch.uint8), prompt_seen.stride(0), output_counts,
            output_counts.stride(0), repetition, presence, frequency, out, vocab, CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def _log_sums(logits, stride, tokens, vocab, best, mass, better, CHUNK: tl.constexpr):
    """A program a chunk and row: its best logit, its mass relative to that, and how many are above the token's."""
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.program_id(1).to(tl.int64)
    part = row * tl.num_programs(0) + tl.program_id(0)
    x = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf"))
    chosen = tl.load(logits + row * stride + tl.load(tokens + row))
    top = tl.max(x, 0)
    tl.store(best + part, top)
    tl.store(mass + part, tl.sum(tl.where(x > float("-inf"), tl.exp(x - top), 0.0), 0))
    tl.store(better + part, tl.sum((x > chosen).to(tl.int32), 0))


@triton.jit
def _merge_sums(logits, stride, tokens, chunks, best, mass, better, log_sum, chosen, rank, CHUNKS: tl.constexpr):
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, CHUNKS)
    place, there = row * chunks + part, part < chunks
    peaks = tl.load(best + place, mask=there, other=float("-inf"))
    top = tl.max(peaks, 0)
    total = tl.sum(tl.load(mass + place, mask=there, other=0.0) * tl.exp(peaks - top), 0)
    log = top + tl.log(total)
    tl.store(log_sum + row, log)
    tl.store(chosen + row, tl.load(logits + row * stride + tl.load(tokens + row)) - log)
    tl.store(rank + row, tl.sum(tl.load(better + place, mask=there, other=0), 0).to(tl.int64) + 1)


def logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float32 `logits` [rows, vocab] and int64 `tokens` [rows]; the best `num_top` are torch's."""
    (rows, vocab), device = logits.shape, logits.device
    tokens, chunks = tokens.contiguous(), triton.cdiv(vocab, CHUNK)
    best, mass = (torch.empty((rows, chunks), dtype=torch.float32, device=device) for _ in range(2))
    better = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    log_sum, chosen = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    rank = torch.empty(rows, dtype=torch.int64, device=device)
    if rows:
        _log_sums[(chunks, rows)](logits, logits.stride(0), tokens, vocab, best, mass, better, CHUNK=CHUNK, num_warps=8)
        _merge_sums[(rows,)](logits, logits.stride(0), tokens, chunks, best, mass, better, log_sum, chosen, rank,
                             CHUNKS=triton.next_power_of_2(chunks), num_warps=4)  # fmt: skip
    top = logits.topk(num_top, dim=-1)
    return chosen, rank, top.indices, top.values - log_sum.unsqueeze(1)
