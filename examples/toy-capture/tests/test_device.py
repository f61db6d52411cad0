"""The toy device: tensors that live elsewhere."""

import pytest
import torch
import toy_capture.device  # noqa: F401

from hotplug.vendor import PlatformError


def test_operations_give_what_they_give_on_the_host():
    x = torch.randn(4, 6)
    toy = x.to("toy")
    assert toy.device.type == "toy"
    for function in (
        lambda t: t.t() @ t,
        lambda t: (t > 0).sum(-1),
        lambda t: t[:, ::2].reshape(-1).softmax(0),
        lambda t: torch.cat((t, 2 * t.flip(0))).masked_fill(~(torch.cat((t, t)) > 0), float("-inf")),
        lambda t: t.argsort(-1).to(torch.int32) % 4,
    ):
        torch.testing.assert_close(function(toy).to("cpu"), function(x))


def test_views_see_each_others_writes_and_parameters_keep_their_memory():
    x = torch.zeros(3, 4, device="toy")
    x.t()[1] = 2.0
    weight = torch.nn.Parameter(x, requires_grad=False)
    weight[2].add_(1)
    assert x.to("cpu").tolist() == [[0, 2, 0, 0], [0, 2, 0, 0], [1, 3, 1, 1]]


@pytest.mark.parametrize(
    "access",
    [lambda t: t.numpy(), lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t + torch.ones(3),
     lambda t: t[torch.tensor([0, 1])]],
)  # fmt: skip
def test_a_stray_host_access_fails(access):
    with pytest.raises((PlatformError, RuntimeError, TypeError)):
        access(torch.zeros(3, device="toy"))


def test_memory_goes_with_its_tensors():
    import gc
    import weakref

    tensor = torch.zeros(1000, device="toy")
    hidden = weakref.ref(tensor.untyped_storage().host)
    del tensor
    gc.collect()
    assert hidden() is None
