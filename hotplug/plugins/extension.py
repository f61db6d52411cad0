"""What a plugin brings, and how the installed ones are gathered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hotplug.core.errors import PlatformError
from hotplug.core.models.decoder import MODELS, Decoder
from hotplug.core.ops.builtin import builtin_ops
from hotplug.core.ops.registry import Op
from hotplug.core.platform.discovery import Loaded, load_group

PLUGIN_GROUP = "hotplug.plugins"


@dataclass(frozen=True, slots=True)
class Extension:
    """Model classes by architecture name (config.json's `architectures`), and ops with their references."""

    models: Mapping[str, type[Decoder]] = field(default_factory=dict)
    ops: tuple[Op, ...] = ()


def gather(loaded: Iterable[Loaded] | None = None) -> Extension:
    """The built-in models and all that plugins add. Raises PlatformError for a broken or conflicting plugin."""
    models = dict(MODELS)
    ops = {op.name: op for op in builtin_ops()}
    builtin = set(ops)
    for item in load_group(PLUGIN_GROUP) if loaded is None else loaded:
        where = f"plugin {item.name} ({item.distribution or item.target})"
        if item.error:
            raise PlatformError("the plugin failed to load", where=where, why=item.error,
                                hint="Repair or uninstall it.")  # fmt: skip
        if not isinstance(item.plugin, Extension):
            raise PlatformError(f"{item.target} returned {type(item.plugin).__name__}, not Extension", where=where)
        taken = sorted(models.keys() & item.plugin.models.keys())
        if taken:
            raise PlatformError(f"the architecture {taken[0]} is already provided", where=where,
                                hint="Uninstall one of the two.")  # fmt: skip
        for op in item.plugin.ops:
            if op.name in ops:
                raise PlatformError(f"the op {op.name} is already defined", where=where,
                                    hint="Rename it, or uninstall one of the two.")  # fmt: skip
            ops[op.name] = op
        models.update(item.plugin.models)
    return Extension(models, tuple(op for name, op in ops.items() if name not in builtin))
