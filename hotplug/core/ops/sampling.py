"""From logits to tokens on the device: penalties, filters, draws and log-probabilities.

A draw depends on nothing but the request's seed and the index of its output token, so a request gives the
same tokens whatever else is in the batch. A row whose best score is no finite number, because some score is NaN or
infinite or all are minus infinity, gives `NO_TOKEN`: it comes to the host with the tokens, at no cost of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotplug.core.ops.registry import Op
from hotplug.core.request import NO_TOKEN


def penalties(
    logits: Tensor,
    prompt_seen: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Lower the logits of tokens that occurred.

    logits: float32 [rows, vocab]; prompt_seen: bool [rows, vocab]; output_counts: int32 [rows, vocab].
    repetition: [rows], divides positive and multiplies negative logits of any token seen (Keskar et al.,
    CTRL); presence and frequency: [rows], subtracted once and per occurrence in the output (OpenAI API).
    """
    in_output = output_counts > 0
    factor = torch.where(prompt_seen | in_output, repetition.unsqueeze(1), 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency.unsqueeze(1) * output_counts - presence.unsqueeze(1) * in_output


def argmax(logits: Tensor) -> Tensor:
    """The best token of each row of float32 `logits` [rows, vocab], the first where several are; int64 [rows].

    `NO_TOKEN` where the best score is not finite, as it is when any score of the row is NaN.
    """
    best, tokens = logits.max(-1)  # NaN counts as the largest
    return torch.where(best.isfinite(), tokens, NO_TOKEN)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    counters: Tensor,
) -> Tensor:
    """Draw one token a row from float32 `logits` [rows, vocab]; int64 [rows].

    Parameters are [rows]: temperature above 0; top_k 0, top_p 1 and min_p 0 keep all tokens, and None does so
    for every row without the cost; seeds and counters int64. Filters apply after temperature in the order
    top-k, top-p (Holtzman et al., 2020), min-p (Nguyen et al., 2024). Tokens tied with the last one kept are
    kept too. `NO_TOKEN` where the best score is not finite.
    """
    best = logits.amax(-1, keepdim=True)
    # from the best downward, so that a temperature near 0 cannot divide to infinity
    scaled = (logits - best) / temperature.unsqueeze(1)
    if top_k is not None or top_p is not None:
        scaled = scaled.masked_fill(scaled < _threshold(scaled, top_k, top_p), float("-inf"))
    probs = scaled.softmax(-1)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p.unsqueeze(1) * probs.amax(-1, keepdim=True), 0.0)
    # float64: over a large vocabulary a float32 running sum would skew the tail
    cumulative = probs.to(torch.float64).cumsum(-1)
    target = uniform(seeds, counters).unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return torch.where(best.squeeze(1).isfinite(), drawn.clamp(max=logits.shape[1] - 1), NO_TOKEN)


def _threshold(scaled: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """[rows, 1] the smallest logit that top-k, then top-p, keep."""
    vocab = scaled.shape[1]
    ordered = scaled.sort(-1, descending=True).values
    least = ordered[:, -1:]
    if top_k is not None:
        k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).to(torch.int64).unsqueeze(1)
        least = ordered.gather(1, k - 1)
        ordered = ordered.masked_fill(ordered < least, float("-inf"))
    if top_p is not None:
        probs = ordered.softmax(-1)
        ahead = probs.cumsum(-1) - probs  # mass of the tokens before each
        nucleus = (ahead < top_p.unsqueeze(1)).sum(-1, keepdim=True).clamp(min=1)
        # rounding must not let top_p = 1 drop the tail
        least = torch.where(top_p.unsqueeze(1) < 1.0, torch.maximum(ordered.gather(1, nucleus - 1), least), least)
    return least


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Float64 in [0, 1) from int64 `seeds` and `counters`: SplitMix64's finalizer (Steele et al., 2014)."""
    x = seeds + (counters + 1) * -7046029254386353131  # the golden ratio in 64 bits, as a signed integer
    for shift, multiplier in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ _shift_right(x, shift)) * multiplier
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


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
    """Tokens of a step whose sampling parameters live by batch row; int64 [S].

    logits: float32 [S, vocab]; rows: [S] in the index dtype, each entry's batch row, never negative.
    temperature, top_p, min_p: float32 [max_rows]; top_k, seeds: int64 [max_rows]; counters: int64 [S].
    A row of temperature 0 takes what `argmax` takes, whatever its other parameters; any other row draws what `sample`
    draws. Nothing is read on the host, so that a captured step may end with it.
    """
    warm = temperature[rows]
    greedy = warm == 0
    # a greedy row's draw is thrown away, but its temperature must not divide by zero
    drawn = sample(logits, warm.masked_fill(greedy, 1.0), top_k[rows], top_p[rows], min_p[rows], seeds[rows], counters)
    return torch.where(greedy, argmax(logits), drawn)


def reject_sample(tokens: Tensor, proposed: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """How many proposed tokens of each request the model's own choices confirm, and its choice after them.

    tokens: int64 [S], what the model chose to follow each of the S tokens of R requests, one after the other; proposed:
    [S], what was proposed to follow it, -1 after a request's last; first: [R + 1], where each request begins.
    A choice depends on the request's seed and its own position alone (`sample`), not on what was proposed. So a
    proposal holds if it is the choice and all before it hold, and outputs are those of one token a step, greedy or
    drawn: the rejection sampling of Leviathan et al. (2023) would keep their distribution only. `NO_TOKEN` is
    nobody's proposal.
    Returns the numbers, in the dtype of `first`, and the tokens, int64, each [R].
    """
    position = torch.arange(len(tokens), dtype=first.dtype, device=first.device)
    wrong = torch.where(tokens == proposed, len(tokens), position)
    end = wrong.flip(0).cummin(0).values.flip(0)[first[:-1]]  # the first wrong proposal from each request's begin on
    return end - first[:-1], tokens[end]


def logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of `tokens` [rows] under float32 `logits` [rows, vocab], and the `num_top` best.

    Returns chosen [rows], rank [rows] (1 = best), top token ids and log-probabilities [rows, num_top].
    """
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(1, tokens.unsqueeze(1))
    rank = (log_probs > chosen).sum(-1) + 1
    top = log_probs.topk(num_top, dim=-1)
    return chosen.squeeze(1), rank, top.indices, top.values


OPS = (
    Op("penalties", penalties, facts=("vocab",)),
    Op("argmax", argmax, facts=("vocab",)),
    Op("sample", sample, facts=("vocab",)),
    Op("sample_rows", sample_rows, facts=("vocab",)),
    Op("reject_sample", reject_sample),
    Op("logprobs", logprobs, facts=("vocab",)),
)
