"""Recording and replaying."""

import pytest
import torch
from null_device.clock import Clock
from null_device.graph import compute, record

from hotplug.vendor import PlatformError


def test_a_replay_follows_its_inputs_into_the_same_memory():
    x, kept = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    found = {}

    def step():
        y = torch.where(x < 2, x * 10, x)
        found["y"] = y[1:].view(3).mul_(2)
        kept[x] = y

    clock = Clock(step=1.0)
    with torch.inference_mode():
        replay = record(step, clock)
        y = found["y"]
        x.copy_(torch.tensor([3, 1, 0, 2]))
        replay()
    assert found["y"] is y and y.tolist() == [20, 0, 4]
    assert kept.tolist() == [0, 20, 4, 3]
    assert clock.free_at > 0


def test_kernels_of_numpy_are_called_again_and_only_while_recorded():
    x, out, calls = torch.arange(3), torch.zeros(3, dtype=torch.int64), []

    def double(target, source):
        calls.append(1)
        target[:] = 2 * source

    replay = record(lambda: compute(double, out, x), Clock())
    assert compute(double, torch.empty(3, dtype=torch.int64), x).tolist() == [0, 2, 4]
    x += 5
    replay()
    assert out.tolist() == [10, 12, 14]
    assert len(calls) == 3


def test_what_the_host_must_read_is_refused():
    with pytest.raises(PlatformError, match="reads the device from the host"):
        record(lambda: torch.ones(3).sum().item(), Clock())
