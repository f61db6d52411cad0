"""The simulated time: steps take what was set, one after the other, and nobody waits for more."""

import time

import pytest
from null_device.clock import STEP, TOKEN, Clock, Event

from hotplug.vendor import PlatformError


def elapsed(clock, steps, host=0.0, more=0):
    """Seconds until `steps` are done that the host launches one ahead, busy for `host` seconds after each."""
    begin, before = time.perf_counter(), None
    for _ in range(steps):
        clock.launch(more)
        event = Event(clock)
        event.record()
        time.sleep(host)
        if before is not None:
            before.synchronize()
        before = event
    before.synchronize()
    return time.perf_counter() - begin


@pytest.mark.parametrize("host", [0.0, 0.002])
def test_steps_take_their_time_whatever_the_host_does_beside(host):
    best = min(elapsed(Clock(step=0.005), 40, host) for _ in range(3))  # the machine may be busy
    assert 0.2 <= best <= 0.25  # one after the other it would be 0.28


def test_prompt_tokens_take_theirs():
    assert 0.06 <= min(elapsed(Clock(step=0.002, token=1e-5), 10, more=400) for _ in range(3)) <= 0.075


def test_a_late_host_leaves_the_device_idle():
    assert elapsed(Clock(step=0.001), 10, host=0.004) >= 0.04


def test_no_time_is_waited_for_where_none_is_set():
    assert min(elapsed(Clock(), 1000) for _ in range(3)) < 0.1


def test_an_event_is_reached_when_what_was_launched_before_it_is_done():
    clock = Clock(step=0.02)
    event = Event(clock)
    clock.launch(0)
    event.record()
    clock.launch(0)
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert clock.free_at > time.perf_counter()


def test_the_environment_sets_the_times(monkeypatch):
    monkeypatch.setenv(STEP, "2.5")
    monkeypatch.setenv(TOKEN, "3")
    clock = Clock.from_environment()
    assert (clock.step, clock.token) == (pytest.approx(2.5e-3), pytest.approx(3e-6))


@pytest.mark.parametrize("text", ["fast", "-1", "inf", "nan", ""])
def test_what_is_no_time_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv(STEP, text)
    with pytest.raises(PlatformError, match=STEP):
        Clock.from_environment()
