"""Select rows early: a step keeps few of its tokens' hidden states, so the last layer need not finish the others.

An operation that computes each row by itself gives the same for selected rows as its selected result, so the selection
moves up before it, as far as nothing else reads the rows left out: to the last attention.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

_INDEX = torch.ops.aten.index.Tensor

ROW_WISE = {
    "hotplug::rms_norm": (0,), "hotplug::add_rms_norm": (0, 1), "hotplug::linear": (0,), "hotplug::linear_packed": (0,),
    "hotplug::silu_mul": (0,), "hotplug::gelu_tanh_mul": (0,), "hotplug::linear_silu_mul": (0,),
    "hotplug::linear_packed_silu_mul": (0,),
    "aten::add.Tensor": (0, 1),
    "aten::flatten.using_ints": (0,),
}  # fmt: skip
"""Operations that compute row by row, and which of their arguments have the rows."""


def hoist_selection(graph: fx.Graph) -> None:
    """Move each `index(x, [rows])` of a graph as far up as it saves work."""
    selected: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    while True:
        selections = [node for node in graph.nodes if _selects_rows(node)]
        movable = next((node.args[0] for node in selections if _movable(node.args[0], node.args[1][0])), None)
        if movable is None:
            return
        rows = next(iter(movable.users)).args[1][0]
        _move(graph, movable, rows, selected)


def _selects_rows(node: fx.Node) -> bool:
    return node.target is _INDEX and len(node.args[1]) == 1  # type: ignore[arg-type]


def _movable(source: Any, rows: fx.Node) -> bool:
    """Whether what computes `source` is row-wise and no one reads rows that are not selected."""
    if source.op != "call_function":
        return False
    if source.target is getitem:
        made = source.args[0]
        users = [user for part in made.users for user in part.users]
        return _rows_of(made) is not None and all(_selects(user, rows) for user in users)
    return _rows_of(source) is not None and all(_selects(user, rows) for user in source.users)


def _selects(user: fx.Node, rows: fx.Node) -> bool:
    return _selects_rows(user) and user.args[1][0] is rows  # type: ignore[index]


def _rows_of(node: fx.Node) -> tuple[int, ...] | None:
    target: Any = node.target
    name = target.name() if isinstance(target, torch._ops.OpOverload) else ""
    if name == "aten::flatten.using_ints" and node.args[1:2] == (0,):
        return None
    if name == "aten::add.Tensor" and not all(_full(arg, node) for arg in node.args[:2]):
        return None
    return ROW_WISE.get(name)


def _full(arg: Any, node: fx.Node) -> bool:
    """Whether an operand has all rows, and is not broadcast over them."""
    return isinstance(arg, fx.Node) and arg.meta["val"].shape == node.meta["val"].shape


def _move(graph: fx.Graph, source: fx.Node, rows: fx.Node, selected: dict[tuple[fx.Node, fx.Node], fx.Node]) -> None:
    """Put what computes `source` behind selections of its arguments, which `selected` remembers."""
    made: Any = source.args[0] if source.target is getitem else source
    args = list(made.args)
    for place in _rows_of(made) or ():
        key = (args[place], rows)
        if key not in selected:
            with graph.inserting_after(args[place]):
                selected[key] = graph.call_function(_INDEX, (args[place], [rows]))
            selected[key].meta["val"] = _selected(args[place].meta["val"], rows)
        args[place] = selected[key]
    with graph.inserting_before(made.next):
        call = graph.call_function(made.target, tuple(args), made.kwargs)
    call.meta["val"] = _selected(made.meta["val"], rows)
    parts = [made] if made is source else list(made.users)
    for part in parts:
        result = call
        if part is not made:
            with graph.inserting_before(part):
                result = graph.call_function(getitem, (call, part.args[1]))
            result.meta["val"] = _selected(part.meta["val"], rows)
        for use in list(part.users):
            use.replace_all_uses_with(result)
            graph.erase_node(use)
        if part is not made:
            graph.erase_node(part)
    graph.erase_node(made)


def _selected(value: Any, rows: fx.Node) -> Any:
    """What is known of a result, or of several, with as many rows as are selected."""
    if isinstance(value, tuple | list):
        return tuple(_selected(each, rows) for each in value)
    return value.new_empty((*rows.meta["val"].shape, *value.shape[1:]))
