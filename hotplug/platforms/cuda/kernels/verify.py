"""Proposed tokens against the model's own choices: a program a request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Tokens of a request that are compared at once."""


@triton.jit(do_not_specialize=["tokens", "proposed", "first"])
def _reject_sample(tokens, proposed, first, accepted, last, BLOCK: tl.constexpr):
    """The first token that is not the proposed one ends what is accepted; a request's last never is."""
    request = tl.program_id(0)
    begin, end = tl.load(first + request), tl.load(first + request + 1)
    wrong = end - 1
    for start in tl.range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < end
        chosen = tl.load(tokens + place, mask=inside, other=0)
        differs = inside & (chosen != tl.load(proposed + place, mask=inside, other=0).to(tl.int64))
        wrong = tl.minimum(wrong, tl.min(tl.where(differs, place, end - 1), 0))
    tl.store(accepted + request, wrong - begin)
    tl.store(last + request, tl.load(tokens + wrong))


def reject_sample(tokens: Tensor, proposed: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """int64 `tokens` [S]; `proposed` [S] and `first` [R + 1] of int32 or int64."""
    requests = len(first) - 1
    accepted = torch.empty(requests, dtype=first.dtype, device=first.device)
    last = torch.empty(requests, dtype=torch.int64, device=first.device)
    if requests:
        _reject_sample[(requests,)](tokens, proposed, first, accepted, last, BLOCK=BLOCK, num_warps=2)
    return accepted, last
