"""A step's program as a recipe: its calls in order, as plain data that a file can hold, without any weight.

A value is a number: an input, a weight or the result of a call. What makes a graph of a recipe is `build`; what keeps
recipes is `store`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from hotplug.platforms.cpu.openvino.rows import hoist_selection
from hotplug.vendor import PlatformError

_RESHAPES = {"aten::view", "aten::reshape", "aten::flatten.using_ints", "aten::unsqueeze", "aten::_unsafe_view"}
_SAME = {"aten::to.dtype", "aten::_to_copy", "aten::contiguous", "aten::clone", "aten::alias"}
"""Their result is their first argument, where it has the dtype already."""


@dataclass(frozen=True, slots=True)
class Value:
    """A reference to a value, among the arguments of a call."""

    number: int


@dataclass(frozen=True, slots=True)
class Call:
    """One operation."""

    op: str
    """`hotplug::<op>`, or an operation of aten with its overload."""
    site: str
    """The call site of an op of hotplug, else what the program calls the result."""
    args: Sequence[Any]
    """Values, numbers, strings, None, and lists of them."""
    result: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """All of a step."""

    inputs: Sequence[int]
    """Values of the step's inputs, caches included, in order."""
    weights: dict[int, str]
    """Names of the weights that calls read, by value."""
    calls: Sequence[Call]
    hidden: int
    logits: int


def recipe_of(exported: torch.export.ExportedProgram, known: frozenset[str]) -> Recipe:
    """The recipe of a program of varying sizes, whose operations are `known` ones and reshapes.

    Raises PlatformError for another operation, with its call site.
    """
    graph = exported.graph_module.graph
    hoist_selection(graph)
    signature = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    numbers: dict[fx.Node, int] = {}
    inputs, weights, calls = [], {}, []
    for node in graph.nodes:
        if node.op == "output":
            hidden, logits, *_ = node.args[0]
            break
        numbers[node] = len(numbers)
        if node.op == "placeholder":
            spec = signature[node.name]
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(numbers[node])
            elif node.users:
                weights[numbers[node]] = str(spec.target)
        elif _same(node):
            numbers[node] = numbers[node.args[0]]  # type: ignore[index]
        elif node.users and not isinstance(node.meta.get("val"), int | torch.SymInt):
            calls.append(_call(node, numbers, known))
    return Recipe(inputs, weights, calls, numbers[hidden], numbers[logits])


def _call(node: fx.Node, numbers: dict[fx.Node, int], known: frozenset[str]) -> Call:
    name = _name(node)
    site, args = node.name, list(node.args)
    if name.startswith("hotplug::"):
        *args, site = args
    if name in _RESHAPES:
        name, args = "reshape", [node.args[0], _shape(node)]
    elif name not in known or node.kwargs:
        raise PlatformError(f"no translation of {name} to OpenVINO", where=site, hint="Use --exec eager.")
    return Call(name, str(site), [_plain(arg, numbers, node) for arg in args], numbers[node])


def _same(node: fx.Node) -> bool:
    return _name(node) in _SAME and node.meta["val"].dtype is node.args[0].meta["val"].dtype  # type: ignore[union-attr]


def _name(node: fx.Node) -> str:
    """`hotplug::linear`, `aten::add.Tensor`, `getitem`."""
    target: Any = node.target
    return target.name() if isinstance(target, torch._ops.OpOverload) else str(getattr(target, "__name__", target))


def _shape(node: fx.Node) -> list[int]:
    """The shape of a reshape's result: 0 for a size that varies and is the source's at the same place, else -1."""
    source, result = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    sizes = []
    for place, size in enumerate(result):
        if isinstance(size, int):
            sizes.append(size)
        else:
            sizes.append(0 if place < len(source) and str(source[place]) == str(size) else -1)
    if sizes.count(-1) > 1 or 0 in [size for size in result if isinstance(size, int)]:
        raise PlatformError(f"no translation of a reshape from {list(source)} to {list(result)}", where=node.name)
    return sizes


def _plain(arg: Any, numbers: dict[fx.Node, int], node: fx.Node) -> Any:
    if isinstance(arg, fx.Node):
        return Value(numbers[arg])
    if isinstance(arg, list | tuple):
        return [_plain(each, numbers, node) for each in arg]
    if arg is None or isinstance(arg, str | int | float):
        return arg
    if isinstance(arg, torch.dtype):
        return str(arg).removeprefix("torch.")
    raise PlatformError(f"no translation of the argument {arg!r} of {node.target}", where=node.name)
