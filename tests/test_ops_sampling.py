"""Sampling ops: which tokens filters keep, how often each is drawn, penalties and log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.ops.sampling import logprobs, penalties, reject_sample, sample, sample_rows, uniform
from hotplug.core.request import SamplingParams
from hotplug.core.sample.sampler import Sampler

DRAWS = 20_000
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, -3.0, 1.9, 0.0, 1.2])


def draw(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None, draws: int = DRAWS, seed: int = 0,
) -> Tensor:  # fmt: skip
    """`draws` tokens from one row of logits: one seed, a counter each, as a long request draws them."""

    def column(value: float | None) -> Tensor | None:
        return None if value is None else torch.full((draws,), value)

    return sample(
        logits.expand(draws, -1), torch.full((draws,), temperature),
        None if top_k is None else torch.full((draws,), top_k), column(top_p), column(min_p),
        torch.full((draws,), seed), torch.arange(draws),
    )  # fmt: skip


def expected_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The filtered distribution, by the definitions: one token at a time, best first, in float64."""
    scores = logits.double().numpy() / temperature
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: top_k or None]
    mass = {i: math.exp(scores[i]) for i in order}
    total, kept, seen = sum(mass.values()), [], 0.0
    for i in order:
        if seen < top_p:
            kept.append(i)
        seen += mass[i] / total
    kept = [i for i in kept if mass[i] >= min_p * mass[kept[0]]]
    probabilities = np.zeros(len(scores))
    probabilities[kept] = [mass[i] for i in kept]
    return probabilities / probabilities.sum()


FILTERS = [
    (1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (2.5, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (1.0, 100, 1.0, 0.0),
    (1.0, 0, 0.7, 0.0), (1.0, 0, 0.999, 0.0), (0.8, 5, 0.8, 0.0), (1.0, 0, 1.0, 0.3), (1.3, 6, 0.9, 0.1),
]  # fmt: skip


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
def test_draws_follow_the_filtered_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    tokens = draw(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    counts = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    probabilities = expected_probabilities(LOGITS, temperature, top_k, top_p, min_p)
    kept = probabilities > 0
    assert not counts[~kept].any()
    expected = probabilities[kept] * DRAWS
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = max(kept.sum() - 1, 1)
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4  # about one in 10,000


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_narrowest_filter_is_greedy(filters: dict[str, float]) -> None:
    assert set(draw(LOGITS, draws=200, **filters).tolist()) == {2}


def test_neutral_filters_draw_what_absent_filters_draw() -> None:
    neutral = draw(LOGITS, top_k=0, top_p=1.0, min_p=0.0, draws=2000)
    assert_close(neutral, draw(LOGITS, draws=2000))


def test_tokens_tied_with_the_last_kept_are_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0])
    assert set(draw(logits, top_k=2, draws=2000).tolist()) == {0, 1, 2, 4}


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((9,), float("-inf"))
    logits[[4, 6]] = 0.0
    assert set(draw(logits, draws=2000).tolist()) == {4, 6}


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-3])
def test_a_temperature_near_zero_draws_the_best_token(temperature: float) -> None:
    assert set(draw(LOGITS * 50, temperature=temperature, top_p=0.9, draws=100).tolist()) == {2}


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    rows, vocab = 6, 50
    logits = torch.randn((rows, vocab), generator=torch.Generator().manual_seed(0))
    temperature, top_k = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 3.0]), torch.tensor([0, 5, 0, 9, 2, 0])
    top_p, min_p = torch.tensor([1.0, 0.9, 1.0, 0.5, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.2, 0.0, 0.0, 0.1])
    seeds, counters = torch.tensor([5, -7, 5, 2**62, 0, 5]), torch.tensor([0, 3, 9, 1, 1, 0])
    columns = (temperature, top_k, top_p, min_p, seeds, counters)
    together = sample(logits, *columns)
    for order in (torch.arange(rows).flip(0), torch.tensor([4]), torch.tensor([2, 0, 5])):
        assert_close(sample(logits[order], *(c[order] for c in columns)), together[order])


