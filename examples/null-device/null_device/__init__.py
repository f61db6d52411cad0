"""A platform that computes no model: a step takes a set time and gives tokens that follow from each other.

Everything of hotplug but the model runs as on a device that works beside the host, so its cost can be measured and
its overlap tested on any machine. The time is read from the environment (`null_device.clock`), the tokens are in
`null_device.tokens`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hotplug.vendor import DeviceInfo, ExecMode, Feature, Limits, MemoryInfo

if TYPE_CHECKING:
    import torch

    from hotplug.vendor import OpRegistry
    from null_device.clock import Clock, Event


class NullDevice:
    name = "null_device"
    torch_device = "cpu"
    api_version = "2.0"

    def probe(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo(index=0, name="Null Device", arch="null")]

    def limits(self, device: DeviceInfo) -> Limits:
        self.clock  # noqa: B018  (a step time that is no number is told of before anything is loaded)
        return Limits(
            dtypes=("float32",),  # holds every token id up to 2^24
            exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER),
            capture_on_use=True,
            step_tokens=8192,
            step_requests=1024,
            shared_host_memory=True,
            asynchronous=True,
            accelerator=False,
            features=frozenset({Feature.SPECULATIVE}),
        )

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        page = os.sysconf("SC_PAGE_SIZE")
        return MemoryInfo(free=page * os.sysconf("SC_AVPHYS_PAGES"), total=page * os.sysconf("SC_PHYS_PAGES"))

    def register(self, ops: OpRegistry) -> None:
        from null_device.kernels import kernels

        for kernel in kernels(self.clock):
            ops.add(kernel)

    @cached_property
    def clock(self) -> Clock:
        """The device's time. Raises PlatformError for a setting that is no time."""
        from null_device.clock import Clock

        return Clock.from_environment()

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        from null_device.graph import record

        return record(step, self.clock)

    def set_device(self, device: DeviceInfo) -> None:
        """There is one."""

    def stream(self) -> AbstractContextManager[None]:
        """All work is in one order."""
        return nullcontext()

    def event(self) -> Event:
        return self.clock.event()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._empty(shape, dtype=dtype)

    @cached_property
    def _empty(self) -> Callable[..., torch.Tensor]:
        """Of torch, which is not imported before it is needed and not looked for in every step."""
        import torch

        return torch.empty

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: DeviceInfo) -> torch.Tensor:
        """Zeroed memory that nobody writes to: calloc's pages cost nothing until then."""
        import math

        import numpy as np
        import torch

        size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(*shape)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)
