"""From logits to tokens in two kernels: a pass over the vocabulary in chunks, then a program a row that finishes.

The first leaves each chunk's best token and, for rows that draw, its mass. A greedy row is then done at once, and a row
without filters reads one chunk again. Filters need no sort: with distances d = (best - logit) / temperature, in powers
of two, every filter keeps the tokens with d <= limit for a limit of its own, and float32 distances, which are not
negative, are ordered as the integers of their bits. `_narrow` searches the limit among those integers.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotplug.platforms.cuda.kernels import pdl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITE = tl.constexpr(0x7F800000)
"""The bits of an infinite distance: a limit that keeps every token."""
COLDEST = tl.constexpr(1e-30)
"""The least temperature: its inverse is still finite."""
CHUNK = 4096
"""Logits of a chunk, and candidates that a list holds."""
GROUPS = 16
"""Parts of a chunk whose maxima are kept: they bound a limit from above before the first pass that looks for it."""
TOP_K, TOP_P, MIN_P = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
"""Which filters a call has, as bits."""
NO_TOKEN = tl.constexpr(-2)
"""For a row whose best score is not finite (`hotplug.core.ops.sampling`)."""


@triton.jit(do_not_specialize=["rows", "temperature"])
def _scan(logits, stride, vocab, rows, temperature, best, where, mass, groups, CHUNK: tl.constexpr,
          GROUPS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """A program a chunk and row: best [S, chunks] and where; mass relative to it and maxima of groups if it draws."""
    chunk, entry = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part = entry * tl.num_programs(0) + chunk
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    pdl.release(PDL)
    pdl.wait(PDL)
    x = tl.load(logits + entry * stride + token, mask=token < vocab, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))  # NaN may or may not pass a maximum; both end a row
    top, at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + part, top)
    tl.store(where + part, tl.minimum(chunk * CHUNK + at, vocab - 1))
    row = entry if rows is None else tl.load(rows + entry)
    warm = tl.load(temperature + row)
    if warm > 0:
        weight = tl.exp2((x - top) * (LOG2E / tl.maximum(warm, COLDEST)))
        tl.store(mass + part, tl.sum(tl.where(x > float("-inf"), weight, 0.0).to(tl.float64), 0))
        parts = tl.reshape(x, (GROUPS, CHUNK // GROUPS))
        tl.store(groups + part * GROUPS + tl.arange(0, GROUPS), tl.max(parts, 1))


@triton.jit
def _distances(source, mask, best, scale):
    """Logits, their distances from the best in powers of two, and the bits of these."""
    x = tl.load(source, mask=mask, other=float("-inf"))
    distance = (best - x) * scale
    return x, distance, distance.to(tl.int32, bitcast=True)


@triton.jit
def _narrow(source, n, best, scale, by_mass, target, low, high, below, upto, lower, upper, BLOCK: tl.constexpr):
    """A pass over `n` logits that narrows a bracket of limits: `low` keeps too little, `high` keeps `target` or more.

    Each of the two comes with how many tokens it keeps (below, upto) and with their mass (lower, upper). `by_mass`
    says which of these the target is about. Bits are at least -1. The span shrinks to a quarter or less.
    """
    pivot = tl.arange(0, 8)
    near, far = tl.maximum(low, 0).to(tl.float32, bitcast=True), tl.minimum(high, INFINITE - 1)
    steps = near + (far.to(tl.float32, bitcast=True) - near) * (
        tl.minimum(pivot + 1, 5) / 6.0
    )  # five equal steps of distance,
    bits = low + tl.maximum((high - low) // 4, 1) * (pivot - 4)  # three of bits, whatever the spread
    limits = tl.where(pivot < 5, steps.to(tl.int32, bitcast=True), bits)
    limits = tl.maximum(tl.minimum(limits, high - 1), low)
    counts = tl.zeros([BLOCK, 8], tl.int32)
    masses = tl.zeros([BLOCK, 8], tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=2):
        offsets = start + tl.arange(0, BLOCK)
        _, distance, inside = _distances(source + offsets, offsets < n, best, scale)
        kept = (inside[:, None] <= limits[None, :]) & (offsets < n)[:, None]
        counts += kept.to(tl.int32)
        masses += tl.where(kept, tl.exp2(-distance)[:, None], 0.0)
    count, mass = tl.sum(counts, 0), tl.sum(masses, 0)
    enough = tl.where(by_mass, mass, count.to(tl.float32)) >= target
    low = tl.max(tl.where(enough, low, limits), 0)
    high = tl.min(tl.where(enough, limits, high), 0)
    below = tl.max(tl.where(enough, below, count), 0)
    upto = tl.min(tl.where(enough, count, upto), 0)
    lower = tl.max(tl.where(enough, lower, mass), 0)
    upper = tl.min(tl.where(enough, mass, upper), 0)
    return low, high, below, upto, lower, upper


@triton.jit
def _list(source, vocab, best, scale, low, high, values, tokens, CHUNK: tl.constexpr):
    """List the tokens of low < bits <= high in order, as far as they fit; how many there are, and their mass."""
    count = 0
    mass = 0.0
    tl.debug_barrier()  # every thread has read the list before this one
    for start in tl.range(0, vocab, CHUNK, num_stages=3):
        token = start + tl.arange(0, CHUNK)
        x, distance, bits = _distances(source + token, token < vocab, best, scale)
        kept = (bits > low) & (bits <= high) & (token < vocab)
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        fits = kept & (place < CHUNK)
        tl.store(values + place, x, mask=fits)
        tl.store(tokens + place, token, mask=fits)
        count += tl.sum(kept.to(tl.int32), 0)
        mass += tl.sum(tl.where(kept, tl.exp2(-distance), 0.0), 0)
    tl.debug_barrier()  # what one thread wrote, another reads
    return count, mass


@triton.jit
def _search(source, vocab, best, scale, groups, num_groups, values, tokens, by_mass, target, high, upto, upper, whole,
            size, CHUNK: tl.constexpr):  # fmt: skip
    """The least limit up to `high` that keeps `target`: so many tokens or, with `by_mass`, so much mass.

    `high` keeps `upto` tokens of mass `upper`. `whole` says that the list of `size` tokens has all that `high` keeps;
    if not, the row is read: once if the maxima of groups bound the limit well, a few times where scores are flat.
    Returns the limit, what it keeps (count, mass), and the list's state.
    """
    low, below, lower = -1, 0, 0.0
    if whole == 0:
        near, far, few, many, light, heavy = -1, high, 0, num_groups, 0.0, upper
        while (many - few > 1) & (far - near > 1):
            near, far, few, many, light, heavy = _narrow(
                groups, num_groups, best, scale, by_mass, target, near, far, few, many, light, heavy, CHUNK // 8
            )
        high = far
        searching = 1
        while searching == 1:
            size, mass = _list(source, vocab, best, scale, low, high, values, tokens, CHUNK)
            upto, upper = below + size, lower + mass
            while (upto - below > CHUNK) & (high - low > 1):
                low, high, below, upto, lower, upper = _narrow(
                    source, vocab, best, scale, by_mass, target, low, high, below, upto, lower, upper, CHUNK // 8
                )
            searching = ((size > CHUNK) & (high - low > 1)).to(tl.int32)
        whole = ((low == -1) & (size > 0) & (size <= CHUNK)).to(tl.int32)  # NaN is in no list
    target -= tl.where(by_mass, lower, below * 1.0)
    near, far, few, many, light, heavy = low, high, 0, upto - below, 0.0, upper - lower
    while (many - few > 1) & (far - near > 1):
        near, far, few, many, light, heavy = _narrow(
            values, size, best, scale, by_mass, target, near, far, few, many, light, heavy, CHUNK // 8
        )
    return far, below + many, lower + heavy, whole, size


@triton.jit
def _uniform(seed, counter):
    """Float64 in [0, 1): SplitMix64's finalizer, as the reference has it."""
    x = seed + (counter + 1) * -7046029254386353131
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit
def _shift_right(x, BITS: tl.constexpr):
    """Logical shift of int64."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _invert(mass, at, target, otherwise):
    """Which of the entries `at` the running sum of `mass` first exceeds `target`; of no mass, never."""
    hit = (tl.cumsum(mass, 0) > target) & (mass > 0)
    first = tl.min(tl.where(hit, at, 0x7FFFFFFF), 0)
    last = tl.max(tl.where(mass > 0, at, otherwise), 0)  # rounding may leave the sum short of the target
    return tl.minimum(first, last)


@triton.jit(do_not_specialize=["rows", "temperature", "top_k", "top_p", "min_p", "filters", "seeds", "counters"])
def _finish(logits, stride, vocab, rows, temperature, top_k, top_p, min_p, filters, seeds, counters, best, where, mass,
            groups, values, tokens, out, chunks, CHUNK: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """A program a row of the step: the best token, or a draw from those that the filters keep."""
    entry = tl.program_id(0).to(tl.int64)
    pdl.release(PDL)
    pdl.wait(PDL)
    part = tl.arange(0, CHUNKS)
    peaks = tl.load(best + entry * chunks + part, mask=part < chunks, other=float("-inf"))
    top, at = tl.max(peaks, 0, return_indices=True, return_indices_tie_break_left=True)
    row = entry if rows is None else tl.load(rows + entry)
    warm = tl.load(temperature + row)
    finite = tl.abs(top) < float("inf")
    if finite & (warm > 0):
        scale = LOG2E / tl.maximum(warm, COLDEST)
        source = logits + entry * stride
        masses = tl.load(mass + entry * chunks + part, mask=part < chunks, other=0.0)
        masses *= tl.exp2((peaks - top) * scale).to(tl.float64)
        k = tl.load(top_k + row, mask=(filters & TOP_K) != 0, other=0)
        p = tl.load(top_p + row, mask=(filters & TOP_P) != 0, other=1.0)
        least = tl.load(min_p + row, mask=(filters & MIN_P) != 0, other=0.0)
        limit, upto, upper, whole, size = INFINITE, vocab, tl.sum(masses, 0).to(tl.float32), 0, 0
        groups += entry * chunks * GROUPS
        values += entry * CHUNK
        tokens += entry * CHUNK
        for by_mass in range(2):
            asked = tl.where(by_mass == 1, p < 1, (k > 0) & (k < vocab))
            if asked:
                target = k.to(tl.float32)
                if by_mass == 1:
                    target = p * upper
                    # tokens beyond this distance have half the mass that top-p leaves out, however many they are
                    bound = tl.log2(vocab / ((1 - p) * upper)) + 1
                    limit = tl.minimum(limit, tl.maximum(bound, 0.0).to(tl.int32, bitcast=True))
                limit, upto, upper, whole, size = _search(
                    source, vocab, top, scale, groups, chunks * GROUPS, values, tokens, by_mass == 1, target, limit,
                    upto, upper, whole, size, CHUNK,
                )  # fmt: skip
        if least > 0:
            limit = tl.minimum(limit, tl.abs(tl.log2(least)).to(tl.int32, bitcast=True))
        uniform = _uniform(tl.load(seeds + row), tl.load(counters + entry).to(tl.int64))
        first, end, rest = 0, size, uniform * 0
        if whole == 1:
            source = values
        else:
            end = vocab
            if limit < INFINITE:
                for i in tl.range(0, chunks, num_stages=3):
                    token = i * CHUNK + tl.arange(0, CHUNK)
                    _, distance, bits = _distances(source + token, token < vocab, top, scale)
                    kept = tl.where(bits <= limit, tl.exp2(-distance), 0.0).to(tl.float64)
                    masses = tl.where(part == i, tl.sum(kept, 0), masses)
            rest = uniform * tl.sum(masses, 0)
            chosen = _invert(masses, part, rest, 0)
            rest -= tl.sum(tl.where(part < chosen, masses, 0.0), 0)
            first = chosen * CHUNK
        place = first + tl.arange(0, CHUNK)
        _, distance, bits = _distances(source + place, place < end, top, scale)
        kept = tl.where((bits <= limit) & (place < end), tl.exp2(-distance), 0.0).to(tl.float64)
        if whole == 1:
            rest = uniform * tl.sum(kept, 0)
        token = _invert(kept, place, rest, first)
        if whole == 1:
            token = tl.load(tokens + token)
        tl.store(out + entry, token.to(tl.int64))
    else:
        best_token = tl.load(where + entry * chunks + tl.minimum(at, chunks - 1)).to(tl.int64)
        tl.store(out + entry, tl.where(finite, best_token, NO_TOKEN))


@cache
def _cold(device: torch.device) -> tuple[Tensor, Tensor]:
    """Temperatures and seeds of 0, for more rows than a step has."""
    rows = 1 << 16
    return torch.zeros(rows, dtype=torch.float32, device=device), torch.zeros(rows, dtype=torch.int64, device=device)


def argmax(logits: Tensor) -> Tensor:
    """The best tokens of float32 `logits` [rows, vocab]."""
    temperature, seeds = _cold(logits.device)
    return _tokens(logits, None, temperature, None, None, None, seeds, seeds)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    counters: Tensor,
) -> Tensor:
    """Draws from float32 `logits` [rows, vocab], parameters in the order of the rows."""
    return _tokens(logits, None, temperature, top_k, top_p, min_p, seeds, counters)


def sample_rows(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    counters: Tensor,
) -> Tensor:
    """The best tokens and draws of float32 `logits` [S, vocab], parameters by batch row."""
    return _tokens(logits, rows, temperature, top_k, top_p, min_p, seeds, counters)


def _tokens(
    logits: Tensor, rows: Tensor | None, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, seeds: Tensor, counters: Tensor, chunk: int = CHUNK,
) -> Tensor:  # fmt: skip
    """Both ops. `chunk` is for tests, which read a small vocabulary in several chunks; a power of two."""
    (entries, vocab), device = logits.shape, logits.device
    out = torch.empty(entries, dtype=torch.int64, device=device)
    if not entries:
        return out
    chunks = triton.cdiv(vocab, chunk)
    best = torch.empty((entries, chunks), dtype=torch.float32, device=device)
    where = torch.empty((entries, chunks), dtype=torch.int32, device=device)
    mass = torch.empty((entries, chunks), dtype=torch.float64, device=device)
    groups = torch.empty((entries, chunks, GROUPS), dtype=torch.float32, device=device)
    values = torch.empty((entries, chunk), dtype=torch.float32, device=device)
    tokens = torch.empty((entries, chunk), dtype=torch.int32, device=device)
    rows, temperature, top_k, top_p, min_p, seeds, counters = (
        None if t is None else t.contiguous() for t in (rows, temperature, top_k, top_p, min_p, seeds, counters)
    )
    launch = pdl.options(device)
    _scan[(chunks, entries)](logits, logits.stride(0), vocab, rows, temperature, best, where, mass, groups,
                             CHUNK=chunk, GROUPS=GROUPS, num_warps=8, **launch)  # fmt: skip
    filters = sum(bit.value for bit, have in ((TOP_K, top_k), (TOP_P, top_p), (MIN_P, min_p)) if have is not None)
    _finish[(entries,)](
        logits, logits.stride(0), vocab, rows, temperature,
        seeds if top_k is None else top_k,  # what stands in for an absent filter is never read
        temperature if top_p is None else top_p, temperature if min_p is None else min_p, filters, seeds, counters,
        best, where, mass, groups, values, tokens, out, chunks, CHUNK=chunk, GROUPS=GROUPS,
        CHUNKS=max(triton.next_power_of_2(chunks), 16), num_warps=8, **launch,
    )  # fmt: skip
    return out
