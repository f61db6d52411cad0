"""What the scheduler does, one behaviour a test. Random lives are in test_scheduler_properties."""

from __future__ import annotations

import numpy as np
import pytest
from logprob_columns import columns
from scheduler_fakes import FakeEngine, generate_alone

from hotplug.core.errors import ConfigError, PromptTooLongError, QueueFullError, RequestError
from hotplug.core.logprobs import TokenLogprobs
from hotplug.core.request import Request, SamplingParams
from hotplug.core.scheduler.config import SchedulerConfig, ShortPrompts
from hotplug.core.scheduler.plan import StepPlan, StepResult
from hotplug.core.scheduler.policy import PRIORITY


def entries(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(row, start, num_tokens) of each entry of a plan."""
    assert plan is not None
    return list(zip(plan.rows.tolist(), plan.start.tolist(), plan.num_tokens.tolist(), strict=True))


def prompt(n: int, first: int = 0) -> list[int]:
    return [first] + [1] * (n - 1)


def first_output(tokens: list[int]) -> int:
    request = Request(id="", prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=1))
    return generate_alone(request, 64)[0][0]


# --- the shape of a step ---


def test_a_prompt_that_fits_the_budget_samples_in_its_first_step() -> None:
    engine = FakeEngine()
    engine.add(prompt(10))
    plan = engine.step()
    assert entries(plan) == [(0, 0, 10)]
    assert plan is not None and plan.samples.all() and plan.num_decodes == 0


def test_a_long_prompt_is_split_by_the_budget() -> None:
    engine = FakeEngine(max_num_batched_tokens=16)
    engine.add(prompt(40), max_tokens=1)
    plans = [engine.step() for _ in range(3)]
    assert [entries(p) for p in plans] == [[(0, 0, 16)], [(0, 16, 16)], [(0, 32, 8)]]
    assert [bool(p.samples[0]) for p in plans if p] == [False, False, True]


def test_decodes_come_first_then_partial_prefills_then_new_requests() -> None:
    engine = FakeEngine(max_num_batched_tokens=16)
    engine.add(prompt(4), max_tokens=9)
    engine.step()
    engine.add(prompt(20, first=2))
    engine.step()
    engine.add(prompt(5, first=3))
    plan = engine.step()
    assert entries(plan) == [(0, 5, 1), (1, 15, 5), (2, 0, 5)]
    assert plan is not None and plan.num_decodes == 1


SHORT = ShortPrompts(tokens=8, chunks=2)


def test_beside_decodes_a_prompt_comes_in_short_parts() -> None:
    engine = FakeEngine(max_num_batched_tokens=64, short_prompts=SHORT)
    engine.add(prompt(4), max_tokens=9)
    engine.step()
    engine.add(prompt(20, first=2))
    assert [entries(engine.step())[1:] for _ in range(3)] == [[(1, 0, 8)], [(1, 8, 8)], [(1, 16, 4)]]


def test_beside_decodes_a_step_takes_few_prompts_together() -> None:
    engine = FakeEngine(max_num_seqs=6, max_num_batched_tokens=64, short_prompts=SHORT)
    engine.add(prompt(4), max_tokens=9)
    engine.step()
    for first in (2, 3, 4, 5):
        engine.add(prompt(3, first=first))
    assert entries(engine.step())[1:] == [(1, 0, 3), (2, 0, 3)]
    assert entries(engine.step())[3:] == [(3, 0, 3), (4, 0, 3)]


def test_a_prompt_with_no_decode_beside_it_is_not_split_for_anybody() -> None:
    engine = FakeEngine(max_num_batched_tokens=64, short_prompts=SHORT)
    engine.add(prompt(20))
    assert entries(engine.step()) == [(0, 0, 20)]


def test_where_many_prompts_wait_throughput_comes_first() -> None:
    engine = FakeEngine(max_num_seqs=6, max_num_batched_tokens=64, short_prompts=SHORT)
    engine.add(prompt(4), max_tokens=9)
    engine.step()
    for first in (2, 3, 4):
        engine.add(prompt(11, first=first))  # one more than four short steps hold
    assert entries(engine.step())[1:] == [(1, 0, 11), (2, 0, 11), (3, 0, 11)]


def test_prompts_that_have_no_row_hurry_nobody() -> None:
    engine = FakeEngine(max_num_seqs=2, max_num_batched_tokens=64, short_prompts=SHORT)
    engine.add(prompt(4), max_tokens=9)
    engine.step()
    for first in (2, 3, 4):
        engine.add(prompt(20, first=first))
    assert entries(engine.step())[1:] == [(1, 0, 8)]


def test_without_chunking_a_prompt_waits_for_a_step_that_takes_it_whole() -> None:
    engine = FakeEngine(chunked_prefill=False, max_num_batched_tokens=64)
    engine.add(prompt(40))
    engine.add(prompt(40, first=2))
    assert entries(engine.step()) == [(0, 0, 40)]
    assert entries(engine.step()) == [(0, 40, 1), (1, 0, 40)]


def test_unmixed_steps_take_turns() -> None:
    engine = FakeEngine(mixed_steps=False)
    engine.add(prompt(4), max_tokens=5)
    engine.step()
    engine.add(prompt(4, first=2), max_tokens=5)
    assert entries(engine.step()) == [(0, 4, 1)]
    assert entries(engine.step()) == [(1, 0, 4)]
    assert entries(engine.step()) == [(0, 5, 1), (1, 4, 1)]


def test_new_requests_get_the_smallest_free_row() -> None:
    engine = FakeEngine()
    names = [engine.add(prompt(2, first=i)) for i in range(3)]
    engine.step()
    engine.abort(names[1])
    engine.add(prompt(2, first=5))
    plan = engine.step()
    assert plan is not None and plan.released.tolist() == [1]
    assert [a.row for a in plan.admitted] == [1]


def test_nothing_to_do_gives_no_plan() -> None:
    engine = FakeEngine()
    assert engine.scheduler.schedule() is None
    assert not engine.scheduler.has_work


# --- how requests end ---


def test_max_tokens_ends_with_length() -> None:
    engine = FakeEngine()
    name = engine.add(prompt(3), max_tokens=4)
    engine.run()
    assert (len(engine.outputs[name]), engine.reasons[name]) == (4, "length")


def test_the_end_of_the_context_ends_with_length() -> None:
    engine = FakeEngine(max_model_len=12)
    name = engine.add(prompt(3))
    engine.run()
    assert (len(engine.outputs[name]), engine.reasons[name]) == (9, "length")


@pytest.mark.parametrize("how", ["eos", "stop_token_ids", "many"])
def test_a_stop_token_ends_the_request_and_is_its_last_token(how: str) -> None:
    engine, token = FakeEngine(), first_output(prompt(3))
    if how == "eos":
        engine.add(prompt(3), eos=(token,))
    else:
        others = tuple(range(100, 120)) if how == "many" else ()
        engine.add(prompt(3), stop_token_ids=(*others, token))
    engine.run()
    (delta,) = engine.deltas
    assert (delta.token_ids, delta.finish_reason, delta.stop_token) == ([token], "stop", token)


def test_ignore_eos_runs_on_and_tells_the_device_so() -> None:
    engine = FakeEngine()
    engine.add(prompt(3), eos=(first_output(prompt(3)),), ignore_eos=True, max_tokens=5)
    plan = engine.step()
    assert plan is not None and plan.admitted[0].eos_token_ids == ()
    engine.run()
    assert engine.reasons == {"r0": "length"}


def test_only_the_first_delta_says_what_was_cached_and_how_long_it_queued() -> None:
    engine = FakeEngine()
    engine.add(prompt(9), max_tokens=1)
    engine.run()
    engine.add(prompt(9), max_tokens=2)
    engine.run()
    _, first, second = engine.deltas
    assert first.num_cached_tokens == 8 and first.queued > 0
    assert second.num_cached_tokens == 0 and second.queued == 0


def test_logprobs_travel_with_their_token() -> None:
    engine = FakeEngine()
    engine.add(prompt(3), max_tokens=2, logprobs=0)
    engine.add(prompt(3, first=2), max_tokens=2)
    plan = engine.scheduler.schedule()
    assert plan is not None
    entry = TokenLogprobs([5], [-0.5], 1)
    deltas = engine.scheduler.update(plan, StepResult(token_ids=np.array([5, 6], np.int32), logprobs={0: [entry]}))
    assert [d.logprobs for d in deltas] == [[entry], None]


def test_a_steady_decode_is_columns_and_what_is_more_than_a_token_is_a_delta() -> None:
    engine = FakeEngine()
    for number in range(3):
        engine.add(prompt(3, first=number), max_tokens=4 - number, tag=(1 << 32) + number)
    scheduler, seen = engine.scheduler, []
    entry = TokenLogprobs([7], [-0.5], 1)
    for logprobs in ({}, {}, {1: [entry]}, {}):
        plan = scheduler.schedule()
        assert plan is not None
        gained = scheduler.update(plan, StepResult(np.full(len(plan.rows), 7, np.int32), logprobs=logprobs))
        kinds = [(d.tag - (1 << 32), d.request_id, d.finish_reason, d.logprobs) for d in gained.deltas]
        seen.append(((gained.tags - (1 << 32)).tolist(), gained.ids.tolist(), gained.tokens.tolist(), kinds))
    assert seen == [
        ([], [], [], [(0, "r0", None, None), (1, "r1", None, None), (2, "r2", None, None)]),
        ([0, 1], ["r0", "r1"], [7, 7], [(2, "r2", "length", None)]),
        ([0], ["r0"], [7], [(1, "r1", "length", [entry])]),
        ([], [], [], [(0, "r0", "length", None)]),
    ]


def test_prompt_logprobs_are_collected_over_chunks_and_sent_once() -> None:
    engine = FakeEngine(max_num_batched_tokens=4)
    engine.add(prompt(6), max_tokens=2, prompt_logprobs=0)
    scheduler, sent = engine.scheduler, []
    entry = [TokenLogprobs([i], [0.0], 1) for i in range(6)]
    for chunk in (entry[1:5], entry[5:6], []):
        plan = scheduler.schedule()
        assert plan is not None
        result = StepResult(token_ids=np.array([9], np.int32), prompt_logprobs={0: columns(chunk)} if chunk else {})
        sent += [delta.prompt_logprobs for delta in scheduler.update(plan, result)]
    assert [one and list(one) for one in sent] == [[None, *entry[1:]], None]


# --- what is refused ---


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        FakeEngine().add([])


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused() -> None:
    engine = FakeEngine(max_model_len=16)
    engine.add(prompt(15), max_tokens=1)
    with pytest.raises(PromptTooLongError, match=r"16 tokens; the context holds 16"):
        engine.add(prompt(16))


def test_a_prompt_that_the_whole_pool_cannot_hold_is_refused() -> None:
    engine = FakeEngine(num_blocks=5, block_size=4)
    engine.add(prompt(16), max_tokens=1)
    with pytest.raises(PromptTooLongError, match=r"the KV cache holds 17"):
        engine.add(prompt(17))
    engine.run()


def test_a_token_id_beyond_32_bits_is_refused() -> None:
    with pytest.raises(RequestError, match="32-bit"):
        FakeEngine().add([2**40])


def test_a_second_request_of_the_same_id_is_refused() -> None:
    engine = FakeEngine()
    engine.add([1], name="x")
    with pytest.raises(RequestError, match="'x'"):
        engine.add([1], name="x")


def test_a_full_queue_refuses_with_an_advised_pause() -> None:
    engine = FakeEngine(max_num_seqs=2, max_queue=3)
    for _ in range(5):
        engine.add([1])
    with pytest.raises(QueueFullError) as refusal:
        engine.add([1])
    assert refusal.value.retry_after >= 1
    engine.step()
    with pytest.raises(QueueFullError):
        engine.add([1])


def test_without_a_queue_free_rows_still_take_requests() -> None:
    engine = FakeEngine(max_num_seqs=2, max_queue=0)
    engine.add([1])
    engine.add([1])
    with pytest.raises(QueueFullError):
        engine.add([1])
    engine.run()


def test_a_budget_below_the_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="below max_num_seqs"):
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=4, max_model_len=64)


def test_unchunked_prefill_needs_a_budget_of_the_whole_context() -> None:
    with pytest.raises(ConfigError, match="below max_model_len"):
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=32, max_model_len=64, chunked_prefill=False)


# --- seeds ---


def test_a_seed_of_the_request_is_kept_and_others_are_drawn_from_the_engines() -> None:
    def seeds(engine_seed: int) -> list[int]:
        engine = FakeEngine(seed=engine_seed)
        for i, seed in enumerate((None, 11, None)):
            sampling = SamplingParams(seed=seed)
            engine.scheduler.add(Request(id=str(i), prompt_token_ids=[1], sampling=sampling))
        plan = engine.scheduler.schedule()
        assert plan is not None
        return [a.seed for a in plan.admitted]

    assert seeds(1) == seeds(1)
    assert seeds(1)[1] == 11
    assert len({seeds(1)[0], seeds(1)[2], seeds(2)[0]}) == 3


# --- abort ---


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("depth", [0, 1])
def test_an_aborted_request_frees_its_blocks_and_gives_no_more_tokens(steps: int, depth: int) -> None:
    engine = FakeEngine(max_num_batched_tokens=8, depth=depth)
    name = engine.add(prompt(12))
    for _ in range(steps):
        engine.step()
    assert engine.abort(name)
    assert engine.kv.pool.num_used == 0
    assert not engine.scheduler.has_work
    engine.run()


def test_aborting_what_is_unknown_or_over_says_so() -> None:
    engine = FakeEngine()
    name = engine.add([1], max_tokens=1)
    engine.run()
    assert not engine.scheduler.abort(name)
    assert not engine.scheduler.abort("never seen")


def test_those_that_wait_keep_their_order_when_many_others_are_aborted() -> None:
    engine = FakeEngine(max_num_seqs=1, max_queue=1000)
    names = [engine.add([1], max_tokens=1) for _ in range(300)]
    for i, name in enumerate(names):
        if i % 100:
            engine.abort(name)
    engine.run()
    assert [d.request_id for d in engine.deltas] == names[::100]


# --- preemption ---


def crowded(depth: int = 0, **options: object) -> FakeEngine:
    """Two requests that together outgrow the pool."""
    engine = FakeEngine(num_blocks=8, depth=depth, **options)  # type: ignore[arg-type]
    for i in range(2):
        engine.add(prompt(8, first=i), max_tokens=12)
    return engine


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_latest_request_is_preempted_and_resumes_with_its_tokens(depth: int) -> None:
    engine = crowded(depth)
    resumed = []
    while engine.scheduler.has_work:
        plan = engine.step()
        if plan and engine.scheduler.stats().preemptions:
            resumed += plan.admitted
    engine.run()
    engine.check_outputs()
    assert engine.scheduler.stats().preemptions == 1
    (admission,) = resumed
    assert admission.num_prompt_tokens == 8
    generated = admission.token_ids[8:].tolist()
    assert admission.token_ids[0] == 1 and len(generated) > 1
    assert generated == engine.outputs["r1"][: len(generated)]
    assert admission.seed == 1


def test_a_preempted_request_stands_before_those_that_came_after_it() -> None:
    engine = crowded(max_num_seqs=2)
    late = engine.add(prompt(2, first=3), max_tokens=1)
    order = []
    while engine.scheduler.has_work:
        plan = engine.step()
        order += [engine.requests[f"r{a.seed}"].id for a in plan.admitted] if plan else []
    assert order.index(late) > len(order) - 1 - order[::-1].index("r1")


def test_a_preempted_request_is_not_admitted_before_its_tokens_in_flight_arrived() -> None:
    engine = crowded(depth=2)
    while not engine.scheduler.stats().preemptions:
        engine.step()
    engine.abort("r0")
    assert engine.scheduler.schedule() is None
    while engine.pending:
        engine.update()
    plan = engine.step()
    assert plan is not None
    assert plan.admitted[0].token_ids.tolist() == [*prompt(8, first=1), *engine.outputs["r1"]]


def test_a_preempted_request_can_be_aborted_while_its_token_is_in_flight() -> None:
    engine = crowded(depth=2)
    while not engine.scheduler.stats().preemptions:
        engine.step()
    assert engine.pending and engine.abort("r1")
    engine.run()
    engine.check_outputs()


def test_a_preempted_request_does_not_repeat_its_prompt_logprobs() -> None:
    engine = FakeEngine(num_blocks=8)
    for i in range(2):
        engine.add(prompt(8, first=i), max_tokens=12, prompt_logprobs=0)
    engine.run()
    assert engine.scheduler.stats().preemptions == 1
    assert sum(d.prompt_logprobs is not None for d in engine.deltas) == 2
    assert sum(d.queued > 0 for d in engine.deltas) == 2


# --- priority ---


def test_under_priority_the_better_one_starts_first() -> None:
    engine = FakeEngine(policy=PRIORITY, max_num_seqs=1)
    engine.add([1], priority=5, max_tokens=1)
    engine.add([2], priority=1, max_tokens=1)
    plan = engine.step()
    assert plan is not None and [a.seed for a in plan.admitted] == [1]


def test_under_fcfs_priority_is_ignored() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.add([1], priority=5, max_tokens=1)
    engine.add([2], priority=1, max_tokens=1)
    plan = engine.step()
    assert plan is not None and [a.seed for a in plan.admitted] == [0]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_better_priority_takes_the_row_of_a_worse_one(depth: int) -> None:
    engine = FakeEngine(policy=PRIORITY, max_num_seqs=1, depth=depth)
    engine.add([1], priority=5, max_tokens=10)
    engine.step()
    engine.add([2], priority=1, max_tokens=3)
    plan = engine.step()
    assert plan is not None and plan.released.tolist() == [0] and [a.seed for a in plan.admitted] == [1]
    engine.run()
    engine.check_outputs()


def test_an_equal_priority_takes_nobodys_row() -> None:
    engine = FakeEngine(policy=PRIORITY, max_num_seqs=1)
    engine.add([1], priority=1, max_tokens=3)
    engine.step()
    engine.add([2], priority=1, max_tokens=3)
    engine.run()
    assert engine.scheduler.stats().preemptions == 0


# --- steps in flight ---


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    engine = FakeEngine(depth=1)
    engine.add(prompt(3), max_tokens=5)
    engine.step()
    assert entries(engine.step()) == [(0, 3, 1)]


def test_a_row_that_reaches_its_limit_with_the_token_in_flight_is_not_scheduled_again() -> None:
    engine = FakeEngine(depth=1)
    engine.add(prompt(3), max_tokens=2)
    assert [engine.step() is not None for _ in range(3)] == [True, True, False]
    engine.run()
    assert engine.device.computed_tokens == 4


def test_a_stop_found_one_step_late_costs_one_row_and_no_token() -> None:
    engine = FakeEngine(depth=1)
    name = engine.add(prompt(3), eos=(first_output(prompt(3)),))
    engine.run()
    assert len(engine.outputs[name]) == 1
    assert engine.device.computed_tokens == 4


def test_a_row_given_away_while_its_last_step_is_in_flight_keeps_the_owners_apart() -> None:
    engine = FakeEngine(depth=1, max_num_seqs=1)
    engine.add(prompt(3), eos=(first_output(prompt(3)),))
    engine.add(prompt(3, first=2), max_tokens=4)
    engine.run()
    engine.check_outputs()


def test_results_are_taken_in_the_order_of_the_plans() -> None:
    engine = FakeEngine(depth=2)
    engine.add(prompt(3))
    engine.step()
    engine.step()
    with pytest.raises(ValueError, match="order"):
        engine.scheduler.update(*engine.pending[1])


# --- statistics ---


def test_stats_count_what_runs_waits_and_was_done() -> None:
    engine = FakeEngine(max_num_seqs=2)
    for i in range(3):
        engine.add(prompt(4, first=i), max_tokens=2)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.running, stats.waiting) == (2, 1)
    assert (stats.kv_blocks_used, stats.kv_blocks_total) == (2, 64)
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (12, 6, 4)
