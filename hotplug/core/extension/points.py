"""What a plugin brings, and how several are merged. Importing this needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hotplug.core.errors import ConfigError, PlatformError, nearest
from hotplug.core.platform.discovery import Loaded

if TYPE_CHECKING:
    from hotplug.core.models.decoder import Decoder
    from hotplug.core.ops.registry import Op
    from hotplug.core.quant.scheme import QuantScheme
    from hotplug.core.sample.processors import Factory as ProcessorFactory
    from hotplug.core.scheduler.policy import SchedulingPolicy
    from hotplug.core.text.parsers import ReasoningParser, ToolParser
    from hotplug.core.transfer.connector import Factory as ConnectorFactory
    from hotplug.core.weights.hf_config import ConfigReader

BUILT_IN = "hotplug itself"


def _kind(title: str, default: Any = dict) -> Any:
    """A field of entries by name; `title` is what messages call one."""
    return field(default_factory=default, metadata={"title": title})


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """What one package adds, by name. Names are unique over all installed packages and the built-in ones."""

    models: Mapping[str, type[Decoder]] = _kind("architecture")
    """Model classes by architecture name (config.json's `architectures`)."""
    ops: tuple[Op, ...] = _kind("op", tuple)
    """Ops with their references, for models to bind and for kernels to claim."""
    config_readers: Mapping[str, ConfigReader] = _kind("config reader")
    """By architecture, for a config.json that the built-in reader does not understand."""
    quantization: Mapping[str, QuantScheme] = _kind("quantization scheme")
    """What `--quantization` may name."""
    kv_connectors: Mapping[str, ConnectorFactory] = _kind("KV connector")
    """What `--kv-connector` may name; called once an engine with the argument and the format of its blocks."""
    logits_processors: Mapping[str, ProcessorFactory] = _kind("logits processor")
    """What a request's `logits_processors` may name; called once a request with the arguments that it gives."""
    scheduling: Mapping[str, SchedulingPolicy] = _kind("scheduling policy")
    """What `--scheduling` may name."""
    tool_parsers: Mapping[str, Callable[[], ToolParser]] = _kind("tool parser")
    """What `--tool-parser` may name; called once a completion."""
    reasoning_parsers: Mapping[str, Callable[[str], ReasoningParser]] = _kind("reasoning parser")
    """What `--reasoning-parser` may name; called once a completion with the end of its prompt."""

    def find(self, kind: str, name: str, *, option: str) -> Any:
        """An entry of one field by name. Raises ConfigError naming the option that asked for it."""
        entries: Mapping[str, Any] = getattr(self, kind)
        if name not in entries:
            hint = nearest(name, entries) if entries else "None is installed."
            raise ConfigError(f"there is no {_TITLES[kind]} {name!r}", where=option, hint=hint)
        return entries[name]


_TITLES = {f.name: f.metadata["title"] for f in dataclasses.fields(Extension)}


def merge(builtin: Extension, loaded: Iterable[Loaded]) -> Extension:
    """`builtin` and all that plugins add, but only plugins' ops: a registry has the built-in ones.

    Raises PlatformError for a broken plugin, and for a name that two packages bring.
    """
    merged: dict[str, dict[str, Any]] = {kind: dict(_entries(builtin, kind)) for kind in _TITLES}
    owners = {(kind, name): BUILT_IN for kind, entries in merged.items() for name in entries}
    for item in loaded:
        owner = f"{item.name} ({item.distribution or item.target})"
        extension = _checked(item, f"plugin {owner}")
        for kind, title in _TITLES.items():
            for name, entry in _entries(extension, kind).items():
                other = owners.setdefault((kind, name), owner)
                if other is not owner:
                    raise PlatformError(
                        f"the {title} {name} is provided twice",
                        why=[f"by {other}", f"by {owner}"],
                        hint="Give it another name." if other is BUILT_IN else "Uninstall one of the two.",
                    )
                merged[kind][name] = entry
    ops = tuple(op for name, op in merged.pop("ops").items() if owners["ops", name] is not BUILT_IN)
    return Extension(ops=ops, **merged)


def contents(item: Loaded) -> dict[str, list[str]]:
    """The names that a loaded plugin adds, by what they are. Raises PlatformError for one that is broken."""
    extension = _checked(item, f"plugin {item.name}")
    return {title: sorted(entries) for kind, title in _TITLES.items() if (entries := _entries(extension, kind))}


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
