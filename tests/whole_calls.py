"""Kernels as functions of all parameters of their ops' references, so that a test calls both alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.reference import bound_reference, static_parameters
from hotplug.core.ops.registry import Fact, Fn, Impl, SiteSpec

_OPS = builtin_registry()


def whole(op: str, make: Callable[[SiteSpec], Fn], **facts: Fact) -> Fn:
    """Makes the kernel for the static ones of the arguments, and other `facts`, and calls it with the others."""
    definition = _OPS.op(op)
    static, signature = static_parameters(definition), inspect.signature(definition.reference)

    def call(*args: Any, **more: Any) -> Any:
        bound = signature.bind(*args, **more)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name in static}
        kernel = make(SiteSpec(op, "test", "float32", "any", {**facts, **given}))
        return kernel(*(value for name, value in bound.arguments.items() if name not in static))

    return call


def reference_kernel(op: str, provider: str, **options: Any) -> Impl:
    """A kernel that computes what the op's reference does."""
    return Impl(op, provider, make=lambda spec: bound_reference(_OPS.op(op), spec.facts), **options)
