"""Everything a platform plugin may import from hotplug, and nothing else.

Names load on first use: a plugin's module stays importable, and its probe callable, without torch. The optional
protocols are found by their methods, so that no platform needs to import them; for annotations they are in `optional`.
Names that interface 1.x had besides load too (`hotplug.core.interface_1`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import hotplug.core.platform.optional as optional
    from hotplug.core.errors import HotplugError, PlatformError
    from hotplug.core.ops.attention import AttentionInputs, finite_values, gather_kv
    from hotplug.core.ops.registry import Bucket, Impl, Op, OpRegistry, SiteSpec, Verdict
    from hotplug.core.platform.base import (
        API_VERSION,
        CompileLimits,
        DeviceInfo,
        ExecMode,
        Feature,
        KVLayout,
        Limits,
        MemoryInfo,
        Platform,
    )
    from hotplug.core.platform.optional import NotHandled
    from hotplug.core.platform.program import StepProgram
    from hotplug.core.platform.rank_group import RankGroup
    from hotplug.core.platform.tuning import TuningResult, TuningSummary
    from hotplug.core.request import NO_TOKEN
    from hotplug.core.weights.source import cache_folder

_WHERE = {
    "hotplug.core.errors": ("HotplugError", "PlatformError"),
    "hotplug.core.ops.attention": ("AttentionInputs", "finite_values", "gather_kv"),
    "hotplug.core.interface_1": ("CompileLimits", "Impl", "Limits"),
    "hotplug.core.ops.registry": ("Bucket", "Op", "OpRegistry", "SiteSpec", "Verdict"),
    "hotplug.core.platform.base": (
        "API_VERSION", "DeviceInfo", "ExecMode", "Feature", "KVLayout", "MemoryInfo", "Platform",
    ),
    "hotplug.core.platform.optional": ("NotHandled", "optional"),
    "hotplug.core.platform.program": ("StepProgram",),
    "hotplug.core.platform.rank_group": ("RankGroup",),
    "hotplug.core.platform.tuning": ("TuningResult", "TuningSummary"),
    "hotplug.core.request": ("NO_TOKEN",),
    "hotplug.core.weights.source": ("cache_folder",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "API_VERSION",
    "NO_TOKEN",
    "AttentionInputs",
    "Bucket",
    "CompileLimits",
    "DeviceInfo",
    "ExecMode",
    "Feature",
    "HotplugError",
    "Impl",
    "KVLayout",
    "Limits",
    "MemoryInfo",
    "NotHandled",
    "Op",
    "OpRegistry",
    "Platform",
    "PlatformError",
    "RankGroup",
    "SiteSpec",
    "StepProgram",
    "TuningResult",
    "TuningSummary",
    "Verdict",
    "cache_folder",
    "finite_values",
    "gather_kv",
    "optional",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        module = import_module(_MODULE_OF[name])
        return module if name == "optional" else getattr(module, name)
    interface_1 = import_module("hotplug.core.interface_1")
    if name in interface_1.PROTOCOLS:
        return getattr(import_module("hotplug.core.platform.optional"), name)
    raise AttributeError(f"module 'hotplug.vendor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
