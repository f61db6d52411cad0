"""What hotplug and the installed packages bring together."""

from __future__ import annotations

from collections.abc import Iterable

from hotplug.core.config import EngineConfig
from hotplug.core.extension.points import Extension, merge
from hotplug.core.platform.discovery import Loaded, load_group
from hotplug.core.startup.builtin import everything

PLUGIN_GROUP = "hotplug.plugins"


def gather(loaded: Iterable[Loaded] | None = None, *, builtin: Extension | None = None) -> Extension:
    """`builtin` (default: all of it, which imports torch) and all that is installed. Raises PlatformError."""
    return merge(everything() if builtin is None else builtin, load_group(PLUGIN_GROUP) if loaded is None else loaded)


def check_names(config: EngineConfig) -> None:
    """Raise ConfigError for a name that nothing installed brings, before a model is fetched for it.

    Plugins, and torch with them, are loaded only for a name that is not built in.
    """
    connector = None if config.kv_connector is None else config.kv_connector.partition(":")[0]
    named = (
        ("scheduling", config.scheduling, "--scheduling", ("fcfs", "priority")),
        ("quantization", config.quantization, "--quantization", (None, "none", "packed")),
        ("kv_connectors", connector, "--kv-connector", (None,)),
    )
    unknown = [(kind, name, option) for kind, name, option, own in named if name not in own]
    if not unknown:
        return
    extension = gather()
    for kind, name, option in unknown:
        extension.find(kind, str(name), option=option)
