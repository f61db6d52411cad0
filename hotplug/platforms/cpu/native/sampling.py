"""Tokens from scores by the native library (`src/sampling.h`): no sort of the vocabulary, one pass or a few a row.

A draw is the reference's: the same filters in the same order, the same numbers, running sums in double. It may differ
where the reference's own rounding decides: exponentials are off by 2e-7 at most, as PyTorch's are in another way, so
that the last token of a nucleus, or a draw that falls between two tokens within that share of the mass, may be the
neighbour's.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hotplug.platforms.cpu.native.library import call, refusal
from hotplug.vendor import Impl, SiteSpec, Verdict

_argmax_call = struct.Struct("@2P3q").pack
"""`hp_argmax_call`."""
_sample_call = struct.Struct("@9P4q").pack
"""`hp_sample_call`."""


def argmax(logits: Tensor) -> Tensor:
    """The op, for any strides of float32 `logits` [rows, vocab]."""
    logits = _side_by_side(logits)
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    call("hp_argmax", _argmax_call(logits.data_ptr(), out.data_ptr(), rows, vocab, logits.stride(0)))
    return out


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    seeds: Tensor, counters: Tensor,
) -> Tensor:  # fmt: skip
    """The op, for any strides."""
    return _drawn(logits, None, temperature, top_k, top_p, min_p, seeds, counters)


def sample_rows(
    logits: Tensor, rows: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor,
    counters: Tensor,
) -> Tensor:  # fmt: skip
    """The op, for any strides. Raises PlatformError for a row that there is none of."""
    return _drawn(logits, rows, temperature, top_k, top_p, min_p, seeds, counters)


def _drawn(
    logits: Tensor, rows: Tensor | None, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, seeds: Tensor, counters: Tensor,
) -> Tensor:  # fmt: skip
    """With `rows`, which entry of the parameters is each row's. Raises ValueError for another dtype than the op's."""
    floats, ints = (temperature, top_p, min_p), (rows, top_k, seeds, counters)
    if any(x is not None and x.dtype is not torch.float32 for x in floats):
        raise ValueError("temperatures, top_p and min_p must be float32")
    if any(x is not None and x.dtype is not torch.int64 for x in ints):
        raise ValueError("rows, top_k, seeds and counters must be int64")
    logits = _side_by_side(logits)
    count, vocab = logits.shape
    out = torch.empty(count, dtype=torch.int64)
    given = [
        None if x is None else x if x.is_contiguous() else x.contiguous()
        for x in (rows, temperature, top_k, top_p, min_p, seeds, counters)
    ]
    call("hp_sample", _sample_call(
        logits.data_ptr(), *(0 if x is None else x.data_ptr() for x in given), out.data_ptr(),
        count, vocab, logits.stride(0), len(temperature),
    ))  # fmt: skip
    return out


def _side_by_side(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _check(_: SiteSpec) -> Verdict:
    reason = refusal()
    return Verdict(reason is None, reason or "")


KERNELS = (
    Impl("argmax", "cpu.native", make=lambda _: argmax, check=_check, rank=10),
    Impl("sample", "cpu.native", make=lambda _: sample, check=_check, rank=10),
    Impl("sample_rows", "cpu.native", make=lambda _: sample_rows, check=_check, rank=10),
)
