"""Requests that share a prefix compute it once: together or one after the other, whoever of them goes away."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_fakes import VOCAB, FakeEngine

from hotplug.core.request import Request
from hotplug.core.scheduler.plan import StepPlan
from hotplug.core.scheduler.policy import FCFS, PRIORITY

CHECKS = settings(
    deadline=None, max_examples=200, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
MAX_MODEL_LEN = 64
PREFIX = [i % 37 for i in range(40)]


def entries(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(row, start, num_tokens) of each entry of a plan."""
    assert plan is not None
    return list(zip(plan.rows.tolist(), plan.start.tolist(), plan.num_tokens.tolist(), strict=True))


def prefill_tokens(plan: StepPlan | None) -> int:
    return 0 if plan is None else int(plan.num_tokens[plan.num_decodes :].sum())


def least_tokens(requests: Sequence[Request], block_size: int) -> int:
    """Prompt tokens to compute, request after request, when every full block is computed once for each salt.

    A request computes one token at least, and those of a prompt whose log-probabilities it wants all.
    """
    known: set[tuple[str, tuple[int, ...]]] = set()
    total = 0
    for request in requests:
        tokens, matched = request.prompt_token_ids, 0
        prefixes = [(request.cache_salt, tuple(tokens[:end])) for end in range(block_size, len(tokens) + 1, block_size)]
        if request.sampling.prompt_logprobs is None:
            while matched < (len(tokens) - 1) // block_size and prefixes[matched] in known:
                matched += 1
        known.update(prefixes)
        total += len(tokens) - matched * block_size
    return total


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Engines of every kind; how large the pool is comes with the test."""
    chunked, mixed = draw(st.booleans()), draw(st.booleans())
    max_num_seqs = draw(st.integers(2, 8))
    least = max(max_num_seqs if mixed else 1, 1 if chunked else MAX_MODEL_LEN)
    return {
        "block_size": draw(st.sampled_from([1, 2, 4, 8])),
        "window": draw(st.sampled_from([None, None, 3, 16])),
        "depth": draw(st.sampled_from([0, 1, 2])),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": least + draw(st.integers(0, 24)),
        "max_model_len": MAX_MODEL_LEN,
        "policy": draw(st.sampled_from([FCFS, PRIORITY])),
        "chunked_prefill": chunked,
        "mixed_steps": mixed,
        "max_prefill_requests": draw(st.none() | st.integers(1, 3)) if not mixed else None,
    }


def roomy(options: dict[str, Any], **changes: Any) -> FakeEngine:
    """An engine in which nothing is ever preempted or evicted."""
    return FakeEngine(**{"num_blocks": 2 + 20 * MAX_MODEL_LEN // options["block_size"], **options, **changes})


def add_some(engine: FakeEngine, seed: int, *, max_tokens: int = 1, most: int = 12) -> None:
    """Requests that begin with one of two stems, as far as chance has it, and go on alone."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCAB) for _ in range(50)] for _ in range(2)]
    for _ in range(rng.randint(2, most)):
        shared = rng.choice(stems)[: rng.choice([rng.randint(1, 50), 50, 32, 16])]
        engine.add(
            shared + [rng.randrange(3) for _ in range(rng.randint(0, 9))],
            salt=rng.choice(["", "", "tenant"]),
            priority=rng.randrange(3),
            max_tokens=rng.randint(1, max_tokens),
            prompt_logprobs=rng.choice([None, None, None, 0]),
        )


def run(engine: FakeEngine) -> int:
    """Run to the end; returns the prompt tokens that were computed."""
    total = 0
    while engine.scheduler.has_work or engine.pending:
        total += prefill_tokens(engine.step())
    engine.run()
    return total


# --- whatever the engine, whatever the requests ---


@CHECKS
@given(options(), st.integers(0, 2**16))
def test_a_block_shared_by_requests_that_arrive_together_is_computed_once(options: dict[str, Any], seed: int) -> None:
    engine = roomy(options)
    add_some(engine, seed)
    order = sorted(engine.requests.values(), key=lambda r: (engine.config.policy.rank(r), int(r.id[1:])))
    assert run(engine) == least_tokens(order, options["block_size"])
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert stats.prompt_tokens - stats.prefix_hits == least_tokens(order, options["block_size"])


@CHECKS
@given(options(), st.integers(0, 2**16))
def test_who_goes_away_costs_those_that_wait_less_than_a_block(options: dict[str, Any], seed: int) -> None:
    engine, rng = roomy({**options, "policy": FCFS}), random.Random(seed)
    add_some(engine, seed)
    computed = aborts = 0
    for _ in range(rng.randint(1, 12)):
        computed += prefill_tokens(engine.step())
        alive = sorted(engine.requests.keys() - engine.reasons.keys(), key=lambda name: int(name[1:]))
        if alive and rng.random() < 0.4:
            engine.abort(rng.choice(alive[:2]))  # most often whoever is in the middle of its prompt
            aborts += 1
    computed += run(engine)
    engine.check_outputs()
    lost = aborts * (options["block_size"] - 1)
    assert computed <= least_tokens(list(engine.requests.values()), options["block_size"]) + lost


