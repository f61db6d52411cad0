"""Run with this package installed: hotplug finds the platform and gives it a model."""

from toy_eager import ToyEager

from hotplug.vendor import Platform


def test_it_is_a_platform():
    assert isinstance(ToyEager(), Platform)


def test_it_has_one_device_and_memory():
    platform = ToyEager()
    (device,) = platform.probe()
    memory = platform.memory(device)
    assert 0 < memory.free <= memory.total
