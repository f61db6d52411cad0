"""What the CUDA platform says of a machine and an installation, over an NVML library made of Python."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_platforms import candidates
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.core.errors import PlatformError
from hotplug.core.platform.select import select
from hotplug.platforms.cuda import CudaPlatform, machine, nvml
from hotplug.platforms.cuda.machine import TorchBuild

GIB = 2**30
CUDA_13 = TorchBuild("2.11.0+cu130", (13, 0))


class _NVMLError(Exception):
    """nvidia-ml-py's error: a code, and what it means."""

    def __init__(self, value: int) -> None:
        super().__init__({9: "Driver Not Loaded", 12: "NVML Shared Library Not Found",
                          18: "Driver/library version mismatch"}[value])  # fmt: skip
        self.value = value


@dataclass
class Library:
    """The module `pynvml` of nvidia-ml-py on a made-up machine. A handle is the GPU's number."""

    gpus: list[tuple[str, tuple[int, int], int]] = field(default_factory=lambda: [("NVIDIA H200", (9, 0), 132 * 128)])
    """Name, compute capability and cores."""
    cuda: int = 13000
    fails: int = 0
    """The code that nvmlInit ends with."""

    NVMLError = _NVMLError
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fails:
            raise _NVMLError(self.fails)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.95"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return self.cuda

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        return number

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.gpus[handle][0]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return self.gpus[handle][1]

    def nvmlDeviceGetNumGpuCores(self, handle: int) -> int:  # noqa: N802
        return self.gpus[handle][2]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(free=100 * GIB, total=141 * GIB, used=41 * GIB)


