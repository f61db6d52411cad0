"""Everything a platform plugin may import from hotplug, and nothing else.

Names load on first use: a plugin's module stays importable, and its probe callable, without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from hotplug.core.platform.optional import (
        HasCapture,
        HasComm,
        HasCompile,
        HasCompileCheck,
        HasDiagnosis,
        HasKV,
        HasRuntime,
        HasShare,
        HasStepSizes,
        HasTuning,
        HasWarmup,
        HasWeights,
        NotHandled,
    )
    from hotplug.core.platform.program import StepProgram
    from hotplug.core.platform.rank_group import RankGroup
    from hotplug.core.platform.tuning import TuningResult, TuningSummary
    from hotplug.core.request import NO_TOKEN
    from hotplug.core.weights.source import cache_folder

_WHERE = {
    "hotplug.core.errors": ("HotplugError", "PlatformError"),
    "hotplug.core.ops.attention": ("AttentionInputs", "finite_values", "gather_kv"),
    "hotplug.core.ops.registry": ("Bucket", "Impl", "Op", "OpRegistry", "SiteSpec", "Verdict"),
    "hotplug.core.platform.base": (
        "API_VERSION", "CompileLimits", "DeviceInfo", "ExecMode", "Feature", "KVLayout", "Limits", "MemoryInfo",
        "Platform",
    ),
    "hotplug.core.platform.optional": (
        "HasCapture", "HasComm", "HasCompile", "HasCompileCheck", "HasDiagnosis", "HasKV", "HasRuntime", "HasShare",
        "HasStepSizes", "HasTuning", "HasWarmup", "HasWeights", "NotHandled",
    ),
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
    "HasCapture",
    "HasComm",
    "HasCompile",
    "HasCompileCheck",
    "HasDiagnosis",
    "HasKV",
    "HasRuntime",
    "HasShare",
    "HasStepSizes",
    "HasTuning",
    "HasWarmup",
    "HasWeights",
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
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hotplug.vendor' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
