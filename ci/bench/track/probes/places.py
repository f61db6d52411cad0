"""Where a name of hotplug is, in the trees that may be measured: modules move, and the probes of today measure all."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class CannotError(Exception):
    """A figure cannot be measured on this tree; the message says why."""


def find(name: str, *modules: str) -> Any:
    """`name` from the first of these modules that has it. Raises CannotError."""
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise CannotError(f"{name} is in none of {', '.join(modules)}")


def attribute(owner: object, *names: str) -> Any:
    """The first of these attributes that there is. Raises CannotError."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise CannotError(f"{type(owner).__name__} has none of {', '.join(names)}")


def first(*paths: str) -> Any:
    """What the first of these dotted paths, `module.name`, that exists leads to. Raises CannotError."""
    for path in paths:
        module, _, name = path.rpartition(".")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise CannotError(f"none of {', '.join(paths)} exists")
