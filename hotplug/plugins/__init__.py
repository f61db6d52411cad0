"""Extensions other than platforms: everything that such a package may import from hotplug (docs/plugins.md).

An entry point of the group `hotplug.plugins` names a function of no arguments that returns an `Extension`. Names
load on first use: a package of parsers is gathered by a server that has no torch loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hotplug.core.errors import ConfigError, ModelError, RequestError, UnsupportedModelError
    from hotplug.core.extension.points import Extension
    from hotplug.core.kv.spec import (
        BlockFormat,
        BlockTensor,
        FullAttention,
        KVSpec,
        LatentAttention,
        RecurrentState,
        SlidingWindow,
    )
    from hotplug.core.layers.attention import Attention
    from hotplug.core.layers.context import BuildContext
    from hotplug.core.layers.dense import AddRMSNorm, Embedding, Linear, RMSNorm
    from hotplug.core.layers.destination import Converted, Destination
    from hotplug.core.layers.kv_cache import KVBlocks, KVSlot
    from hotplug.core.layers.mlp import GatedMLP
    from hotplug.core.models.decoder import Decoder, DecoderLayer
    from hotplug.core.ops.inputs import StepInputs
    from hotplug.core.ops.registry import Op
    from hotplug.core.quant.scheme import QuantScheme
    from hotplug.core.request import Request
    from hotplug.core.sample.processors import LogitsProcessor
    from hotplug.core.scheduler.policy import SchedulingPolicy
    from hotplug.core.text.parsers import Reasoned, ReasoningParser, TagSplitter, ToolCall, ToolParser, ToolText
    from hotplug.core.transfer.connector import KVConnector, KVFormat
    from hotplug.core.weights.config import ModelConfig, RopeConfig
    from hotplug.core.weights.hf_config import parse_hf_config

_WHERE = {
    "hotplug.core.errors": ("ConfigError", "ModelError", "RequestError", "UnsupportedModelError"),
    "hotplug.core.kv.spec": (
        "BlockFormat", "BlockTensor", "FullAttention", "KVSpec", "LatentAttention", "RecurrentState", "SlidingWindow",
    ),
    "hotplug.core.layers.attention": ("Attention",),
    "hotplug.core.layers.kv_cache": ("KVBlocks", "KVSlot"),
    "hotplug.core.layers.context": ("BuildContext",),
    "hotplug.core.layers.dense": ("AddRMSNorm", "Embedding", "Linear", "RMSNorm"),
    "hotplug.core.layers.destination": ("Converted", "Destination"),
    "hotplug.core.layers.mlp": ("GatedMLP",),
    "hotplug.core.models.decoder": ("Decoder", "DecoderLayer"),
    "hotplug.core.ops.inputs": ("StepInputs",),
    "hotplug.core.ops.registry": ("Op",),
    "hotplug.core.quant.scheme": ("QuantScheme",),
    "hotplug.core.request": ("Request",),
    "hotplug.core.sample.processors": ("LogitsProcessor",),
    "hotplug.core.scheduler.policy": ("SchedulingPolicy",),
    "hotplug.core.text.parsers": (
        "Reasoned", "ReasoningParser", "TagSplitter", "ToolCall", "ToolParser", "ToolText",
    ),
    "hotplug.core.transfer.connector": ("KVConnector", "KVFormat"),
    "hotplug.core.weights.config": ("ModelConfig", "RopeConfig"),
    "hotplug.core.weights.hf_config": ("parse_hf_config",),
    "hotplug.core.extension.points": ("Extension",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "AddRMSNorm",
    "Attention",
    "BlockFormat",
    "BlockTensor",
    "BuildContext",
    "ConfigError",
    "Converted",
    "Decoder",
    "DecoderLayer",
    "Destination",
    "Embedding",
    "Extension",
    "FullAttention",
    "GatedMLP",
    "KVBlocks",
    "KVConnector",
    "KVFormat",
    "KVSlot",
    "KVSpec",
    "LatentAttention",
    "Linear",
    "LogitsProcessor",
    "ModelConfig",
    "ModelError",
    "Op",
    "QuantScheme",
    "RMSNorm",
    "Reasoned",
    "ReasoningParser",
    "RecurrentState",
    "Request",
    "RequestError",
    "RopeConfig",
    "SchedulingPolicy",
    "SlidingWindow",
    "StepInputs",
    "TagSplitter",
    "ToolCall",
    "ToolParser",
    "ToolText",
    "UnsupportedModelError",
    "parse_hf_config",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hotplug.plugins' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
