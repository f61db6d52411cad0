"""Ops as opaque nodes of a `torch.export` program: `hotplug::rms_norm(x, weight, eps, site)`.

A node has all of the op's parameters, static ones too, and its call site's name, writes to nothing, and computes the
op's reference: whoever compiles a program may claim nodes by op or site, inline others, or run them as they are.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from hotplug.core.errors import PlanError
from hotplug.core.ops.reference import all_arguments
from hotplug.core.ops.registry import Fact, Fn, Op

NAMESPACE = "hotplug"
_LIBRARY: Any = cast("Any", torch.library).Library(NAMESPACE, "FRAGMENT")  # untyped in torch
_PLAIN = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", int | None: "int?", float: "float",
          float | None: "float?", bool: "bool", str: "str"}  # fmt: skip
_defined: dict[str, _Node] = {}


@dataclasses.dataclass(slots=True)
class _Node:
    """An op as torch knows it."""

    schema: str
    reference: Fn
    """Called with the arguments of the node, site left out."""
    overload: Any


def node(op: Op) -> Any:
    """The `torch._ops.OpOverload` of an op. Raises PlanError where its signature cannot stand in a program."""
    reference = op.functional or op.reference
    schema = _schema(op.name, reference)
    known = _defined.get(op.name)
    if known is None:
        _LIBRARY.define(schema)
        overload = getattr(getattr(torch.ops, NAMESPACE), op.name).default
        known = _defined[op.name] = _Node(schema, _flat(reference), overload)
        _register(op.name, known, op.outline)
    elif known.schema != schema:
        raise PlanError("another op of this name, with other parameters, is in use in this process", where=op.name)
    known.reference = _flat(reference)
    return known.overload


def as_node(op: Op, site: str, facts: Mapping[str, Fact]) -> Fn:
    """The callable of a call site that leaves a node in the program being traced.

    A node has all parameters of its op: static ones from the site's facts, those that a call leaves out with their
    defaults.
    """
    overload = node(op)

    def call(*args: Any) -> Any:
        return overload(*flatten(all_arguments(op, args, facts)), site)

    return call


def references(ops: Iterable[Op], keep: Collection[str]) -> Mapping[Any, Callable[..., Any]]:
    """A decomposition table that replaces nodes by their references, but for those whose site is in `keep`."""

    def inlined(known: _Node) -> Callable[..., Any]:
        def reference(*args: Any) -> Any:
            return NotImplemented if args[-1] in keep else known.reference(*args[:-1])

        return reference

    table = {}
    for op in ops:
        overload = node(op)
        table[overload] = inlined(_defined[op.name])
    return table


def flatten(args: Iterable[Any]) -> list[Any]:
    """Arguments of an op as arguments of its node: a dataclass gives its fields that a program has."""
    flat: list[Any] = []
    for arg in args:
        flat += [getattr(arg, name) for name in _node_fields(type(arg))] if dataclasses.is_dataclass(arg) else [arg]
    return flat


def _register(name: str, known: _Node, outline: Fn | None) -> None:
    def run(*args: Any) -> Any:
        result = known.reference(*args[:-1])
        inputs = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        # A node's results are its own memory, whatever the reference returns.
        return tree_map_only(Tensor, lambda t: t.clone() if t.untyped_storage()._cdata in inputs else t, result)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    fake = run if outline is None else lambda *args: outline(*args[:-1])
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def _schema(name: str, reference: Fn) -> str:
    hints = typing.get_type_hints(reference)
    parameters = []
    for parameter in inspect.signature(reference).parameters:
        hint = hints.get(parameter)
        if hint in _PLAIN:
            parameters.append(f"{_PLAIN[hint]} {parameter}")
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and hasattr(hint, "NODE_FIELDS"):
            fields = typing.get_type_hints(hint)
            parameters += [f"{_PLAIN[fields[field]]} {field}" for field in _node_fields(hint)]
        else:
            raise PlanError(f"its parameter {parameter} ({hint}) cannot stand in a compiled program", where=name,
                            hint="Use tensors, numbers and strings, or run with --exec eager.")  # fmt: skip
    return f"{name}({', '.join(parameters)}, str site) -> {_returns(name, hints.get('return'))}"


def _returns(name: str, hint: Any) -> str:
    if hint is Tensor:
        return "Tensor"
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and parts and all(part is Tensor for part in parts):
        return f"({', '.join(['Tensor'] * len(parts))})"
    raise PlanError(f"its result ({hint}) cannot stand in a compiled program", where=name,
                    hint="Return a tensor or a tuple of tensors, or run with --exec eager.")  # fmt: skip


def _node_fields(cls: Any) -> tuple[str, ...]:
    return cast("tuple[str, ...]", cls.NODE_FIELDS)


def _flat(reference: Fn) -> Fn:
    """The reference, called with a node's arguments."""
    hints = typing.get_type_hints(reference)
    kinds = [hints[name] for name in inspect.signature(reference).parameters]

    def call(*args: Any) -> Any:
        given, rest = [], list(args)
        for kind in kinds:
            if kind in _PLAIN:
                given.append(rest.pop(0))
            else:
                count = len(_node_fields(kind))
                given.append(kind.from_node(*rest[:count]))
                del rest[:count]
        return reference(*given)

    return call