def test_draws_of_successive_tokens_and_of_other_seeds_differ() -> None:
    flat = torch.zeros(1000)
    first = draw(flat, draws=50)
    assert len(set(first.tolist())) > 40
    assert (first == draw(flat, draws=50, seed=1)).sum() < 5


def batch(count: int, seed: int) -> dict[str, Tensor]:
    """Parameters of `count` batch rows: greedy ones, and every mixture of neutral and narrow filters."""
    rng = torch.Generator().manual_seed(seed)
    some, coin = torch.rand((4, count), generator=rng), torch.rand((4, count), generator=rng) < 0.5
    neutral = torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    wide = torch.stack([some[0] * 2 + 0.1, some[1] * 20 + 1, some[2].clamp(0.05), some[3] * 0.3])
    temperature, top_k, top_p, min_p = torch.where(coin, wide, neutral)
    seeds = torch.randint(-(2**62), 2**62, (count,), generator=rng)
    return {"temperature": temperature, "top_k": top_k.to(torch.int64), "top_p": top_p, "min_p": min_p, "seeds": seeds}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_a_batch_take_their_best_token_or_draw_as_each_does_alone(seed: int, index_dtype: torch.dtype) -> None:
    state, rng = batch(16, seed), torch.Generator().manual_seed(seed)
    rows = torch.randperm(16, generator=rng)[:11]
    logits = torch.randn((11, 60), generator=rng) * 3
    counters = torch.randint(0, 500, (11,), generator=rng)
    expected = []
    for i, row in enumerate(rows.tolist()):
        own = {name: values[row : row + 1] for name, values in state.items()}
        draw_alone = sample(logits[i : i + 1], **own, counters=counters[i : i + 1]) if own["temperature"] > 0 else None
        expected.append(logits[i].argmax() if draw_alone is None else draw_alone[0])
    actual = sample_rows(logits, rows.to(index_dtype), **state, counters=counters)
    assert (state["temperature"][rows] == 0).any() and (state["temperature"][rows] > 0).any()
    assert actual.dtype == torch.int64
    assert actual.tolist() == [int(token) for token in expected]


def test_rows_of_a_batch_take_the_tokens_that_the_sampler_takes() -> None:
    state, vocab = batch(12, 7), 40
    sampler = Sampler(Plan(builtin_registry(), arch="test"), 12, vocab, torch.device("cpu"))
    for row in range(12):
        own = {name: values[row].item() for name, values in state.items()}
        sampler.admit(row, SamplingParams(**{k: v for k, v in own.items() if k != "seeds"}), int(own["seeds"]),
                      np.zeros(3, np.int32), 1, ())  # fmt: skip
    rows = np.array([11, 2, 5, 0, 8, 3, 9], np.int32)
    for counter in range(2, 6):  # two tokens are there already
        logits = torch.randn((len(rows), vocab), generator=torch.Generator().manual_seed(counter)) * 2
        actual = sample_rows(logits, torch.from_numpy(rows), **state, counters=torch.full((len(rows),), counter))
        assert actual.tolist() == sampler.sample(logits, rows, np.full(len(rows), counter)).tokens.tolist()


def test_greedy_rows_take_the_first_of_equals_and_ignore_filters() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [float("-inf"), -5.0, -7.0, -5.0]])
    one = torch.ones(1)
    tokens = sample_rows(logits, torch.tensor([0, 0]), one * 0, torch.tensor([3]), one * 0.5, one * 0.1,
                         torch.tensor([9]), torch.tensor([0, 1]))  # fmt: skip
    assert tokens.tolist() == [1, 1]


def splitmix64(seed: int, counter: int) -> float:
    """The published generator with unbounded integers."""
    mask = 2**64 - 1
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_uniform_is_splitmix64(seed: int) -> None:
    counters = [0, 1, 2, 1000, 2**40]
    actual = uniform(torch.full((5,), seed), torch.tensor(counters))
    assert actual.tolist() == [splitmix64(seed, c) for c in counters]


