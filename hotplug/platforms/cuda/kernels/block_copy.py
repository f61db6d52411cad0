"""KV blocks of all layers, copied in one launch: `ci/gpu/bench_swap.py` measures it.

It runs between steps, is launched without overlap and never recorded: addresses are uploaded in its first call.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE_BYTES = 16384
"""Bytes of a program: eight vectors of 16 bytes a thread are on their way at once."""
WIDEST = 16
"""Bytes that a thread loads at once, at most."""
WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit(do_not_specialize=["pair_stride", "source_stride", "target_stride"])
def _block_copy(sources, targets, pairs, pair_stride, source_stride, target_stride, words, WORD: tl.constexpr,
                ALIGNED: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """A program a pair, piece of a block, and tensor. Sizes and strides are in words, addresses are in the tables."""
    pair = pairs + tl.program_id(0).to(tl.int64) * pair_stride
    read, written = tl.load(pair).to(tl.int64), tl.load(pair + 1).to(tl.int64)
    source = tl.load(sources + tl.program_id(2)).to(tl.pointer_type(WORD)) + read * source_stride
    target = tl.load(targets + tl.program_id(2)).to(tl.pointer_type(WORD)) + written * target_stride
    source, target = tl.multiple_of(source, ALIGNED), tl.multiple_of(target, ALIGNED)
    word = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    tl.store(target + word, tl.load(source + word, mask=word < words), mask=word < words)


def block_copy(sources: list[Tensor], targets: list[Tensor], pairs: Tensor) -> None:
    """Any dtype, in words as wide as sizes, strides and addresses allow."""
    if not sources or not len(pairs):
        return
    source, target = sources[0], targets[0]
    item = source.element_size()
    size, strides = source[0].numel() * item, (source.stride(0) * item, target.stride(0) * item)
    read, written = (tuple(tensor.data_ptr() for tensor in tensors) for tensors in (sources, targets))
    aligned = math.gcd(WIDEST, size, *strides, *read, *written)
    word = min(aligned, max(WORDS))
    piece = PIECE_BYTES // word
    _block_copy[(len(pairs), triton.cdiv(size // word, piece), len(sources))](
        _table(read, pairs.device), _table(written, pairs.device), pairs, pairs.stride(0), strides[0] // word,
        strides[1] // word, size // word, WORD=WORDS[word], ALIGNED=aligned, PIECE=piece, num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=8)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 addresses on the device. The caches' and the stage's stay the same: an upload each, once."""
    return torch.tensor(addresses).to(device, non_blocking=True)
