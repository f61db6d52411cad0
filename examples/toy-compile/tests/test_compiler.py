"""Lowering and running small programs."""

import json
from types import SimpleNamespace

import pytest
import torch
from toy_compile import compiler, machine

from hotplug.vendor import PlatformError


class Double(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 4), requires_grad=False)

    def forward(self, x, rows):
        gate = torch.ops.hotplug.silu_mul(x @ self.weight.t(), "layers.0.act")
        return gate[rows], torch.cat((gate, gate), dim=-1).masked_fill(rows.unsqueeze(1) > 1, float("-inf"))


def program(module, *inputs):
    exported = torch.export.export(module, inputs, strict=False)
    return SimpleNamespace(inlined=lambda: exported, weights=dict(module.named_parameters()))


@pytest.fixture(autouse=True)
def nodes():
    """Defines the opaque nodes, as an engine does."""
    from hotplug.core.ops.dense import OPS
    from hotplug.core.ops.program import node

    for op in OPS:
        node(op)


def test_machine_code_computes_what_the_program_does(tmp_path):
    module, x, rows = Double(), torch.randn(3, 4), torch.tensor([2, 0, 1], dtype=torch.int32)
    artifact = tmp_path / "step.json"
    compiler.save(compiler.lower(program(module, x, rows)), artifact)
    step = machine.load(artifact, dict(module.named_parameters()))
    for given in (x, torch.randn(3, 4)):
        torch.testing.assert_close(step(given, rows), list(module(given, rows)))
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]


def test_registers_are_freed_after_their_last_read():
    module, x, rows = Double(), torch.randn(3, 4), torch.zeros(3, dtype=torch.int32)
    code = compiler.lower(program(module, x, rows))
    written = {i["to"] for i in code["code"]}
    freed = [r for i in code["code"] for r in i["free"]]
    assert sorted(freed) == sorted(written - set(code["outputs"]))
    json.dumps(code)


@pytest.mark.parametrize(
    ("function", "x", "fault"),
    [
        (lambda x: x + 1, torch.zeros(2, dtype=torch.int64), "has no torch.int64"),
        (lambda x: x.double() * 2, torch.zeros(2), "has no torch.float64"),
        (lambda x: x.add_(1), torch.zeros(2), "writes to no operand"),
        (lambda x: torch.ops.hotplug.linear(x, x, None, "head"), torch.zeros(2, 2), "has no such instruction"),
    ],
)
def test_what_the_machine_has_not_is_refused_by_name(function, x, fault):
    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(PlatformError, match=fault):
        compiler.lower(program(Module(), x))