def test_uniform_fills_the_unit_interval_evenly() -> None:
    values = uniform(torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000))
    assert values.min() >= 0.0 and values.max() < 1.0
    counts = torch.histc(values.float(), 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 4 * math.sqrt(2 * 99)


def test_uniform_of_neighbouring_seeds_is_uncorrelated() -> None:
    seeds = torch.arange(20_000)
    a, b = uniform(seeds, torch.zeros_like(seeds)), uniform(seeds + 1, torch.zeros_like(seeds))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03


def test_penalties_equal_a_loop_over_tokens() -> None:
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn((4, 12), generator=rng) * 3
    seen = torch.rand((4, 12), generator=rng) < 0.3
    counts = torch.randint(0, 3, (4, 12), generator=rng, dtype=torch.int32)
    repetition = torch.tensor([1.0, 1.5, 0.7, 1.2])
    presence = torch.tensor([0.0, 0.4, -1.0, 2.0])
    frequency = torch.tensor([0.0, 0.1, 0.5, -0.5])
    expected = logits.double()
    for row in range(4):
        for token in range(12):
            value, count = float(logits[row, token]), int(counts[row, token])
            if seen[row, token] or count:
                value = value / float(repetition[row]) if value > 0 else value * float(repetition[row])
            value -= float(frequency[row]) * count + (float(presence[row]) if count else 0.0)
            expected[row, token] = value
    actual = penalties(logits, seen, counts, repetition, presence, frequency)
    assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def test_neutral_penalties_change_nothing() -> None:
    logits, ones, zeros = torch.randn(2, 5), torch.ones(2), torch.zeros(2)
    seen, counts = torch.ones((2, 5), dtype=torch.bool), torch.full((2, 5), 3, dtype=torch.int32)
    assert_close(penalties(logits, seen, counts, ones, zeros, zeros), logits, rtol=0, atol=0)


@pytest.mark.parametrize("num_top", [0, 1, 4, 8])
def test_logprobs_equal_log_softmax(num_top: int) -> None:
    logits, tokens = torch.stack([LOGITS, -LOGITS]), torch.tensor([5, 2])
    chosen, rank, top_ids, top = logprobs(logits, tokens, num_top)
    expected = logits.double().numpy()
    expected = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    assert_close(chosen.double(), torch.from_numpy(expected[[0, 1], [5, 2]]), rtol=1e-6, atol=1e-6)
    assert rank.tolist() == [2, 8]
    best = np.argsort(-expected, -1)[:, :num_top]
    assert top_ids.tolist() == best.tolist()
    assert_close(top.double(), torch.from_numpy(np.take_along_axis(expected, best, -1)), rtol=1e-6, atol=1e-6)


def test_the_rank_of_a_tied_token_counts_only_better_ones() -> None:
    rank = logprobs(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), torch.tensor([2]), 0)[1]
    assert rank.tolist() == [2]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(20))
def test_proposals_hold_up_to_the_first_that_was_not_chosen(seed: int, index_dtype: torch.dtype) -> None:
    random = np.random.default_rng(seed)
    chosen = [random.integers(0, 3, random.integers(1, 9)).tolist() for _ in range(random.integers(1, 6))]
    proposed = [[t if random.random() < 0.7 else t + 1 for t in tokens[:-1]] for tokens in chosen]
    first = np.cumsum([0, *map(len, chosen)])
    accepted, last = reject_sample(
        torch.tensor([t for tokens in chosen for t in tokens]),
        torch.tensor([t for drafts in proposed for t in (*drafts, -1)], dtype=index_dtype),
        torch.tensor(first, dtype=index_dtype),
    )  # fmt: skip
    for tokens, drafts, count, token in zip(chosen, proposed, accepted.tolist(), last.tolist(), strict=True):
        assert tokens[:count] == drafts[:count]
        assert count == len(drafts) or tokens[count] != drafts[count]
        assert token == tokens[count]
    assert accepted.dtype is index_dtype and last.dtype is torch.int64
