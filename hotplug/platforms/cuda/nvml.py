"""What NVML says of the GPUs: names, memory, compute capability. No CUDA context, no torch."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

LIBRARY = "libnvidia-ml.so.1"


NOT_LOADED, NO_LIBRARY = 9, 12
"""NVML's codes where there is no driver: the kernel module, or the library behind this one, is missing."""


class NvmlError(Exception):
    """NVML is there but answers with an error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, by its number among those that this process may use."""

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    driver: str
    handle: int


class Nvml:
    """The library, initialized. Raises OSError where there is none, NvmlError where it fails."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(LIBRARY)
        self._call("nvmlInit_v2")

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._lib, name)(*args)
        if code:
            self._lib.nvmlErrorString.restype = ctypes.c_char_p
            raise NvmlError(f"{name}: {self._lib.nvmlErrorString(code).decode()}", code)

    def count(self) -> int:
        """GPUs of the machine, hidden ones too."""
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return count.value

    def driver(self) -> str:
        """The driver's version."""
        driver = ctypes.create_string_buffer(80)
        self._call("nvmlSystemGetDriverVersion", driver, 80)
        return driver.value.decode()

    def driver_cuda(self) -> tuple[int, int]:
        """The newest CUDA version that the driver serves."""
        version = ctypes.c_int()
        self._call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
        return version.value // 1000, version.value % 1000 // 10

    def gpus(self) -> list[Gpu]:
        """The GPUs that this process may use, in the order that CUDA numbers them."""
        driver = self.driver()
        handles = [self._handle(i) for i in range(self.count())]
        numbers = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), [self._uuid(h) for h in handles])
        return [self._gpu(i, handles[number], driver) for i, number in enumerate(numbers)]

    def _handle(self, number: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(number), ctypes.byref(handle))
        return handle

    def _uuid(self, handle: ctypes.c_void_p) -> str:
        text = ctypes.create_string_buffer(96)
        self._call("nvmlDeviceGetUUID", handle, text, 96)
        return text.value.decode()

    def _gpu(self, index: int, handle: ctypes.c_void_p, driver: str) -> Gpu:
        name = ctypes.create_string_buffer(96)
        self._call("nvmlDeviceGetName", handle, name, 96)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
        cores = ctypes.c_uint()
        self._call("nvmlDeviceGetNumGpuCores", handle, ctypes.byref(cores))
        per = 128 if major.value >= 8 and (major.value, minor.value) != (8, 0) else 64
        return Gpu(index, name.value.decode(), (major.value, minor.value), cores.value // per, driver,
                   handle.value or 0)  # fmt: skip

    def memory(self, gpu: Gpu) -> tuple[int, int]:
        """(free, total) bytes."""
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", ctypes.c_void_p(gpu.handle), ctypes.byref(memory))
        return memory.free, memory.total


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
