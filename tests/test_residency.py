"""Blocks from elsewhere come beside the engine's loop: who waits for them, who does not, and what becomes of them."""

from __future__ import annotations

import pytest
from scheduler_fakes import Delayed, FakeConnector, FakeEngine

from hotplug.core.errors import QueueFullError
from hotplug.core.scheduler.sequence import Status

PROMPT = list(range(20))


def connected(delay: int, connector: FakeConnector | None = None, **options: object) -> FakeEngine:
    """An engine whose connector has the blocks of PROMPT, which come after `delay` steps."""
    if connector is None:
        connector = FakeConnector()
        first = FakeEngine(connector=connector)
        first.add([*PROMPT, 30], max_tokens=2)
        first.run()
        first.device.save(first.scheduler.take_saves())
    return FakeEngine(connector=connector, background=Delayed(delay), **options)  # type: ignore[arg-type]


def status(engine: FakeEngine, name: str) -> Status:
    return engine.scheduler.state.requests[name].status


def test_a_request_waits_for_its_blocks_and_computes_the_rest() -> None:
    engine = connected(delay=3)
    name = engine.add([*PROMPT, 31], max_tokens=2)
    assert engine.step() is None and status(engine, name) is Status.WAITING_FOR_KV
    assert engine.scheduler.stats().waiting_for_kv == 1 and engine.scheduler.stats().waiting == 0
    engine.run()
    engine.check_outputs()
    assert engine.deltas[0].num_cached_tokens >= 16
    assert engine.scheduler.stats().waiting_for_kv == 0


def test_others_start_and_run_meanwhile() -> None:
    engine = connected(delay=4)
    slow = engine.add([*PROMPT, 31], max_tokens=2)
    quick = engine.add([40, 41, 42], max_tokens=2)
    for _ in range(2):
        assert engine.step() is not None
    assert engine.reasons == {quick: "length"} and status(engine, slow) is Status.WAITING_FOR_KV
    engine.run()
    engine.check_outputs()


def test_a_request_that_ends_while_it_waits_takes_nothing_with_it() -> None:
    engine = connected(delay=3)
    name = engine.add([*PROMPT, 31], max_tokens=2)
    engine.step()
    assert engine.abort(name)
    engine.add([*PROMPT, 32], max_tokens=2)
    engine.run()
    engine.check_outputs()
    assert not engine.scheduler.state.arriving


def test_what_the_cache_has_by_the_time_the_blocks_come_is_not_written_again() -> None:
    engine = connected(delay=3)
    engine.add([*PROMPT, 31], max_tokens=2)
    engine.step()
    engine.scheduler.residency._connector.blocks.clear()  # type: ignore[union-attr]
    engine.add([*PROMPT, 32], max_tokens=2)  # nothing to fetch any more: it computes the prefix itself
    loads = []
    for _ in range(8):
        plan = engine.step()
        loads += plan.loads if plan is not None else []
    engine.run()
    engine.check_outputs()
    assert loads == []


def test_a_connector_that_brings_nothing_is_asked_once() -> None:
    connector = connected(delay=0).device.connector
    assert connector is not None
    calls: list[int] = []
    connector.fetch = lambda digests: calls.append(len(digests)) or []  # type: ignore[assignment,func-returns-value]
    engine = connected(delay=2, connector=connector)
    engine.add([*PROMPT, 31], max_tokens=2)
    engine.run()
    engine.check_outputs()
    assert calls == [5]


@pytest.mark.parametrize("delay", [0, 1, 5])
@pytest.mark.parametrize("depth", [0, 2])
def test_many_requests_under_pressure_get_their_tokens(delay: int, depth: int) -> None:
    connector = FakeConnector()
    for _ in range(2):
        engine = connected(delay, connector, depth=depth, num_blocks=20, max_num_seqs=4)
        for i in range(12):
            engine.add([*PROMPT[: 4 * (i % 5)], i, i + 1], max_tokens=9)
        engine.run()
        engine.check_outputs()
        engine.device.save(engine.scheduler.take_saves())
    assert connector.fetched > 0


def test_no_more_requests_wait_for_blocks_than_may_run_and_the_queue_counts_them() -> None:
    engine = connected(delay=50, max_num_seqs=2, max_queue=2)
    for i in range(4):
        engine.add([*PROMPT, 31 + i], max_tokens=2)
    engine.step()
    assert len(engine.scheduler.state.arriving) == 2
    with pytest.raises(QueueFullError):
        for i in range(4):
            engine.add([*PROMPT, 41 + i], max_tokens=2)
