"""What the attention kernels share: cells as caches hold them, scores in units of log2, soft caps, and one tile's step
of the online softmax.

Products ask for "ieee": those of float32 are computed in float32; on narrower types it has no effect.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


def factors(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """`scale` and `cap` of `logits`: without a cap, scores are products times `scale`."""
    if soft_cap is None:
        return scale * LOG2E, 0.0
    return 2 * LOG2E * scale / soft_cap, soft_cap * LOG2E


@triton.jit
def finite_cells(key, value):
    """Keys and values as caches hold them (`finite_values` of the op `kv_write`), in float32.

    A value that is not finite is 0, and NaN in its key. A weight of zero times a value is zero then, in every kernel.
    """
    key, value = key.to(tl.float32), value.to(tl.float32)
    finite = tl.abs(value) < float("inf")  # NaN is below nothing
    return tl.where(finite, key, float("nan")), tl.where(finite, value, 0.0)


@triton.jit
def logits(products, scale, cap, CAPPED: tl.constexpr):
    """Scores times log2(e), so that the softmax takes powers of two; tanh(x) = 1 - 2 / (e^2x + 1)."""
    scores = products * scale
    if CAPPED:
        scores = cap - 2 * cap / (tl.exp2(scores) + 1)
    return scores


@triton.jit
def accumulate(scores, value, best, total, mixed, GUARDED: tl.constexpr):
    """The online softmax (Milakov and Gimelshein, 2018) over one more tile: scores [rows, keys], value [keys, cols].

    GUARDED: rows that see nothing of any tile so far stay at zero; else each row sees a key of every tile.
    """
    new = tl.maximum(best, tl.max(scores, 1))
    shift = tl.where(new == float("-inf"), 0.0, new) if GUARDED else new
    weights = tl.exp2(scores - shift[:, None])
    old = tl.exp2(best - shift)
    total = total * old + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * old[:, None], input_precision="ieee")
    return new, total, mixed


@triton.jit
def with_sink(best, total, mixed, sink):
    """The sums with one more logit, `sink` (times log2(e)), that has no value."""
    new = tl.maximum(best, sink)
    old = tl.exp2(best - new)
    return new, total * old + tl.exp2(sink - new), mixed * old[:, None]
