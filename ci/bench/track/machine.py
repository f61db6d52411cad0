"""The machine that figures belong to: its facts, its class, and the versions of what ran."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ISA = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "asimd", "sve", "i8mm")
"""The processor's flags that kernels are chosen by."""
PACKAGES = ("torch", "transformers", "numpy", "uvicorn", "fastapi", "pyzmq", "triton")


def facts() -> dict[str, Any]:
    """What figures depend on. Memory in whole GiB, so that a few reserved pages make no other machine."""
    cpu = _processor()
    return {
        "cpu": cpu["name"],
        "isa": cpu["isa"],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        "gpus": gpus(),
    }


def machine_class(found: dict[str, Any]) -> str:
    """A short name for machines with the same facts."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:10]


def versions() -> dict[str, str]:
    """Of Python, the operating system and the packages that figures depend on, as far as they are installed."""
    found = {"python": platform.python_version(), "os": f"{platform.system()} {platform.release()}"}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[str]:
    """The names of NVIDIA GPUs, by nvidia-smi; none where it is not installed or finds none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    done = subprocess.run([command, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    return sorted(done.stdout.split("\n")[:-1]) if done.returncode == 0 else []


def _processor() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {"name": f"{platform.processor() or platform.machine()} ({sys.platform})", "isa": []}
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    parts = [fields.get("model name", platform.machine())]
    parts += [f"{name} {fields[name]}" for name in ("cpu family", "model", "stepping") if name in fields]
    return {"name": ", ".join(parts), "isa": [flag for flag in ISA if flag in flags]}