NO_DRIVER = Library(fails=12)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine: `install(library, build, triton=...)` gives the platform on it. No library is no nvidia-ml-py."""

    def make(library: Library | None = None, build: TorchBuild | None = CUDA_13, *, triton: bool = True,
             visible: str | None = None, node: str = "/absent") -> CudaPlatform:  # fmt: skip
        monkeypatch.setitem(sys.modules, "pynvml", library)
        monkeypatch.setattr(nvml, "_NODES", (node,))
        monkeypatch.setattr(TorchBuild, "installed", lambda: build)
        monkeypatch.setattr(machine, "find_spec", lambda name: name if triton else None)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return CudaPlatform()

    return make


def test_what_is_made_up_here_is_in_nvidia_ml_py() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in (name for name in vars(Library) if name.lower().startswith("nvml")):
        assert hasattr(pynvml, name)
    assert (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_LIBRARY_NOT_FOUND) == (9, 12)


def test_a_driver_without_nvidia_ml_py_is_broken_not_absent(install: Any) -> None:
    (candidate,) = candidates(install(None, node="/dev/null"))
    assert candidate.broken
    assert "pip install 'hotplug[cuda]'" in candidate.reason


def test_probing_needs_neither_torch_nor_a_cuda_context() -> None:
    code = ("import sys, time; from hotplug.platforms.cuda import CudaPlatform; begin = time.process_time()\n"
            "platform = CudaPlatform(); platform.probe() or platform.diagnose()\n"
            "assert time.process_time() - begin < 1\n"
            "print([m for m in sys.modules if m in ('torch', 'triton', 'cuda')])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_healthy_machine_has_its_gpu_and_nothing_to_say(install: Any) -> None:
    platform = install(Library())
    (device,) = platform.probe()
    assert (device.index, device.name, device.arch, device.cores) == (0, "NVIDIA H200", "sm_90", 132)
    assert platform.diagnose() == []
    assert platform.limits(device).asynchronous
    memory = platform.memory(device)
    assert (memory.free, memory.total) == (100 * GIB, 141 * GIB)


def test_memory_that_pytorch_holds_back_is_free_but_for_what_recorded_graphs_write_to(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = install(Library())
    (device,) = platform.probe()
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 5 * GIB, "allocated_size": 3 * GIB},
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 7 * GIB, "allocated_size": 0},
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 9 * GIB, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert platform.memory(device).free == 102 * GIB


OLD = Library([("Tesla V100", (7, 0), 80 * 64)])
ABSENT = [
    ("no-package", {"library": None}, "nvidia-ml-py, which asks the driver for its GPUs, is not installed"),
    ("no-driver", {"library": NO_DRIVER}, "no NVIDIA driver: its library NVML is not found"),
    ("driver-not-loaded", {"library": Library(fails=9)}, "Driver Not Loaded"),
    ("no-gpu", {"library": Library([])}, "the NVIDIA driver finds no GPU"),
    ("hidden", {"library": Library(), "visible": ""},
     "CUDA_VISIBLE_DEVICES is empty: this process sees none of the machine's GPUs (1)"),
    ("not-there", {"library": Library(), "visible": "7"}, "CUDA_VISIBLE_DEVICES=7 names no GPU: this process"),
    ("old-gpu", {"library": OLD}, "Tesla V100 has compute capability 7.0, 8.0 is the least"),
]  # fmt: skip


@pytest.mark.parametrize(("machine_", "reason"), [c[1:] for c in ABSENT], ids=[c[0] for c in ABSENT])
def test_a_machine_without_a_usable_gpu_says_why(install: Any, machine_: dict[str, Any], reason: str) -> None:
    (candidate,) = candidates(install(**machine_))
    assert candidate.devices == () and not candidate.broken
    assert reason in candidate.reason
    with pytest.raises(PlatformError, match="platform 'cuda' cannot be used"):
        select("cuda", [candidate])


FAULTS = [
    ("old-driver", {"library": Library(cuda=12020)},
     "driver 580.95 serves CUDA 12.2, torch 2.11.0+cu130 needs CUDA 13.0 or newer; upgrade the driver"),
    ("cpu-torch", {"library": Library(), "build": TorchBuild("2.11.0+cpu", None)},
     "torch 2.11.0+cpu is built for the CPU only; install its build for CUDA 13.0"),
    ("rocm-torch", {"library": Library(), "build": TorchBuild("2.11.0", None, "7.1")}, "is built for ROCm"),
    ("no-triton", {"library": Library(), "triton": False}, "Triton is not installed; pip install 'hotplug[cuda]'"),
]  # fmt: skip


@pytest.mark.parametrize(("machine_", "finding"), [c[1:] for c in FAULTS], ids=[c[0] for c in FAULTS])
def test_an_installation_that_cannot_use_the_gpu_is_named_and_refused(
    install: Any, machine_: dict[str, Any], finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = install(**machine_)
    (candidate,) = found = candidates(platform)
    assert [device.name for device in candidate.devices] == ["NVIDIA H200"]
    assert any(finding in text for text in platform.diagnose())
    with pytest.raises(PlatformError, match="NVIDIA H200 is here, but what is installed cannot use it"):
        platform.limits(candidate.devices[0])
    with pytest.raises(PlatformError, match="cannot describe its device"):  # auto does not go on without it
        select("auto", found)
    monkeypatch.setattr("hotplug.core.platform.discovery.discover", lambda: found)
    listed = json.loads(CliRunner().invoke(app, ["devices", "--json"]).stdout)["platforms"][0]
    assert finding in listed["findings"][0]
    assert finding[:30] in CliRunner().invoke(app, ["devices"], env={"COLUMNS": "200"}).stdout
    said = CliRunner().invoke(app, ["doctor", "--json"]).stdout
    assert any(finding in f["message"] and f["state"] == "warn" for f in json.loads(said)["findings"])


@pytest.mark.parametrize(("cuda", "build"), [(13000, (13, 2)), (13010, (13, 0)), (13000, (12, 8))])
def test_a_driver_serves_builds_of_its_major_version_and_older(install: Any, cuda: int, build: tuple[int, int]) -> None:
    platform = install(Library(cuda=cuda), TorchBuild("2.11.0", build))
    platform.probe()
    assert platform.diagnose() == []


def test_a_driver_that_does_not_match_its_libraries_is_broken_not_absent(install: Any) -> None:
    (candidate,) = candidates(install(Library(fails=18)))
    assert candidate.broken
    assert "Driver/library version mismatch" in candidate.reason
    assert "restart the machine" in candidate.reason


def test_an_old_gpu_beside_a_new_one_is_left_out_by_name(install: Any) -> None:
    platform = install(Library([("Tesla V100", (7, 0), 80 * 64), ("NVIDIA A100", (8, 0), 108 * 64)]))
    assert [(d.index, d.name, d.cores) for d in platform.probe()] == [(1, "NVIDIA A100", 108)]
    assert platform.diagnose() == ["Tesla V100 has compute capability 7.0, 8.0 is the least"]


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n",
         TorchBuild("2.13.0+cpu", None)),
        ("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n", CUDA_13),
        ("__version__ = '2.11.0'\ncuda = None\nhip: Optional[str] = '7.1.25'\n", TorchBuild("2.11.0", None, "7.1.25")),
    ],
)  # fmt: skip
def test_the_build_of_torch_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, build: TorchBuild
) -> None:
    (tmp_path / "version.py").write_text(text)
    found = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(machine, "find_spec", lambda name: found)
    assert TorchBuild.installed() == build


def test_the_build_that_is_read_is_the_one_that_is_imported() -> None:
    import torch

    build = TorchBuild.installed()
    assert build is not None
    assert build.version == torch.__version__
    assert (build.cuda is None) == (torch.version.cuda is None)
