"""`--device`: automatic order with its reason, names, indices, and what stops the choice."""

from __future__ import annotations

import pytest
from fake_platforms import FakePlatform, candidates, limits, loaded

from hotplug.core.errors import PlatformError
from hotplug.core.platform.base import DeviceInfo
from hotplug.core.platform.discovery import discover
from hotplug.core.platform.select import select

HOST = limits(shared_host_memory=True)
TWO = [DeviceInfo(index=i, name=f"Acme {i}", arch="v1") for i in (0, 3)]


def test_auto_takes_memory_of_its_own_before_the_hosts() -> None:
    host, own = FakePlatform("host", facts=HOST, total=1 << 40), FakePlatform("own", total=1 << 30)
    chosen = select("auto", candidates(host, own))
    assert chosen.platform is own
    assert chosen.reason == "best of own, host (own memory before the host's, then the most memory, then the name)"


def test_auto_takes_the_most_memory_then_the_name() -> None:
    small, b, a = FakePlatform("a-small", total=1), FakePlatform("b", total=9), FakePlatform("a", total=9)
    assert select("auto", candidates(small, b, a)).platform is a


def test_auto_says_when_there_was_no_choice() -> None:
    absent = FakePlatform("absent", devices=())
    chosen = select("auto", candidates(FakePlatform(), absent))
    assert (chosen.platform.name, chosen.reason) == ("acme", "the only platform with a device")


def test_auto_will_not_pass_over_a_broken_plugin() -> None:
    found = discover([loaded(FakePlatform()), loaded(name="bad", error="ImportError: libbad.so")])
    with pytest.raises(PlatformError, match=r"(?s)will not pass over a broken plugin: bad \(bad-dist 1.0\).*libbad.so"):
        select("auto", found)


def test_a_named_platform_is_taken_past_a_broken_plugin() -> None:
    found = discover([loaded(FakePlatform()), loaded(name="bad", error="ImportError: libbad.so")])
    assert select("acme", found).reason == "asked for"


def test_auto_without_any_device_gives_every_reason() -> None:
    with pytest.raises(PlatformError) as caught:
        select("auto", candidates(FakePlatform("a", devices=()), FakePlatform("b", devices=())))
    assert caught.value.why == ("a: no device found", "b: no device found")


def test_a_platform_that_cannot_describe_its_device_is_named() -> None:
    class Failing(FakePlatform):
        def memory(self, device: DeviceInfo) -> None:  # type: ignore[override]
            raise RuntimeError("driver too old")

    with pytest.raises(PlatformError, match=r"platform acme: .*RuntimeError: driver too old"):
        select("auto", candidates(Failing(), FakePlatform("other")))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(PlatformError, match=r"--device: no platform is called 'amce'. Did you mean 'acme'"):
        select("amce", candidates(FakePlatform()))


def test_a_named_platform_without_a_device_says_why() -> None:
    with pytest.raises(PlatformError, match="platform 'acme' cannot be used: no device found"):
        select("acme", candidates(FakePlatform(devices=())))


def test_a_named_broken_platform_says_why() -> None:
    with pytest.raises(PlatformError, match="platform 'bad' cannot be used: the plugin failed to load"):
        select("bad", discover([loaded(name="bad", error="ImportError: x")]))


def test_an_index_takes_the_device_that_bears_it() -> None:
    assert select("acme:3", candidates(FakePlatform(devices=TWO))).device.name == "Acme 3"


def test_without_an_index_the_first_device_is_taken() -> None:
    assert select("acme", candidates(FakePlatform(devices=TWO))).device.name == "Acme 0"


@pytest.mark.parametrize("index", ["1", "x", "-1"])
def test_an_unknown_index_lists_those_found(index: str) -> None:
    with pytest.raises(PlatformError, match=f"has no device '{index}'. Found: acme:0, acme:3"):
        select(f"acme:{index}", candidates(FakePlatform(devices=TWO)))
