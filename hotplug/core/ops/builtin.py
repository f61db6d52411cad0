"""The ops that every engine starts with."""

from __future__ import annotations

from hotplug.core.ops import attention, dense, inputs, norm, rope, rope_kv_write, sampling
from hotplug.core.ops.registry import Op, OpRegistry


def builtin_ops() -> tuple[Op, ...]:
    """Every built-in op."""
    return tuple(op for module in (dense, norm, rope, attention, rope_kv_write, inputs, sampling) for op in module.OPS)


def builtin_registry() -> OpRegistry:
    """A fresh registry with every built-in op and no kernel."""
    return OpRegistry(builtin_ops())
