"""Platforms made of plain objects, for tests that need no entry point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hotplug.core.ops.registry import Impl, OpRegistry
from hotplug.core.platform.base import DeviceInfo, Limits, MemoryInfo
from hotplug.core.platform.discovery import Candidate, Loaded, discover


def limits(**changes: Any) -> Limits:
    return Limits(**{"dtypes": ("float32",), **changes})


@dataclass
class FakePlatform:
    """Runs on the host's tensors and says of itself what a test wants."""

    name: str = "acme"
    torch_device: str = "cpu"
    api_version: str = "2.0"
    devices: Sequence[DeviceInfo] = (DeviceInfo(index=0, name="Acme 1", arch="v1"),)
    facts: Limits = field(default_factory=limits)
    total: int = 8 << 30
    kernels: Sequence[Impl] = ()

    def probe(self) -> Sequence[DeviceInfo]:
        return self.devices

    def limits(self, device: DeviceInfo) -> Limits:
        return self.facts

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        return MemoryInfo(free=self.total, total=self.total)

    def register(self, ops: OpRegistry) -> None:
        for kernel in self.kernels:
            ops.add(kernel)


def loaded(plugin: Any = None, *, name: str = "acme", error: str = "") -> Loaded:
    return Loaded(name, f"{name}_package:make", f"{name}-dist 1.0", plugin=plugin, error=error)


def candidates(*platforms: Any) -> list[Candidate]:
    """What discovery makes of these plugin objects."""
    return discover([loaded(p, name=getattr(p, "name", "nameless")) for p in platforms])
