"""Putting a name to a wrong result: does it equal what a known mistake would compute?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.attention import AttentionInputs, gather_kv
from hotplug.core.ops.compare import compare


def name_fault(op: str, args: tuple[Any, ...], result: Any, rows: int | None) -> str:
    """The mistake that gives `result`, in words; empty if none that is known does."""
    for words, suspect in _SUSPECTS.get(op, lambda *a: iter(()))(*args):
        try:
            wrong = suspect()
        except (RuntimeError, IndexError, ValueError):  # the mistake cannot be made with these arguments
            continue
        pairs = zip(_tuple(result), _tuple(wrong), strict=False)
        if all(compare(_cut(got, rows), _cut(want, rows)).ok for got, want in pairs):
            return words
    return ""


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _cut(x: Tensor, rows: int | None) -> Tensor:
    return x.cpu() if rows is None else x.cpu()[:rows]


Suspects = Iterator[tuple[str, Callable[[], Any]]]


def _attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, scale: float, window: int | None,
               layout: str, sinks: Tensor | None = None, soft_cap: float | None = None) -> Suspects:  # fmt: skip
    def attend(**mistake: Any) -> Callable[[], Tensor]:
        given: dict[str, Any] = {"sinks": sinks, "soft_cap": soft_cap, **mistake}
        return lambda: wrong_attention(q, k_cache, v_cache, step, scale, window, layout, **given)

    yield "its causal mask is off by one: a query sees the token after it", attend(ahead=1)
    yield "its causal mask is off by one: a query does not see its own token", attend(ahead=-1)
    yield "it has no causal mask: a query sees its whole sequence", attend(ahead=1 << 30)
    yield "it ignores the window", attend(windowed=False)
    yield "its window is off by one, too wide", attend(wider=1)
    yield "its window is off by one, too narrow", attend(wider=-1)
    yield "it drops the last partial block", attend(whole_blocks=True)
    yield "it multiplies by zero what a query does not see, and NaN times 0 is NaN", attend(by_zero=True)
    yield "it reads past the end of the sequence, to the end of the last block", attend(past_end=True)
    yield "it gives query heads the wrong key/value heads (interleaved, where groups are consecutive)", attend(
        interleaved=True)  # fmt: skip
    yield "it gives every query head the first key/value head", attend(first_head=True)
    yield "it leaves out the scale", attend(factor=1 / scale)
    yield "it scales twice", attend(factor=scale)
    kv_heads = k_cache.shape[2] if layout == "NHD" else k_cache.shape[1]
    group = q.shape[1] // kv_heads
    yield "its scale is wrong for grouped-query attention, by the size of a group", attend(factor=1 / group)
    yield "its scale is wrong for grouped-query attention, by the root of a group's size", attend(factor=group**-0.5)
    yield "its scale is wrong for grouped-query attention, by the size of a group", attend(factor=group)
    yield "its scale is wrong for grouped-query attention, by the root of a group's size", attend(factor=group**0.5)
    yield "it takes the keys for the values", attend(values_are_keys=True)
    yield "it ignores the sinks", attend(sinks=None)
    yield "it ignores the soft cap", attend(soft_cap=None)
    yield "it ignores sinks and soft cap", attend(sinks=None, soft_cap=None)


def wrong_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, scale: float, window: int | None, layout: str,
    *, sinks: Tensor | None = None, soft_cap: float | None = None, ahead: int = 0, windowed: bool = True,
    wider: int = 0, whole_blocks: bool = False, past_end: bool = False, interleaved: bool = False,
    first_head: bool = False, factor: float = 1.0, values_are_keys: bool = False, by_zero: bool = False,
) -> Tensor:  # fmt: skip
    """Paged attention with a mistake built in. Lengths are read from the device tensors."""
    out = torch.zeros_like(q)
    starts, seqs = step.query_start.tolist(), step.seq_lens.tolist()
    block = k_cache.shape[1] if layout == "NHD" else k_cache.shape[2]
    for i, seq in enumerate(seqs):
        begin, end = starts[i], starts[i + 1]
        if begin == end:
            continue
        held = seq // block * block if whole_blocks else seq
        if past_end or by_zero:
            held = min(-(-seq // block), step.block_table.shape[1]) * block
        if held == 0:
            continue
        k, v = gather_kv(k_cache, v_cache, step.block_table[i], held, layout)
        k, v = k.to(torch.float32), (k if values_are_keys else v).to(torch.float32)
        heads, kv_heads = q.shape[1], k.shape[1]
        owner = torch.arange(heads) % kv_heads if interleaved else torch.arange(heads) // (heads // kv_heads)
        owner = torch.zeros_like(owner) if first_head else owner
        key, query = torch.arange(held), torch.arange(seq - (end - begin), seq).unsqueeze(1)
        visible = key <= query + (1 << 30 if past_end else ahead)
        if window is not None and windowed:
            visible &= key > query - window - wider
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].to(torch.float32), k[:, owner]) * (scale * factor)
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(torch.float32)[:, None, None].expand(-1, end - begin, 1)), -1)
        weights = scores.softmax(-1)[..., :held]
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v[:, owner]).to(q.dtype)
    return out


def _rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> Suspects:
    from hotplug.core.ops.rope import rope

    def interleaved(x: Tensor) -> Tensor:
        cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
        first, second = x[..., 0::2].float(), x[..., 1::2].float()
        pair = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return pair.flatten(-2).to(x.dtype)

    def swapped() -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin.chunk(2, dim=-1)
        return rope(q, k, positions, torch.cat((cos, -sin), dim=-1))

    shifted = (positions + 1).clamp(max=len(cos_sin) - 1)
    yield "it pairs neighbouring dimensions, where the two halves of a head are rotated", lambda: (
        interleaved(q), interleaved(k))  # fmt: skip
    yield "it rotates the wrong way", swapped
    yield "its positions are off by one", lambda: rope(q, k, shifted, cos_sin)
    yield "it takes the index of a token in the step for its position", lambda: rope(
        q, k, torch.arange(len(positions)), cos_sin)  # fmt: skip
    yield "it does not rotate the keys", lambda: (rope(q, k, positions, cos_sin)[0], k)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Suspects:
    from hotplug.core.ops.norm import rms_norm

    yield "it leaves out the weight", lambda: rms_norm(x, torch.ones_like(weight), eps)
    yield "it adds 1 to the weight", lambda: rms_norm(x, weight + 1, eps)
    yield "it subtracts the mean, as a layer norm does", lambda: rms_norm(x - x.mean(-1, keepdim=True), weight, eps)


def _silu_mul(gate_up: Tensor) -> Suspects:
    from hotplug.core.ops.dense import silu_mul

    gate, up = gate_up.chunk(2, dim=-1)
    yield "it takes the halves the other way round", lambda: silu_mul(torch.cat((up, gate), dim=-1))
    yield "it reads gate and up alternating, where they are halves", lambda: silu_mul(
        torch.cat((gate_up[..., 0::2], gate_up[..., 1::2]), dim=-1))  # fmt: skip


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Suspects:
    yield "it leaves out the bias", lambda: torch.nn.functional.linear(x, weight)


_SUSPECTS: dict[str, Callable[..., Suspects]] = {
    "attention": _attention, "rope": _rope, "rms_norm": _rms_norm, "silu_mul": _silu_mul, "linear": _linear,
}  # fmt: skip


def name_stray_writes(before: Tensor, after: Tensor, expected: Tensor, slots: Tensor, layout: str) -> str:
    """Which cache slots a `kv_write` got wrong, in words."""

    def by_slot(cache: Tensor) -> Tensor:
        rows = cache.transpose(1, 2) if layout == "HND" else cache
        return rows.flatten(0, 1).flatten(1).to(torch.float32)

    was, got, want = (by_slot(c.cpu()) for c in (before, after, expected))
    touched = {i for i in range(len(was)) if not torch.equal(was[i], got[i])}
    asked = set(slots.tolist())
    wrong = {i for i in asked if not torch.allclose(got[i], want[i], rtol=0.05, atol=0.05, equal_nan=True)}
    if touched - asked:
        shift = {s for s in (-1, 1) if touched - asked <= {a + s for a in asked}}
        if shift:
            return f"it writes to the slot {'after' if shift == {1} else 'before'} the one it is given"
        return f"it writes to slots that it was not given, such as {min(touched - asked)}"
    if asked - touched:
        return f"it leaves out slots that it was given, such as {min(asked - touched)}"
    if any((want[i].isnan() != got[i].isnan()).any() for i in wrong):
        return "it does not store values that are not finite as 0, with NaN in their keys"
    return f"it writes wrong values to slots such as {min(wrong)}" if wrong else ""
