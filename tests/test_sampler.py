"""The sampler's state: what each row's parameters do over steps, and that rows leave nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.plan import Plan
from hotplug.core.request import SamplingParams
from hotplug.core.sample.sampler import Draw, Sampled, Sampler

VOCAB = 8
BASE = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])  # greedy takes 7, then 6, 5, ... as they are lowered


class CountingSampler(Sampler):
    """Counts the tokens that each row has generated, as the runner does."""

    def admit(self, row: int, params: Any, seed: int, token_ids: Any, num_prompt_tokens: int, eos: Any) -> None:
        super().admit(row, params, seed, token_ids, num_prompt_tokens, eos)
        self.counts = {**getattr(self, "counts", {}), row: len(token_ids) - num_prompt_tokens}

    def next(self, logits: Tensor, rows: np.ndarray) -> Sampled:
        counters = np.array([self.counts[row] for row in rows.tolist()])
        self.counts |= {row: self.counts[row] + 1 for row in rows.tolist()}
        return self.sample(logits, rows, counters)


def make_sampler(rows: int = 4) -> CountingSampler:
    return CountingSampler(Plan(builtin_registry(), arch="test"), rows, VOCAB, torch.device("cpu"))


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def counters(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def admit(
    sampler: Sampler, row: int, *, prompt: tuple[int, ...] = (0,), outputs: tuple[int, ...] = (), seed: int = 1,
    eos: tuple[int, ...] = (), **params: Any,
) -> None:  # fmt: skip
    params.setdefault("temperature", 0.0)
    sampler.admit(row, SamplingParams(**params), seed, int32(*prompt, *outputs), len(prompt), eos)


def step(sampler: CountingSampler, *rows: int, logits: Tensor = BASE) -> list[int]:
    return sampler.next(logits.repeat(len(rows), 1), int32(*rows)).tokens.tolist()


def run(sampler: CountingSampler, row: int, steps: int, logits: Tensor = BASE) -> list[int]:
    return [step(sampler, row, logits=logits)[0] for _ in range(steps)]


def test_greedy_takes_the_best_token() -> None:
    sampler = make_sampler()
    admit(sampler, 2)
    assert step(sampler, 2) == [7]


def test_greedy_and_random_rows_share_a_step() -> None:
    alone, mixed = make_sampler(), make_sampler()
    admit(alone, 0, temperature=2.0)
    admit(mixed, 3, temperature=2.0)
    admit(mixed, 1)
    assert [step(mixed, 1, 3) for _ in range(20)] == [[7, token] for token in run(alone, 0, 20)]


def test_frequency_penalty_grows_with_every_occurrence() -> None:
    sampler = make_sampler()
    admit(sampler, 0, frequency_penalty=0.75)
    # 7 falls to 6.25, then 5.5 and is passed by 6, which falls to 5.25; 7 leads again
    assert run(sampler, 0, 4) == [7, 7, 6, 7]


def test_presence_penalty_counts_once() -> None:
    sampler = make_sampler()
    admit(sampler, 0, presence_penalty=1.5)
    assert run(sampler, 0, 5) == [7, 6, 7, 7, 7]  # 7 stays at 5.5; 6 at 4.5


def test_presence_penalty_ignores_the_prompt() -> None:
    sampler = make_sampler()
    admit(sampler, 0, prompt=(7,), presence_penalty=1.5)
    assert step(sampler, 0) == [7]


def test_repetition_penalty_counts_the_prompt() -> None:
    sampler = make_sampler()
    admit(sampler, 0, prompt=(7,), repetition_penalty=2.0)
    assert run(sampler, 0, 2) == [6, 5]


def test_logit_bias_is_added() -> None:
    sampler = make_sampler()
    admit(sampler, 0, logit_bias={7: -100.0, 2: 4.5})
    admit(sampler, 1)
    assert step(sampler, 1, 0) == [7, 2]


def test_min_tokens_hold_back_end_and_stop_tokens() -> None:
    sampler = make_sampler()
    admit(sampler, 0, min_tokens=2, eos=(7,), stop_token_ids=(6,))
    assert run(sampler, 0, 3) == [5, 5, 7]


def test_min_tokens_hold_back_nothing_that_does_not_end_the_request() -> None:
    """Then such a request costs no more than any other."""
    sampler = make_sampler()
    admit(sampler, 0, min_tokens=2, ignore_eos=True, eos=(7,))
    admit(sampler, 1, min_tokens=2, ignore_eos=True, eos=(7,), stop_token_ids=(6,))
    assert sampler.demand(int32(0), counters(0)) is Draw.GREEDY
    assert sampler.demand(int32(1), counters(0)) is Draw.LOGITS
    assert step(sampler, 0, 1) == [7, 7]


def test_rows_of_a_step_have_their_own_biases_and_held_back_tokens() -> None:
    sampler = make_sampler()
    admit(sampler, 0, min_tokens=1, eos=(7,), stop_token_ids=(5, 6))
    admit(sampler, 1, logit_bias={3: 20.0, 4: 19.0}, min_tokens=1, eos=(3,))
    admit(sampler, 2, logit_bias={0: 50.0})
    admit(sampler, 3)
    assert step(sampler, 2, 0, 3, 1) == [0, 4, 7, 4]


def test_what_a_step_needs_follows_the_rows_that_run() -> None:
    sampler = make_sampler()
    assert sampler.demand(int32(1, 2), counters(0, 0)) is Draw.GREEDY
    admit(sampler, 0, temperature=1.0)
    admit(sampler, 1, logprobs=0)
    admit(sampler, 2)
    assert sampler.demand(int32(2), counters(0)) is Draw.GREEDY
    assert sampler.demand(int32(0, 2), counters(0, 0)) is Draw.RANDOM
    assert sampler.demand(int32(0, 1, 2), counters(0, 0, 0)) is Draw.LOGITS
    sampler.release(int32(0, 1))
    admit(sampler, 1)
    assert sampler.demand(int32(1, 2), counters(0, 0)) is Draw.GREEDY


def test_min_tokens_count_the_outputs_of_before_a_preemption() -> None:
    sampler = make_sampler()
    admit(sampler, 0, outputs=(5,), min_tokens=2, eos=(7,))
    assert run(sampler, 0, 2) == [6, 7]


def test_a_reused_row_starts_clean() -> None:
    sampler = make_sampler()
    admit(sampler, 0, prompt=(7,), repetition_penalty=3.0, frequency_penalty=1.0, logit_bias={6: -50.0}, logprobs=2,
          min_tokens=9, eos=(5,))  # fmt: skip
    assert run(sampler, 0, 2) == [4, 3]
    sampler.release(int32(0))
    admit(sampler, 0)
    sampled = sampler.next(BASE.unsqueeze(0), int32(0))
    assert sampled.tokens.tolist() == [7]
    assert sampled.logprobs is None


def test_a_reused_penalty_slot_forgets_its_counts() -> None:
    sampler = make_sampler()
    admit(sampler, 0, repetition_penalty=2.0)
    assert run(sampler, 0, 2) == [7, 6]
    sampler.release(int32(0))
    admit(sampler, 1, repetition_penalty=2.0)
    assert step(sampler, 1) == [7]


def test_penalized_rows_keep_their_counts_when_the_tables_grow() -> None:
    sampler = make_sampler(rows=16)
    admit(sampler, 0, presence_penalty=2.0)
    assert run(sampler, 0, 1) == [7]
    for row in range(1, 12):
        admit(sampler, row, presence_penalty=2.0)
    assert step(sampler, 0, 11) == [6, 7]


def test_seeded_draws_repeat_whatever_else_is_in_the_batch() -> None:
    alone, crowded = make_sampler(), make_sampler()
    admit(alone, 0, temperature=5.0, seed=42)
    for row in range(4):
        admit(crowded, row, temperature=1.0 + row, top_k=row, seed=42 if row == 2 else row)
    crowded.release(int32(2))
    admit(crowded, 2, temperature=5.0, seed=42)
    expected = run(alone, 0, 12)
    assert [step(crowded, 3, 2, 0)[1] for _ in range(12)] == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 3.0}, {"frequency_penalty": 2.0, "top_p": 0.9}])
def test_a_request_back_from_preemption_continues_its_sequence(params: dict[str, float]) -> None:
    whole, resumed = make_sampler(), make_sampler()
    admit(whole, 0, temperature=4.0, seed=9, **params)
    tokens = run(whole, 0, 10)
    admit(resumed, 1, temperature=4.0, seed=9, **params)
    assert run(resumed, 1, 4) == tokens[:4]
    resumed.release(int32(1))
    admit(resumed, 3, temperature=4.0, seed=9, outputs=tuple(tokens[:4]), **params)
    assert run(resumed, 3, 6) == tokens[4:]


def test_penalties_count_the_outputs_of_before_a_preemption() -> None:
    sampler = make_sampler()
    admit(sampler, 0, outputs=(7, 7, 6), frequency_penalty=0.9)
    # the outputs so far left 7 at 5.2 and 6 at 5.1; 5 stands at 5.15 and then falls
    logits = BASE + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.15, 0.0, 0.0])
    assert run(sampler, 0, 3, logits=logits) == [7, 5, 6]


def test_logprobs_are_of_the_logits_before_penalties_bias_and_temperature() -> None:
    sampler = make_sampler()
    admit(sampler, 0)
    admit(sampler, 1, prompt=(7,), repetition_penalty=4.0, logit_bias={2: 9.0}, logprobs=3)
    sampled = sampler.next(BASE.repeat(2, 1), int32(0, 1))
    assert sampled.logprobs is not None
    assert sampled.logprob_rows == [1]
    (entry,) = sampled.logprobs.to_host(sampled.logprob_counts)
    expected = BASE.log_softmax(-1)
    assert entry.token_ids == [2, 7, 6, 5]
    assert entry.rank == 6
    assert entry.logprobs == pytest.approx(expected[[2, 7, 6, 5]].tolist())


def test_each_row_gets_as_many_logprobs_as_it_asked_for() -> None:
    sampler = make_sampler()
    for row, count in enumerate((0, 2, 1)):
        admit(sampler, row, logprobs=count)
    sampled = sampler.next(BASE.repeat(3, 1), int32(0, 1, 2))
    assert sampled.logprobs is not None
    assert [len(e.token_ids) for e in sampled.logprobs.to_host(sampled.logprob_counts)] == [1, 3, 2]


def test_the_step_leaves_its_logits_unchanged() -> None:
    sampler = make_sampler()
    admit(sampler, 0, logit_bias={1: 5.0}, min_tokens=1, eos=(7,), repetition_penalty=2.0)
    logits = BASE.unsqueeze(0).clone()
    sampler.next(logits, int32(0))
    assert torch.equal(logits[0], BASE)
