"""From a step program to the toy machine's code: a list of instructions over numbered registers, as plain JSON.

The machine has float32, int32 and bool tensors of fixed size and no instruction that writes to an operand; a
program that needs anything else is refused, with the operation that does.
"""

from __future__ import annotations

import json
import os
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from hotplug.vendor import PlatformError, StepProgram

DTYPES = {torch.float32, torch.int32, torch.bool}
OWN = {"hotplug::silu_mul": "silu_mul"}
"""Opaque nodes that are one instruction of the machine."""


def lower(program: StepProgram) -> dict[str, Any]:
    """The machine code of a step. Raises PlatformError for what the machine cannot do."""
    exported = program.inlined()
    registers: dict[fx.Node, int] = {}
    nodes = [node for node in exported.graph.nodes if node.op != "output"]
    for node in nodes:
        registers[node] = len(registers)
        _check(node)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    places = [node for node in nodes if node.op == "placeholder"]
    user_inputs = [node for node in places if specs[node.name].kind is InputKind.USER_INPUT]
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    code = [_instruction(node, registers) for node in nodes if node.op == "call_function"]
    return {
        "weights": {registers[n]: specs[n.name].target for n in places if n not in user_inputs and n.users},
        "inputs": [registers[n] for n in user_inputs],
        "outputs": [registers[n] for n in output.args[0]],
        "code": _with_frees(code, keep={registers[n] for n in (*places, *output.args[0])}),
    }


def save(code: dict[str, Any], path: Path) -> None:
    """Write machine code so that another process sees all of it or nothing."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(code))
    part.replace(path)


def _check(node: fx.Node) -> None:
    for value in _tensors(node.meta.get("val")):
        if value.dtype not in DTYPES:
            raise _refused(node, f"has no {value.dtype}")
        if not all(isinstance(size, int) for size in value.shape):
            raise _refused(node, f"has no size that varies, as in {list(value.shape)}")
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable:
            raise _refused(node, "writes to no operand")
        if node.target.namespace != "aten" and node.target.name() not in OWN:
            raise _refused(node, "has no such instruction")


def _refused(node: fx.Node, why: str) -> PlatformError:
    return PlatformError(f"the toy machine {why}", where=f"{node.target} ({node.name})")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []


def _instruction(node: fx.Node, registers: dict[fx.Node, int]) -> dict[str, Any]:
    args, kwargs = node.args, node.kwargs
    if node.target is getitem:
        name = "item"
    elif (name := node.target.name()) in OWN:
        name, args = OWN[name], args[:-1]  # the last argument is the call site
    return {
        "op": name,
        "args": [_operand(a, registers) for a in args],
        "kwargs": {k: _operand(v, registers) for k, v in kwargs.items()},
        "to": registers[node],
    }


def _operand(value: Any, registers: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"register": registers[value]}
    if isinstance(value, tuple | list):
        return [_operand(item, registers) for item in value]
    if isinstance(value, torch.dtype | torch.layout | torch.device | torch.memory_format):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if value == float("-inf"):
        return {"float": "-inf"}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PlatformError(f"the toy machine has no operand like {value!r}")


def _with_frees(code: list[dict[str, Any]], keep: set[int]) -> list[dict[str, Any]]:
    """The instructions, each with the registers that nothing reads after it."""
    seen = set(keep)
    for instruction in reversed(code):
        read = {*_read(instruction["args"]), *_read(list(instruction["kwargs"].values())), instruction["to"]}
        instruction["free"] = sorted(read - seen)
        seen |= read
    return code


def _read(operands: list[Any]) -> set[int]:
    found: set[int] = set()
    for operand in operands:
        if isinstance(operand, dict) and "register" in operand:
            found.add(operand["register"])
        elif isinstance(operand, list):
            found |= _read(operand)
    return found
