"""The smallest platform: the host's memory, every operation by its plain-PyTorch reference."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hotplug.vendor import DeviceInfo, Limits, MemoryInfo, OpRegistry


class ToyEager:
    name = "toy_eager"
    torch_device = "cpu"
    api_version = "2.0"

    def probe(self) -> Sequence[DeviceInfo]:
        return [DeviceInfo(index=0, name="Toy Eager", arch="toy")]

    def limits(self, device: DeviceInfo) -> Limits:
        return Limits(dtypes=("float32",), shared_host_memory=True)

    def memory(self, device: DeviceInfo) -> MemoryInfo:
        page = os.sysconf("SC_PAGE_SIZE")
        return MemoryInfo(free=page * os.sysconf("SC_AVPHYS_PAGES"), total=page * os.sysconf("SC_PHYS_PAGES"))

    def register(self, ops: OpRegistry) -> None:
        pass
