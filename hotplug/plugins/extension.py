"""What a plugin brings, and how the installed ones are gathered.

Importing this needs no torch: the server gathers parsers without a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hotplug.core.errors import ConfigError, PlatformError, nearest
from hotplug.core.platform.discovery import Loaded, load_group

if TYPE_CHECKING:
    from hotplug.core.models.decoder import Decoder
    from hotplug.core.ops.registry import Op
    from hotplug.core.quant.scheme import QuantScheme
    from hotplug.core.sample.processors import LogitsProcessor
    from hotplug.core.scheduler.policy import SchedulingPolicy
    from hotplug.core.text.parsers import ReasoningParser, ToolParser
    from hotplug.core.transfer.connector import KVConnector, KVFormat
    from hotplug.core.weights.hf_config import ConfigReader

PLUGIN_GROUP = "hotplug.plugins"

_KINDS = {
    "models": "architecture",
    "ops": "op",
    "config_readers": "config reader",
    "quantization": "quantization scheme",
    "kv_connectors": "KV connector",
    "logits_processors": "logits processor",
    "scheduling": "scheduling policy",
    "tool_parsers": "tool parser",
    "reasoning_parsers": "reasoning parser",
}


@dataclass(frozen=True, slots=True)
class Extension:
    """What one package adds, by name. Names are unique over all installed packages and the built-in ones."""

    models: Mapping[str, type[Decoder]] = field(default_factory=dict)
    """Model classes by architecture name (config.json's `architectures`)."""
    ops: tuple[Op, ...] = ()
    """Ops with their references, for models to bind and for kernels to claim."""
    config_readers: Mapping[str, ConfigReader] = field(default_factory=dict)
    """By architecture, for a config.json that the built-in reader does not understand."""
    quantization: Mapping[str, QuantScheme] = field(default_factory=dict)
    """What `--quantization` may name."""
    kv_connectors: Mapping[str, Callable[[str, KVFormat], KVConnector]] = field(default_factory=dict)
    """What `--kv-connector` may name; called once an engine with the argument and the format of its blocks."""
    logits_processors: Mapping[str, Callable[..., LogitsProcessor]] = field(default_factory=dict)
    """Called once a request, with the arguments that it gives."""
    scheduling: Mapping[str, SchedulingPolicy] = field(default_factory=dict)
    """What `--scheduling` may name."""
    tool_parsers: Mapping[str, Callable[[], ToolParser]] = field(default_factory=dict)
    """What `--tool-parser` may name; called once a completion."""
    reasoning_parsers: Mapping[str, Callable[[str], ReasoningParser]] = field(default_factory=dict)
    """What `--reasoning-parser` may name; called once a completion with the end of its prompt."""

    def find(self, kind: str, name: str, *, option: str) -> Any:
        """An entry of one field by name. Raises ConfigError naming the option that asked for it."""
        entries: Mapping[str, Any] = getattr(self, kind)
        if name not in entries:
            raise ConfigError(f"there is no {_KINDS[kind]} {name!r}", where=option,
                              hint=nearest(name, entries) if entries else "None is installed.")  # fmt: skip
        return entries[name]


def gather(loaded: Iterable[Loaded] | None = None, *, builtin: Extension | None = None) -> Extension:
    """`builtin` (default: all of it) and all that plugins add, but only plugins' ops: a registry has the built-in ones.

    Raises PlatformError for a broken plugin, and for a name that two packages bring.
    """
    if builtin is None:
        from hotplug.plugins.builtin import everything

        builtin = everything()
    merged: dict[str, dict[str, Any]] = {kind: dict(_entries(builtin, kind)) for kind in _KINDS}
    owners = {(kind, name): "hotplug" for kind, entries in merged.items() for name in entries}
    for item in load_group(PLUGIN_GROUP) if loaded is None else loaded:
        owner = f"{item.name} ({item.distribution or item.target})"
        extension = _checked(item, f"plugin {owner}")
        for kind, title in _KINDS.items():
            for name, entry in _entries(extension, kind).items():
                if (other := owners.get((kind, name))) is not None:
                    raise PlatformError(
                        f"the {title} {name} is provided twice",
                        why=[f"by {other}", f"by {owner}"],
                        hint="Uninstall one of the two." if other != "hotplug" else "Give it another name.",
                    )
                owners[kind, name] = owner
                merged[kind][name] = entry
    ops = tuple(op for name, op in merged.pop("ops").items() if owners["ops", name] != "hotplug")
    return Extension(ops=ops, **merged)


def _checked(item: Loaded, where: str) -> Extension:
    if item.error:
        raise PlatformError("the plugin failed to load", where=where, why=item.error, hint="Repair or uninstall it.")
    if not isinstance(item.plugin, Extension):
        raise PlatformError(f"{item.target} returned {type(item.plugin).__name__}, not Extension", where=where)
    stray = sorted(item.plugin.config_readers.keys() - item.plugin.models.keys())
    if stray:
        raise PlatformError(f"it reads the config of {stray[0]}, which is not among its models", where=where)
    return item.plugin


def _entries(extension: Extension, kind: str) -> Mapping[str, Any]:
    """One field by name; ops have their own."""
    if kind == "ops":
        return {op.name: op for op in extension.ops}
    return getattr(extension, kind)


assert set(_KINDS) == {f.name for f in dataclasses.fields(Extension)}
