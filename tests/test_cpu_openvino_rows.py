"""Selections of rows move up to where they save work, and no further."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hotplug.core.ops.builtin import builtin_registry
from hotplug.core.ops.program import as_node
from hotplug.platforms.cpu.openvino.rows import hoist_selection

OPS = builtin_registry()
NORM = as_node(OPS.op("rms_norm"), "norm", {"eps": 1e-6})
ADD_NORM = as_node(OPS.op("add_rms_norm"), "add_norm", {"eps": 1e-6})
LINEAR = as_node(OPS.op("linear"), "linear", {})


class Tail(nn.Module):
    """The end of a model: a product, the sum with the residual, its norm, and rows of that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor, residual: Tensor, rows: Tensor) -> Tensor:
        residual = NORM(residual, self.scale, 1e-5)  # read twice: by what is selected, and by the product as a whole
        normed, total = ADD_NORM(LINEAR(x * residual, self.weight, None), residual, self.scale, 1e-5)
        return NORM(total, self.scale, 1e-5)[rows] + normed[rows]


def traced() -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    inputs = (torch.randn(6, 8), torch.randn(6, 8), torch.tensor([4, 0]))
    with torch.no_grad():
        return torch.export.export(Tail(), inputs), inputs


def calls(graph: torch.fx.Graph) -> list[tuple[str, int]]:
    """Operations of hotplug, and how many rows each gives."""
    return [(n.args[-1], len(v[0] if isinstance(v := n.meta["val"], tuple | list) else v))
            for n in graph.nodes if "hotplug" in str(n.target)]  # fmt: skip


def test_what_computes_row_by_row_computes_the_selected_rows_alone() -> None:
    program, _ = traced()
    hoist_selection(program.graph)
    assert calls(program.graph) == [("norm", 6), ("linear", 2), ("add_norm", 2), ("norm", 2)]


def test_the_result_is_the_same() -> None:
    program, inputs = traced()
    expected = program.module()(*inputs)
    hoist_selection(program.graph)
    program.graph.lint()
    program.graph_module.recompile()
    torch.testing.assert_close(program.module()(*inputs), expected)
