"""Random lives of the scheduler: whatever comes, goes and is preempted, KV is right and outputs do not change."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_fakes import EOS, VOCAB, Delayed, FakeConnector, FakeEngine

from hotplug.core.errors import QueueFullError, RequestError
from hotplug.core.scheduler.config import ShortPrompts
from hotplug.core.scheduler.drafter import Speculation
from hotplug.core.scheduler.policy import FCFS, PRIORITY

CHECKS = settings(
    deadline=None, max_examples=500, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
"""The same examples on every run; the slow test draws fresh ones."""


@st.composite
def speculations(draw: st.DrawFn) -> Speculation:
    shortest = draw(st.integers(1, 3))
    return Speculation(
        by_default=draw(st.sampled_from([True, True, False])),
        tokens=draw(st.sampled_from([1, 3, 8])),
        shortest=shortest,
        longest=shortest + draw(st.integers(0, 3)),
        max_requests=draw(st.sampled_from([8, 8, 2])),
    )


@st.composite
def engines(draw: st.DrawFn) -> FakeEngine:
    max_num_seqs = draw(st.integers(2, 8))
    max_model_len = draw(st.sampled_from([64, 33, 12]))
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    chunked = draw(st.booleans())
    mixed = draw(st.booleans())
    least = max(max_num_seqs if mixed else 1, 1 if chunked else max_model_len)
    # Pools from hopeless to just enough for one long sequence and a half.
    tokens = draw(st.integers(1, max_model_len + max_model_len // 2))
    window = draw(st.sampled_from([None, None, 1, 3, 5, 16]))
    prefix_cache = draw(st.sampled_from([True, True, True, False]))
    speculation = draw(st.none() | speculations())
    return FakeEngine(
        num_blocks=2 + tokens // block_size,
        block_size=block_size,
        window=window,
        depth=draw(st.sampled_from([0, 1, 1, 2])),
        prefix_cache=prefix_cache,
        connector=FakeConnector() if prefix_cache and window is None and draw(st.booleans()) else None,
        background=Delayed(draw(st.sampled_from([0, 1, 4]))),
        # No swap space, too little for most sequences, or enough for several.
        num_host_blocks=draw(st.sampled_from([0, 2 + 8 // block_size, 2 + 2 * max_model_len // block_size])),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=least + draw(st.integers(0, 24)),
        max_model_len=max_model_len,
        policy=draw(st.sampled_from([FCFS, PRIORITY])),
        chunked_prefill=chunked,
        mixed_steps=mixed,
        short_prompts=draw(st.none() | st.builds(ShortPrompts, st.integers(1, 24), st.integers(1, 3))),
        max_prefill_requests=draw(st.none() | st.integers(1, 3)) if not mixed else None,
        max_queue=draw(st.sampled_from([100, 3, 0])),
        speculation=speculation,
        repeats=draw(st.sampled_from([3, 9, 30])) if speculation else 0,
    )


ACTIONS = ["add"] * 3 + ["step"] * 6 + ["abort", "update"]


def scripts(least: int, most: int) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Sequences of (action, seed of its details)."""
    return st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2**16)), min_size=least, max_size=most)


def random_prompt(rng: random.Random, engine: FakeEngine) -> list[int]:
    """Often a shared prefix or the conversation so far of an earlier request, then a tail from few tokens."""
    longest = max(1, engine.scheduler.max_model_len - rng.randint(0, 2))
    if engine.requests and rng.random() < 0.4:
        name = rng.choice(sorted(engine.requests))
        shared = engine.requests[name].prompt_token_ids + engine.outputs[name]
        shared = shared[: rng.choice([len(shared), longest - 1])]
    else:
        stem = random.Random(rng.randrange(3))
        shared = [stem.randrange(VOCAB) for _ in range(rng.choice([0, 4, 8, 16, 30]))]
    return (shared + [rng.randrange(4) for _ in range(rng.randint(1, 8))])[:longest]


def act(engine: FakeEngine, action: str, seed: int) -> None:
    rng = random.Random(seed)
    if action == "step":
        engine.step()
    elif action == "update":
        if engine.pending:
            engine.update()
    elif action == "abort":
        alive = sorted(engine.requests.keys() - engine.reasons.keys())
        if alive:
            assert engine.abort(rng.choice(alive))
    else:
        # Refusals are pinned down in test_scheduler.
        with contextlib.suppress(QueueFullError, RequestError):
            engine.add(
                random_prompt(rng, engine),
                salt=rng.choice(["", "", "tenant"]),
                priority=rng.randrange(3),
                eos=(EOS,) if rng.random() < 0.5 else (),
                stop_token_ids=rng.choice([(), (), (3,), tuple(range(20, 32))]),
                max_tokens=rng.choice([None, 1, 5, 20]),
                prompt_logprobs=rng.choice([None, None, None, 0]),
                speculative=rng.choice([None, None, True, False]) if engine.config.speculation else None,
            )


def live(engine: FakeEngine, script: list[tuple[str, int]]) -> None:
    for action, seed in script:
        act(engine, action, seed)
    engine.run()
    engine.check_outputs()


@CHECKS
@given(engines(), scripts(40, 80))
def test_random_lives_keep_every_invariant_and_every_output(engine: FakeEngine, script: list[tuple[str, int]]) -> None:
    live(engine, script)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("window", [None, 6])
def test_a_pool_that_is_always_too_small_loses_no_request(depth: int, window: int | None) -> None:
    engine = FakeEngine(num_blocks=17, block_size=2, window=window, depth=depth, max_num_seqs=8)
    rng = random.Random(depth)
    for i in range(40):
        engine.add(random_prompt(rng, engine)[:20], priority=i % 3, max_tokens=rng.randint(4, 20))
    engine.run()
    engine.check_outputs()
    assert window or engine.scheduler.stats().preemptions > 0


@pytest.mark.slow
@settings(CHECKS, max_examples=6000, derandomize=False)
@given(engines(), scripts(40, 150))
def test_many_random_lives(engine: FakeEngine, script: list[tuple[str, int]]) -> None:
    live(engine, script)
