"""The checks of `hotplug doctor`: functions of an environment, each answering with findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hotplug.cli.display import gib
from hotplug.cli.environment import Environment

TESTED_TORCH = ((2, 11), (2, 13))
TESTED_TRANSFORMERS = ((5, 18), (5, 23))
_MIN_PYTHON = (3, 11)
_LOW_DISK, _LOW_MEMORY, _LOW_FILES = 2 * 2**30, 2**30, 4096
_DRIVER_OF = {"cuda": "NVIDIA driver (/dev/nvidia*)", "rocm": "AMD GPU driver (/dev/kfd)"}
_TITLE = {"cuda": "CUDA", "rocm": "ROCm"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. "fail" keeps hotplug from working, "warn" costs something, "note" is to know."""

    check: str
    state: Literal["ok", "note", "warn", "fail"]
    message: str
    fix: str = ""


def python_version(env: Environment) -> list[Finding]:
    shown = ".".join(map(str, env.python))
    if env.python[:2] < _MIN_PYTHON:
        return [Finding("python", "fail", f"{shown} is too old", "Install Python 3.11 or newer.")]
    return [Finding("python", "ok", shown)]


def torch_version(env: Environment) -> list[Finding]:
    torch = env.torch
    if torch.error:
        state = f"torch {torch.version} does not import" if torch.version else "torch is not installed"
        return [
            Finding("torch", "fail", f"{state}: {torch.error}", "Reinstall it: pip install --force-reinstall torch")
        ]
    return [_in_range("torch", torch.version, TESTED_TORCH)]


def torch_build(env: Environment) -> list[Finding]:
    """Whether torch and the drivers of this machine are for the same hardware."""
    torch = env.torch
    if torch.error:
        return []
    built_for = "rocm" if torch.hip else "cuda" if torch.cuda else None
    label = f"{_TITLE[built_for]} {torch.hip or torch.cuda}" if built_for else "the CPU only"
    if built_for is not None and built_for not in env.nodes:
        message = f"torch is built for {label}, but this machine has no {_DRIVER_OF[built_for]}"
        fix = "Install the driver, or a CPU build of torch, which is much smaller."
        return [Finding("torch build", "warn", message, fix)]
    for name in ("cuda", "rocm"):
        if name in env.nodes and built_for != name:
            message = f"this machine has the {_DRIVER_OF[name]}, but torch is built for {label}"
            fix = f"Install the {_TITLE[name]} build of torch to use the accelerator."
            return [Finding("torch build", "warn", message, fix)]
    return [Finding("torch build", "ok", f"built for {label}")]


def transformers_version(env: Environment) -> list[Finding]:
    if env.transformers is None:
        return [Finding("transformers", "fail", "not installed", "pip install transformers")]
    return [_in_range("transformers", env.transformers, TESTED_TRANSFORMERS)]


def extras(env: Environment) -> list[Finding]:
    """What each extra still needs: a warning where its hardware is present, else only to know."""
    findings = []
    for name, missing in sorted(env.extras.items()):
        if missing is None:
            findings.append(
                Finding(
                    f"extra {name}",
                    "note",
                    "installs nothing here: what it is for is not built, or not for this machine",
                )
            )
        elif missing:
            state: Literal["warn", "note"] = "warn" if name in env.nodes else "note"
            findings.append(
                Finding(
                    f"extra {name}", state, f"not installed: {', '.join(missing)}", f"pip install 'hotplug[{name}]'"
                )
            )
        else:
            findings.append(Finding(f"extra {name}", "ok", "nothing missing"))
    return findings


def plugins(env: Environment) -> list[Finding]:
    """Every platform plugin: broken, absent with its reason, or found with what it says of the machine."""
    if env.plugin_conflict:
        return [Finding("platforms", "fail", env.plugin_conflict)]
    findings = []
    for p in env.plugins:
        check, source = f"platform {p.name}", f" ({p.distribution})" if p.distribution else ""
        if p.broken:
            fix = f"Repair or uninstall {p.distribution or 'the plugin'}."
            findings.append(Finding(check, "fail", f"{p.reason}{source}", fix))
            continue
        if not p.num_devices:
            findings.append(Finding(check, "note", f"absent: {p.reason}{source}"))
            continue
        devices = "device" if p.num_devices == 1 else "devices"
        findings.append(Finding(check, "ok", f"{p.num_devices} {devices}{source}"))
        findings += [Finding(check, "warn", text) for text in p.findings]
    if not any(p.num_devices for p in env.plugins):
        findings.append(Finding("platforms", "fail", "no platform found a device", "See the reasons above."))
    return findings


def cache(env: Environment) -> list[Finding]:
    if env.cache_error:
        hint = "Make it writable, or set HOTPLUG_CACHE to another folder."
        return [Finding("cache", "fail", f"{env.cache}: {env.cache_error}", hint)]
    message = f"{env.cache}, {gib(env.disk_free)} free on its disk"
    if env.disk_free < _LOW_DISK:
        return [Finding("cache", "warn", message, "Free some space, or set HOTPLUG_CACHE to another disk.")]
    return [Finding("cache", "ok", message)]


def memory(env: Environment) -> list[Finding]:
    message = f"{gib(env.memory_free)} free"
    if env.memory_free < _LOW_MEMORY:
        return [Finding("memory", "warn", message, "End other programs, or lower --kv-cache-memory.")]
    return [Finding("memory", "ok", message)]


def open_files(env: Environment) -> list[Finding]:
    if env.open_files is None:
        return [Finding("open files", "ok", "no limit")]
    if env.open_files < _LOW_FILES:
        message = f"at most {env.open_files}, one a client connection"
        return [Finding("open files", "warn", message, "Run `ulimit -n 65536` before serving many clients.")]
    return [Finding("open files", "ok", f"at most {env.open_files}")]


CHECKS: tuple[Callable[[Environment], list[Finding]], ...] = (
    python_version, torch_version, torch_build, transformers_version, extras, plugins, cache, memory, open_files,
)  # fmt: skip


def _in_range(name: str, version: str, tested: tuple[tuple[int, int], tuple[int, int]]) -> Finding:
    from packaging.version import Version

    low, high = tested
    release = Version(version).release[:2]
    if low <= release <= high:
        return Finding(name, "ok", version)
    shown = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    fix = f"pip install '{name}>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}'"
    return Finding(name, "warn", f"{version} is outside the tested range {shown}", fix)
