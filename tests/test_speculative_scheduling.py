"""Verifications in the schedule: what a step may hold, whose tokens count, and that nothing is lost on the way."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_fakes import EOS, FakeEngine
from test_scheduler_properties import CHECKS, random_prompt, speculations

from hotplug.core.errors import RequestError
from hotplug.core.logprobs import TokenLogprobs
from hotplug.core.scheduler.drafter import Speculation
from hotplug.core.scheduler.plan import StepPlan, StepResult

LOOPS = 10**6
"""`repeats` of a device whose tokens go round in `CIRCLE`, but for one in a million."""
CIRCLE = [8, 11, 10, 13, 12, 15, 14, 9]


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def engine(
    *, depth: int = 0, repeats: int = LOOPS, max_requests: int = 8, tokens: int = 4, **options: Any
) -> FakeEngine:
    speculation = Speculation(by_default=True, tokens=tokens, shortest=2, max_requests=max_requests)
    return FakeEngine(depth=depth, repeats=repeats, speculation=speculation, **options)


def steps(one: FakeEngine) -> list[StepPlan]:
    """Run to the end; the plans."""
    plans = []
    while one.scheduler.has_work or one.pending:
        plan = one.step()
        if plan is not None:
            plans.append(plan)
    one.check_outputs()
    return plans


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_text_that_repeats_takes_fewer_steps(depth: int) -> None:
    one = engine(depth=depth)
    one.add([1, 2, 3], max_tokens=50)
    plans = steps(one)
    stats = one.scheduler.stats()
    assert stats.generated_tokens == 50
    assert len(plans) < 30 and max(plan.total_tokens for plan in plans[1:]) == 5
    assert stats.accepted_tokens > 20
    assert stats.verifications == sum(plan.num_verifies for plan in plans)
    assert stats.proposed_tokens == sum(len(plan.drafts) - plan.num_verifies for plan in plans)


def test_the_last_verification_ends_with_the_last_token() -> None:
    """No token is computed that the request could not use."""
    for most in range(20, 32):
        one = engine()
        one.add([1, 2, 3], max_tokens=most)
        plans = steps(one)
        assert max(int((plan.start + plan.num_tokens).max()) for plan in plans) == 3 + most - 1
        assert len(one.outputs["r0"]) == most


def test_a_request_that_does_not_want_to_decodes_as_ever() -> None:
    one = engine()
    one.add([1, 2, 3], max_tokens=30, speculative=False)
    assert len(steps(one)) == 30
    assert one.scheduler.stats().proposed_tokens == 0


def test_a_request_may_want_to_where_others_do_not() -> None:
    one = FakeEngine(repeats=LOOPS, speculation=Speculation(by_default=False))
    one.add([1, 2, 3], max_tokens=40, speculative=True)
    one.add([1, 2, 4], max_tokens=40)
    verified = {row for plan in steps(one) for row in plan.rows[plan.num_decodes : plan.first_chunk].tolist()}
    assert verified == {0}


@pytest.mark.parametrize("params", [{"frequency_penalty": 0.5}, {"logits_processors": {"some": {}}}])
def test_what_depends_on_each_token_before_keeps_a_request_from_it(params: dict[str, Any]) -> None:
    one = engine()
    with pytest.raises(RequestError, match=f"speculative cannot go with {next(iter(params))}"):
        one.add([1, 2, 3], speculative=True, **params)
    one.add([1, 2, 3], max_tokens=30, **params)
    assert len(steps(one)) == 30


def test_asking_in_vain_is_refused() -> None:
    one = FakeEngine()
    with pytest.raises(RequestError, match="the platform does not serve speculative decoding"):
        one.add([1, 2, 3], speculative=True)
    one.add([1, 2, 3], max_tokens=2, speculative=False)
    one.run()


def test_more_requests_than_may_speculate_all_decode() -> None:
    one = engine(max_requests=1)
    one.add([1, 2, 3], max_tokens=40)
    one.add([1, 2, 4], max_tokens=20)
    plans = steps(one)
    together = [plan for plan in plans if len(plan.rows) > 1]
    assert together and not any(plan.num_verifies for plan in together)
    assert any(plan.num_verifies for plan in plans)


def test_proposals_leave_half_of_the_budget_to_prompts() -> None:
    one = engine(max_num_batched_tokens=8, tokens=8)
    one.add(CIRCLE * 2, max_tokens=40)
    for _ in range(4):
        one.step()
    one.add(list(range(20, 39)), max_tokens=2)
    plans = [one.step() for _ in range(4)]
    assert [plan.num_tokens.tolist() for plan in plans] == [[3, 5]] * 3 + [[3, 4]]
    assert [plan.num_verifies for plan in plans] == [1] * 4


def test_nobody_is_preempted_for_proposals() -> None:
    """Two requests that just fit: proposals are cut to the blocks that are there."""
    one = engine(num_blocks=1 + 2 * 6, block_size=4, max_model_len=24, tokens=8)
    for first in (1, 5):
        one.add([first, 2, 3], max_tokens=21)
    plans = steps(one)
    assert one.scheduler.stats().preemptions == 0
    assert any(plan.num_verifies for plan in plans)


def test_a_wrong_proposal_leaves_no_wrong_block_in_the_prefix_cache() -> None:
    one = engine(repeats=4, block_size=2, tokens=8)
    name = one.add([1, 2, 3], max_tokens=40)
    steps(one)
    stats = one.scheduler.stats()
    assert stats.accepted_tokens < stats.proposed_tokens
    one.add([1, 2, 3, *one.outputs[name][:-1]], max_tokens=10)
    steps(one)  # the device checks what each query reads
    assert one.scheduler.stats().prefix_hits >= 38


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stop_token_among_the_accepted_ones_ends_the_request(depth: int) -> None:
    one = engine(depth=depth)
    one.add(CIRCLE * 2, max_tokens=40, stop_token_ids=(CIRCLE[2],))
    plans = steps(one)
    last = one.deltas[-1]
    assert (last.token_ids, last.finish_reason, last.stop_token) == (CIRCLE[1:3], "stop", CIRCLE[2])
    assert plans[1].drafts.tolist() == CIRCLE[:3]  # a third token was accepted, and dropped
    assert one.scheduler.stats().generated_tokens == 3
    assert one.kv.pool.num_used == 0


def test_logprobs_are_cut_with_their_tokens() -> None:
    one = engine()
    one.add([8, 9, 8, 9, 8, 9], max_tokens=20, logprobs=0, stop_token_ids=(9,))
    scheduler = one.scheduler
    prompt, verification = scheduler.schedule(), None
    assert prompt is not None
    scheduler.update(prompt, StepResult(int32(8)))
    verification = scheduler.schedule()
    assert verification is not None and verification.drafts.tolist() == [8, 9, 8]
    entries = [TokenLogprobs([token], [-0.5], 1) for token in (9, 8, 4)]
    result = StepResult(int32(4), {0: entries}, verified={0: [9, 8, 4]})
    (delta,) = scheduler.update(verification, result)
    assert (delta.token_ids, delta.logprobs, delta.finish_reason) == ([9], entries[:1], "stop")


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_ends_and_preemptions_while_a_verification_is_in_flight(end: str) -> None:
    one = engine(depth=1)
    name = one.add([1, 2, 3], max_tokens=40)
    while not (one.pending and one.pending[-1][0].num_verifies):
        one.step()
    if end == "abort":
        one.abort(name)
    else:
        one.scheduler.planner.preempt(one.scheduler.state.batch.owner(0))
    one.run()
    one.check_outputs()
    assert one.kv.pool.num_used == 0


def test_a_request_waits_for_its_last_token_only_if_it_may_be_followed_by_proposals() -> None:
    """With steps in flight: a text that never repeats is planned in every step."""
    one = engine(depth=1, repeats=0)
    one.add(list(range(30)), max_tokens=10)
    assert [one.step() is not None for _ in range(10)] == [True] * 10


def test_unrolled_steps_have_an_entry_a_token() -> None:
    none = np.empty(0, np.int32)
    plan = StepPlan(
        rows=int32(3, 1, 0, 2), start=int32(9, 20, 7, 4), num_tokens=int32(1, 3, 2, 5),
        samples=np.array([True, True, True, False]), num_decodes=1, released=none, admitted=[],
        block_tables=none, block_rows=none,
        block_cols=none, block_ids=none, num_verifies=2, drafts=int32(5, 6, 7, 8, 9),
    )  # fmt: skip
    flat = plan.unrolled()
    assert flat.rows.tolist() == [3, 1, 1, 1, 0, 0, 2]
    assert flat.start.tolist() == [9, 20, 21, 22, 7, 8, 4]
    assert flat.num_tokens.tolist() == [1, 1, 1, 1, 1, 1, 5]
    assert flat.samples.tolist() == [True] * 6 + [False]
    assert (flat.num_decodes, flat.num_verifies, flat.first_chunk) == (6, 0, 6)
    assert flat.unrolled() is flat


@st.composite
def lives(draw: st.DrawFn) -> tuple[FakeEngine, list[tuple[str, int]]]:
    """An engine whose requests speculate, with long answers that mostly repeat, and what happens to it."""
    block_size = draw(st.sampled_from([1, 2, 4]))
    window = draw(st.sampled_from([None, None, 3, 7, 16]))
    mixed = draw(st.sampled_from([True, True, False]))
    made = FakeEngine(
        num_blocks=2 + draw(st.integers(20, 130)) // block_size,
        block_size=block_size,
        window=window,
        depth=draw(st.sampled_from([0, 1, 2])),
        prefix_cache=draw(st.booleans()),
        num_host_blocks=draw(st.sampled_from([0, 40])),
        max_num_seqs=4,
        max_num_batched_tokens=draw(st.sampled_from([4, 7, 16, 40])),
        max_model_len=64,
        mixed_steps=mixed,
        max_prefill_requests=draw(st.none() | st.integers(4, 8)),
        speculation=draw(speculations()),
        repeats=draw(st.sampled_from([6, 20, 100])),
    )
    actions = st.sampled_from(["add", "add", *["step"] * 9, "abort", "update"])
    return made, draw(st.lists(st.tuples(actions, st.integers(0, 2**16)), min_size=60, max_size=120))


def test_random_lives_with_speculation_keep_every_invariant_and_every_output() -> None:
    totals = {"accepted": 0, "wrong": 0, "preemptions": 0}

    @settings(CHECKS, max_examples=150)
    @given(lives())
    def check(life: tuple[FakeEngine, list[tuple[str, int]]]) -> None:
        one, script = life
        for action, seed in script:
            act(one, action, random.Random(seed))
        one.run()
        one.check_outputs()
        stats = one.scheduler.stats()
        totals["accepted"] += stats.accepted_tokens
        totals["wrong"] += stats.proposed_tokens - stats.accepted_tokens
        totals["preemptions"] += stats.preemptions

    check()
    assert min(totals.values()) > 100, totals


def act(one: FakeEngine, action: str, rng: random.Random) -> None:
    alive = sorted(one.requests.keys() - one.reasons.keys())
    if action == "step":
        one.step()
    elif action == "update" and one.pending:
        one.update()
    elif action == "abort" and alive:
        one.abort(rng.choice(alive))
    elif action == "add":
        one.add(random_prompt(rng, one)[: one.scheduler.max_model_len - 2], salt=rng.choice(["", "tenant"]),
                priority=rng.randrange(3), eos=(EOS,), max_tokens=rng.choice([None, 30, 50]),
                speculative=rng.choice([None, True, True, False]))  # fmt: skip
