"""The toy machine: runs a list of instructions over registers, on the host."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from operator import getitem
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = {
    "register": lambda value: _Register(value),
    "float": float,
    "dtype": lambda name: getattr(torch, name),
    "layout": lambda name: getattr(torch, name),
    "memory_format": lambda name: getattr(torch, name),
    "device": torch.device,
}


class _Register(int):
    """A register's number, unlike a plain one."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """The machine's own instruction for the gate of a feed-forward layer: [num_tokens, 2n] to [num_tokens, n]."""
    n = gate_up.shape[-1] // 2
    return F.silu(gate_up.narrow(-1, 0, n)) * gate_up.narrow(-1, n, n)


def load(artifact: Path, weights: Mapping[str, Tensor]) -> Callable[..., list[Tensor]]:
    """The step that machine code describes, on these weights; see `StepProgram` for its inputs and outputs."""
    code = json.loads(artifact.read_text())
    constants = {int(register): weights[name] for register, name in code["weights"].items()}
    program = [
        (_function(i["op"]), _decoded(i["args"]), {k: _decoded(v) for k, v in i["kwargs"].items()}, i["to"], i["free"])
        for i in code["code"]
    ]

    def step(*inputs: Tensor) -> list[Tensor]:
        registers: dict[int, Any] = dict(constants)
        registers.update(zip(code["inputs"], inputs, strict=True))
        for function, args, kwargs, to, free in program:
            registers[to] = function(*_values(args, registers), **kwargs)
            for register in free:
                del registers[register]
        return [registers[register] for register in code["outputs"]]

    return step


def _function(name: str) -> Callable[..., Any]:
    if name == "item":
        return getitem
    if name == "silu_mul":
        return silu_mul
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _decoded(operand: Any) -> Any:
    if isinstance(operand, dict):
        ((kind, value),) = operand.items()
        return KINDS[kind](value)
    return [_decoded(item) for item in operand] if isinstance(operand, list) else operand


def _values(operands: list[Any], registers: dict[int, Any]) -> list[Any]:
    return [
        registers[o] if isinstance(o, _Register) else _values(o, registers) if isinstance(o, list) else o
        for o in operands
    ]
