"""What hotplug itself brings to each extension point, under the same names that plugins must not take."""

from __future__ import annotations

from hotplug.core.extension.points import Extension


def everything() -> Extension:
    """All that an engine may use. Imports torch."""
    from hotplug.core.models.families import CONFIG_READERS, MODELS
    from hotplug.core.ops.builtin import builtin_ops
    from hotplug.core.scheduler.policy import POLICIES

    brought = parsers()
    return Extension(
        models=MODELS,
        config_readers=CONFIG_READERS,
        ops=builtin_ops(),
        scheduling=POLICIES,
        tool_parsers=brought.tool_parsers,
        reasoning_parsers=brought.reasoning_parsers,
    )


def parsers() -> Extension:
    """All that a server may use. Imports no torch."""
    from hotplug.core.text.parsers import REASONING_PARSERS, TOOL_PARSERS

    return Extension(tool_parsers=TOOL_PARSERS, reasoning_parsers=REASONING_PARSERS)
