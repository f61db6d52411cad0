"""What a conformance run examines: one device of one platform, and the host's references to measure it against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch

from hotplug.core.interface_1 import register
from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.registry import OpRegistry
from hotplug.core.platform.base import API_VERSION, DeviceInfo, Limits, MemoryInfo, Platform
from hotplug.core.platform.discovery import Candidate, Loaded, discover
from hotplug.core.platform.select import select
from hotplug.core.runner.kv_memory import torch_device
from hotplug.core.startup.installed import gather

TRUSTED = "trusted"
"""The platform that every other is compared with: the host, every op by its reference."""


class Trusted:
    """The host's memory and nothing but references."""

    name = TRUSTED
    torch_device = "cpu"
    api_version = API_VERSION

    def probe(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo(index=0, name="references", arch="any")]

    def limits(self, device: DeviceInfo) -> Limits:
        return Limits(dtypes=("float32", "bfloat16", "float16"), block_sizes=tuple(range(1, 257)),
                      kv_dtypes=("float32", "bfloat16", "float16", "fp8_e4m3"), shared_host_memory=True,
                      accelerator=False, features=frozenset(_features()))  # fmt: skip

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        memory = psutil.virtual_memory()
        return MemoryInfo(free=memory.available, total=memory.total)

    def register(self, ops: OpRegistry) -> None:
        pass


def _features() -> Sequence[object]:
    from hotplug.core.platform.base import Feature

    return tuple(Feature)


@dataclass(frozen=True)
class Options:
    """How thorough a run is."""

    quick: bool = False
    model: str | None = None
    """A model for the end-to-end checks besides the small one that they make."""
    absent: tuple[str, ...] = ()
    """NAME=VALUE of environment variables under which the device must be absent."""


@dataclass
class Target:
    """The platform under examination. `make` builds it anew, here or in another process."""

    platform: Platform
    device: DeviceInfo
    make: Callable[[], Platform] | None
    options: Options
    folder: Path
    """Scratch, emptied after the run."""

    @cached_property
    def limits(self) -> Limits:
        return self.platform.limits(self.device)

    @cached_property
    def torch_device(self) -> torch.device:
        return torch_device(self.platform, self.device)

    @cached_property
    def registry(self) -> OpRegistry:
        """Every op, with the platform's kernels."""
        registry = builtin_registry()
        for op in gather().ops:
            registry.define(op)
        register(self.platform, registry)
        return registry

    @property
    def candidates(self) -> list[Candidate]:
        """The platform and the trusted one, as discovery sees them."""
        return discover([Loaded(p.name, type(p).__module__, "", plugin=p) for p in (self.platform, Trusted())])

    @property
    def name(self) -> str:
        """What `EngineConfig.device` takes."""
        return f"{self.platform.name}:{self.device.index}"


def find_target(name: str, options: Options, folder: Path) -> Target:
    """The installed platform `name` (or `name:index`). Raises PlatformError."""
    selection = select(name, discover())
    kind = type(selection.platform)
    return Target(selection.platform, selection.device, kind, options, folder)
