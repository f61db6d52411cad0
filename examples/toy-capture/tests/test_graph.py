"""Recording and replaying small functions."""

import pytest
import torch
from toy_capture.device import memory
from toy_capture.graph import record

from hotplug.vendor import PlatformError


def test_a_replay_follows_its_inputs_through_views_and_in_place_changes():
    x, found = torch.arange(6.0).to("toy"), {}

    def step():
        y = x.view(2, 3).t() * 2
        y[0] += 1
        found["y"] = y.softmax(-1) @ torch.ones(2, 2, device="toy")

    with torch.inference_mode():
        graph = record(step)
        y = found["y"]
        x.copy_(torch.tensor([3.0, -1, 2, 0, 5, 1]))
        graph.replay()
        replayed = y.to("cpu")
        step()
    assert found["y"] is not y
    assert torch.equal(replayed, found["y"].to("cpu"))


def test_a_replay_makes_no_tensor():
    x, found = torch.randn(4, 8).to("toy"), {}

    def step():
        found["y"] = torch.cat((x.square().mean(-1, keepdim=True), x), dim=-1).argmax(-1)

    with torch.inference_mode():
        graph = record(step)
        before = memory(found["y"])
        for function, args, kwargs in graph.calls:
            outs = [v for v in kwargs.values() if isinstance(v, torch.Tensor)]
            assert function(*args, **kwargs) is outs[-1]
    assert memory(found["y"]) == before


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0]])
def test_what_the_host_must_read_is_refused_by_name(read):
    x = torch.randn(5).to("toy")
    with pytest.raises(PlatformError, match="reads the device from the host"):
        record(lambda: read(x))
