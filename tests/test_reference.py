"""An op's reference at a call site: which parameters are static, and that binding them changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hotplug.core.ops.builtin import builtin_ops, builtin_registry
from hotplug.core.ops.collective import OPS as COLLECTIVES
from hotplug.core.ops.compare import leaves
from hotplug.core.ops.plan import Plan
from hotplug.core.ops.reference import (
    all_arguments,
    bound_reference,
    call_parameters,
    parameters,
    static_parameters,
    with_constants,
    without_constants,
)
from hotplug.core.ops.registry import Op
from hotplug.core.platform.base import KVLayout, Limits
from hotplug.plugins.conformance.cases import Builder
from hotplug.plugins.conformance.check_ops import to
from hotplug.plugins.conformance.grid import call_sites

OPS = [op for op in builtin_ops() if op not in COLLECTIVES]
FACTS = Limits(dtypes=("float32",), kv_layouts=(KVLayout.NHD, KVLayout.HND))
HOST = torch.device("cpu")


def tensors(*values: Any) -> list[Tensor]:
    return [tensor for value in values for _, tensor in leaves("", value)]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_reference_that_a_plan_binds_is_the_reference_called_with_constants(op: Op) -> None:
    plan = Plan(builtin_registry(), arch="any", force=("*=reference",))
    dtype = "int" if op.name in ("prepare_inputs", "prepare_step", "reject_sample") else "float32"
    for i, facts in enumerate(call_sites(op.name, FACTS, quick=True)):
        fn = plan.bind(op.name, f"site.{i}", dtype, **facts)
        call = Builder("float32", "int64", seed=i).call(op.name, facts, [(1, 9), (3, 3)], view=True)
        assert call is not None
        given, kept = ([to(arg, HOST) for arg in call.args] for _ in range(2))
        found, expected = fn(*given), op.reference(*all_arguments(op, kept, facts))
        for ours, theirs in zip(tensors(found, given), tensors(expected, kept), strict=True):
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("op", builtin_ops(), ids=lambda op: op.name)
def test_static_parameters_are_no_tensors_and_have_a_fact(op: Op) -> None:
    hints = {name: op.reference.__annotations__[name] for name in parameters(op)}
    named = {name for name in parameters(op) if name in op.facts}
    assert static_parameters(op) == {name for name in named if "Tensor" not in hints[name]}
    numbers = {name for name, hint in hints.items() if hint in ("float", "bool", "str", "float | None", "int | None")}
    assert numbers <= static_parameters(op)


def scaled(x: Tensor, factor: float, bias: Tensor | None, note: str = "") -> tuple[Tensor, str]:
    return x * factor if bias is None else x * factor + bias, note


SCALED = Op("scaled", scaled, facts=("factor", "bias", "width"))


def test_a_tensor_of_a_facts_name_is_passed_in_each_call() -> None:
    assert static_parameters(SCALED) == {"factor"}
    assert call_parameters(SCALED) == ("x", "bias", "note")


def test_constants_take_their_places_among_the_arguments() -> None:
    def positional(first: Any, second: Any, third: Any, fourth: Any) -> list[Any]:
        """Its names are not the reference's."""
        return [first, second, third, fourth]

    facts = {"factor": 2.0, "bias": False, "width": 4}
    assert with_constants(SCALED, positional, facts)("x", None, "n") == ["x", 2.0, None, "n"]
    assert without_constants(SCALED, lambda *args: args)("x", 2.0, None, "n") == ("x", None, "n")


def test_arguments_that_a_call_leaves_out_have_the_references_defaults() -> None:
    assert all_arguments(SCALED, ("x", None), {"factor": 3.0}) == ("x", 3.0, None, "")


def test_an_op_without_static_parameters_is_called_as_it_is() -> None:
    op = next(op for op in builtin_ops() if op.name == "linear")
    assert bound_reference(op, {"in_features": 1, "out_features": 1, "bias": False, "scheme": "none"}) is op.reference
