"""hotplug: one LLM inference and serving engine for every accelerator.

The names below load on first use, so that importing the package, asking for help or listing devices does
not import torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# OpenMP workers that spin at a barrier while another process holds their core slow a step down tens of times;
# the engine shares its cores with the front end. The library reads this once, when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from hotplug.core.client.async_llm import AsyncLLM
    from hotplug.core.client.llm import LLM
    from hotplug.core.request import SamplingParams

_WHERE = {
    "LLM": "hotplug.core.client.llm",
    "AsyncLLM": "hotplug.core.client.async_llm",
    "SamplingParams": "hotplug.core.request",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hotplug' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
