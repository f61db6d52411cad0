"""Whether what is installed can use the GPUs of this machine: the driver, torch's build, Triton. Imports neither."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotplug.platforms.cuda.nvml import Nvml

LEAST = (8, 0)
"""Oldest compute capability that the kernels are written for."""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What the installed torch was built for, as its version file says."""

    version: str
    cuda: tuple[int, int] | None
    hip: str = ""

    @classmethod
    def installed(cls) -> TorchBuild | None:
        """None without torch, or where it does not say."""
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        file = Path(spec.origin).with_name("version.py")
        if not file.is_file():
            return None
        text = file.read_text()

        def value(name: str) -> str:
            found = re.search(rf"^{name}\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
            return found[1] if found else ""

        cuda = re.match(r"(\d+)\.(\d+)", value("cuda"))
        return cls(value("__version__"), (int(cuda[1]), int(cuda[2])) if cuda else None, value("hip"))


def absence(nvml: Nvml) -> Sequence[str]:
    """Why the GPUs that the driver knows cannot be used by this process or these kernels; [] where they can."""
    gpus, count = nvml.gpus(), nvml.count()
    if not count:
        return ["the NVIDIA driver finds no GPU"]
    if not gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        says = f"CUDA_VISIBLE_DEVICES={hidden} names no GPU" if hidden else "CUDA_VISIBLE_DEVICES is empty"
        return [f"{says}: this process sees none of the machine's GPUs ({count}); unset it, or name one by its number"]
    return [
        f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, {LEAST[0]}.{LEAST[1]} is the least"
        for gpu in gpus if gpu.capability < LEAST
    ]  # fmt: skip


def faults(driver: str, driver_cuda: tuple[int, int]) -> Sequence[str]:
    """What is wrong with the installation, one sentence each with what to do; [] if all is well.

    `driver_cuda` is the newest CUDA that the driver serves; it serves every build of the same major version.
    """
    found = []
    build = TorchBuild.installed()
    if build is not None and build.cuda is None:
        kind = "ROCm" if build.hip else "the CPU only"
        found.append(f"torch {build.version} is built for {kind}; install its build for "
                     f"CUDA {driver_cuda[0]}.{driver_cuda[1]} or older of the same major version")  # fmt: skip
    elif build is not None and build.cuda is not None and build.cuda[0] > driver_cuda[0]:
        found.append(
            f"driver {driver} serves CUDA {driver_cuda[0]}.{driver_cuda[1]}, torch {build.version} needs "
            f"CUDA {build.cuda[0]}.0 or newer; upgrade the driver, or install torch for CUDA {driver_cuda[0]}"
        )
    if find_spec("triton") is None:
        found.append("Triton is not installed; pip install 'hotplug[cuda]'")
    return found