@pytest.mark.slow
@CHECKS
@given(options(), st.integers(0, 2**16), st.integers(0, 40), st.sampled_from([0, 12]))
def test_a_pool_that_is_too_small_neither_stops_nor_changes_an_output(
    options: dict[str, Any], seed: int, tokens: int, host_blocks: int
) -> None:
    """Leaders are preempted while others share their blocks, and blocks are evicted before they are asked for."""
    blocks = 2 + (MAX_MODEL_LEN + tokens) // options["block_size"]
    outputs = []
    for prefix_cache in (True, False):
        engine = FakeEngine(num_blocks=blocks, num_host_blocks=host_blocks, prefix_cache=prefix_cache, **options)
        add_some(engine, seed, max_tokens=20)
        engine.run()
        engine.check_outputs()
        outputs.append(engine.outputs)
    assert outputs[0] == outputs[1]


@CHECKS
@given(options(), st.integers(0, 2**16))
def test_sharing_makes_nobody_wait_longer(options: dict[str, Any], seed: int) -> None:
    """First tokens come in the order of arrival, and none in a later step than without the prefix cache."""
    begun: list[dict[str, int]] = []
    for prefix_cache in (True, False):
        engine = roomy({**options, "policy": FCFS, "depth": 0}, prefix_cache=prefix_cache)
        add_some(engine, seed)
        steps: dict[str, int] = {}
        while engine.scheduler.has_work:
            engine.step()
            steps |= {name: engine.scheduler.stats().steps for name in engine.reasons if name not in steps}
        begun.append(steps)
    shared, alone = begun
    assert all(shared[name] <= alone[name] for name in alone)
    in_order = [shared[name] for name in sorted(shared, key=lambda name: int(name[1:]))]
    assert in_order == sorted(in_order)


# --- one by one ---


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_followers_of_a_prefix_longer_than_a_step_start_when_it_is_planned_to_its_end(depth: int) -> None:
    engine = FakeEngine(max_num_batched_tokens=16, depth=depth)
    for i in range(3):
        engine.add([*PREFIX, i], max_tokens=1)
    plans = [engine.step() for _ in range(3)]
    assert [entries(p) for p in plans] == [[(0, 0, 16)], [(0, 16, 16)], [(0, 32, 9), (1, 40, 1), (2, 40, 1)]]
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.stats().prefix_hits == 80


def test_where_prefills_and_decodes_take_turns_followers_join_the_next_prefill() -> None:
    engine = FakeEngine(mixed_steps=False, max_prefill_requests=1, max_num_batched_tokens=16)
    for i in range(2):
        engine.add([*PREFIX, i], max_tokens=2)
    plans = [engine.step() for _ in range(5)]
    assert [entries(p) for p in plans] == [[(0, 0, 16)], [(0, 16, 16)], [(0, 32, 9)], [(0, 41, 1)], [(0, 40, 1)]]
    engine.run()
    engine.check_outputs()


def test_with_a_window_followers_share_what_the_first_has_left_behind() -> None:
    engine = FakeEngine(window=6, max_num_batched_tokens=16)
    engine.add([*PREFIX, *range(20)], max_tokens=1)
    engine.add([*PREFIX, 5, 5], max_tokens=1)
    assert run(engine) == 60 + 2
    engine.check_outputs()


@pytest.mark.parametrize("depth", [0, 2])
def test_when_the_first_is_aborted_the_next_goes_on_from_its_last_full_block(depth: int) -> None:
    engine = FakeEngine(max_num_batched_tokens=18, depth=depth)
    names = [engine.add([*PREFIX, i], max_tokens=1) for i in range(3)]
    engine.step()
    engine.abort(names[0])
    assert entries(engine.step()) == [(0, 16, 18)]
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize("host_blocks", [0, 32])
@pytest.mark.parametrize("depth", [0, 2])
def test_when_the_first_is_preempted_whoever_takes_its_place_goes_on(depth: int, host_blocks: int) -> None:
    engine = FakeEngine(
        policy=PRIORITY, max_num_seqs=1, max_num_batched_tokens=16, depth=depth, num_host_blocks=host_blocks
    )
    engine.add([*PREFIX, 0], priority=5, max_tokens=3)
    engine.step()
    engine.add([*PREFIX, 1], priority=1, max_tokens=3)
    assert entries(engine.step()) == [(0, 16, 16)]
    engine.run()
    engine.check_outputs()
    stats = engine.scheduler.stats()
    assert (stats.preemptions, stats.prefix_hits) == (1, 16)
    assert engine.device.computed_tokens == 41 + 2 + 1 + 2


def test_one_of_another_tenant_that_arrives_in_the_middle_computes_its_own() -> None:
    engine = FakeEngine(max_num_batched_tokens=64, max_model_len=64)
    for salt in ("a", "b", "a"):
        engine.add([*PREFIX, 1], salt=salt, max_tokens=1)
    assert [n for plan in (engine.step(), engine.step()) for _, _, n in entries(plan)] == [41, 23, 18, 1]
    engine.run()
    engine.check_outputs()


def test_a_request_whose_prompt_is_scored_computes_it_all_and_still_leads_the_others() -> None:
    engine = FakeEngine(max_num_batched_tokens=64)
    engine.add([*PREFIX, 0], max_tokens=1, prompt_logprobs=0)
    engine.add([*PREFIX, 1], max_tokens=1)
    assert entries(engine.step()) == [(0, 0, 41), (1, 40, 1)]
    engine.run()
    engine.check_outputs()
