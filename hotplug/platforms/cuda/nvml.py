"""What NVML says of the GPUs: names, memory, compute capability. No CUDA context, no torch, safe before a fork.

NVML is the driver's library; nvidia-ml-py (`pynvml`) calls it, and comes with the extra `cuda`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotplug.vendor import PlatformError

MISSING = "nvidia-ml-py, which asks the driver for its GPUs, is not installed; pip install 'hotplug[cuda]'"
_NODES = ("/dev/nvidiactl", "/dev/dxg")
"""Device nodes of the driver: on Linux, and on Linux inside Windows."""


class NoNvmlError(Exception):
    """There is no driver to ask, or nothing to ask it with; says which."""


class NvmlError(Exception):
    """NVML is there but answers with an error."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, by its number among those that this process may use."""

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    driver: str
    handle: Any


class Nvml:
    """The library, initialized. Raises NoNvmlError where there is none, NvmlError where it fails.

    Raises PlatformError where nvidia-ml-py is missing and the driver is not: a GPU must not be overlooked.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as e:
            if any(Path(node).exists() for node in _NODES):
                raise PlatformError("an NVIDIA driver is here", why=MISSING) from e
            raise NoNvmlError(MISSING) from e
        self._lib = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as e:
            if e.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                raise NoNvmlError("no NVIDIA driver: its library NVML is not found") from e
            if e.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
                raise NoNvmlError(f"no NVIDIA driver: {e}") from e
            raise NvmlError(f"nvmlInit: {e}") from e

    def _call(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._lib, name)(*args)
        except self._lib.NVMLError as e:
            raise NvmlError(f"{name}: {e}") from e

    def count(self) -> int:
        """GPUs of the machine, hidden ones too."""
        return int(self._call("nvmlDeviceGetCount"))

    def driver(self) -> str:
        """The driver's version."""
        return str(self._call("nvmlSystemGetDriverVersion"))

    def driver_cuda(self) -> tuple[int, int]:
        """The newest CUDA version that the driver serves."""
        version = self._call("nvmlSystemGetCudaDriverVersion_v2")
        return version // 1000, version % 1000 // 10

    def gpus(self) -> list[Gpu]:
        """The GPUs that this process may use, in the order that CUDA numbers them."""
        driver = self.driver()
        handles = [self._call("nvmlDeviceGetHandleByIndex", i) for i in range(self.count())]
        uuids = [str(self._call("nvmlDeviceGetUUID", handle)) for handle in handles]
        numbers = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
        return [self._gpu(i, handles[number], driver) for i, number in enumerate(numbers)]

    def _gpu(self, index: int, handle: Any, driver: str) -> Gpu:
        major, minor = self._call("nvmlDeviceGetCudaComputeCapability", handle)
        per = 128 if major >= 8 and (major, minor) != (8, 0) else 64
        cores = self._call("nvmlDeviceGetNumGpuCores", handle)
        return Gpu(index, str(self._call("nvmlDeviceGetName", handle)), (major, minor), cores // per, driver, handle)

    def memory(self, gpu: Gpu) -> tuple[int, int]:
        """(free, total) bytes."""
        memory = self._call("nvmlDeviceGetMemoryInfo", gpu.handle)
        return int(memory.free), int(memory.total)


def visible(variable: str | None, uuids: list[str]) -> list[int]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, as CUDA reads it: up to the first entry that names none."""
    if variable is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.isdecimal():
            number = int(entry) if int(entry) < len(uuids) else -1
        else:
            number = next((i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)), -1)
        if number < 0 or number in found:
            break
        found.append(number)
    return found
