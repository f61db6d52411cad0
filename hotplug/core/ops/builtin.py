"""The ops that every engine starts with."""

from __future__ import annotations

from hotplug.core.ops import (
    attention,
    block_copy,
    collective,
    dense,
    inputs,
    moe,
    norm,
    packed_linear,
    rope,
    rope_kv_write,
    sampling,
)
from hotplug.core.ops.registry import Op, OpRegistry


def builtin_ops() -> tuple[Op, ...]:
    """Every built-in op."""
    modules = (
        dense,
        norm,
        rope,
        attention,
        rope_kv_write,
        block_copy,
        moe,
        inputs,
        sampling,
        packed_linear,
        collective,
    )
    return tuple(op for module in modules for op in module.OPS)


def builtin_registry() -> OpRegistry:
    """A fresh registry with every built-in op and no kernel."""
    return OpRegistry(builtin_ops())
