"""What hotplug and the installed packages bring together."""

from __future__ import annotations

from collections.abc import Iterable

from hotplug.core.platform.discovery import Loaded, load_group
from hotplug.plugins.builtin import everything
from hotplug.plugins.extension import Extension, merge

PLUGIN_GROUP = "hotplug.plugins"


def gather(loaded: Iterable[Loaded] | None = None, *, builtin: Extension | None = None) -> Extension:
    """`builtin` (default: all of it, which imports torch) and all that is installed. Raises PlatformError."""
    return merge(everything() if builtin is None else builtin, load_group(PLUGIN_GROUP) if loaded is None else loaded)
