"""A platform that records decode steps and replays them, on tensors of a device type of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from hotplug.vendor import DeviceInfo, ExecMode, Limits, MemoryInfo, OpRegistry


class ToyCapture:
    name = "toy_capture"
    torch_device = "toy"
    api_version = "2.0"

    def probe(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo(index=0, name="Toy Capture", arch="toy")]

    def limits(self, device: DeviceInfo) -> Limits:
        import toy_capture.device  # noqa: F401  (sets the device type up, before anybody makes a tensor of it)

        return Limits(
            dtypes=("float32",),
            exec_modes=(ExecMode.CAPTURE, ExecMode.EAGER),
            max_graph_shapes=2,
            shared_host_memory=True,
        )

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        page = os.sysconf("SC_PAGE_SIZE")
        return MemoryInfo(free=page * os.sysconf("SC_AVPHYS_PAGES"), total=page * os.sysconf("SC_PHYS_PAGES"))

    def register(self, ops: OpRegistry) -> None:
        pass

    def capture(self, step: Callable[[], Any], device: DeviceInfo) -> Callable[[], Any]:
        from toy_capture.graph import record  # imports torch

        return record(step).replay
