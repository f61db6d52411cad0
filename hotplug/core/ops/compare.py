"""Comparing what a kernel gave with what its op's reference gives: tolerances by dtype, and the worst element.

Tensors are compared on the host in float64. What is *fed* to both sides is the caller's business; see
`hotplug.core.tools.bisect`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotplug.core.ops.registry import SiteSpec

TOLERANCES = {
    "float64": 1e-9,
    "float32": 2e-4,
    "float16": 1e-2,
    "bfloat16": 4e-2,
    "float8_e4m3fn": 0.25,
    "fp8_e4m3": 0.25,
    "int8": 4e-2,
    "int8_gated": 8e-2,
}
"""How far a result may be off, as a share of the element's own size plus the root mean square of its row.

A product's error grows with its row, not with the element, so the row counts: an element near zero among large
ones may be off by more than its own size. About a thousand units in the last place for float32, where kernels
differ in the order of long sums; five to ten for the narrow dtypes, where they differ in what is rounded when.
Integers and booleans must be equal. "int8" is for products whose kernels round to eight bits what they multiply with,
and "int8_gated" for one such result times another, where the error of each counts as often as the other is large.
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor against its reference."""

    excess: float
    """The largest error over what is allowed: above 1 is a divergence."""
    max_abs: float = 0.0
    max_rel: float = 0.0
    wrong: int = 0
    """Elements beyond tolerance."""
    total: int = 0
    reason: str = ""
    """What is wrong, in words; empty where all is well."""

    @property
    def ok(self) -> bool:
        return self.excess <= 1.0


def compare(actual: Tensor, expected: Tensor, *, through: Sequence[str] = ()) -> Comparison:
    """Compare `actual` with `expected`; `through` names dtypes that values went through beside the tensors' own."""
    if actual.shape != expected.shape:
        return _unlike(expected, f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    if actual.dtype != expected.dtype:
        return _unlike(expected, f"dtype {_name(actual.dtype)} instead of {_name(expected.dtype)}")
    if not expected.numel():
        return Comparison(0.0)
    exact = not expected.is_floating_point()
    share = 0.0 if exact else max(TOLERANCES.get(name, 0.0) for name in (_name(expected.dtype), *through))
    got, want = _wide(actual), _wide(expected)
    row = want.nan_to_num(0.0, 0.0, 0.0).square().mean(-1, keepdim=True).sqrt() if want.dim() else want.abs()
    allowed = share * (want.abs() + row) + share * 1e-6  # a row of zeros may be off by what nobody can see
    error = (got - want).abs()
    same = (got == want) | (got.isnan() & want.isnan())
    error = error.masked_fill(same, 0.0).nan_to_num(math.inf, math.inf, math.inf)
    ratio = torch.where(error > 0, error / allowed.nan_to_num(0.0, 0.0, 0.0), 0.0).nan_to_num(math.inf, math.inf)
    relative = torch.where(error > 0, error / want.abs(), 0.0).nan_to_num(math.inf, math.inf)
    wrong = int((ratio > 1.0).sum())
    return Comparison(
        excess=float(ratio.max()),
        max_abs=float(error.max()),
        max_rel=float(relative.max()),
        wrong=wrong,
        total=expected.numel(),
        reason=_worst(actual, expected, ratio, wrong) if wrong else "",
    )


def leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a value, a tuple, or a dataclass, each with a name to report it by."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from leaves(f"{name}[{i}]", item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(f"{name}.{field.name}", getattr(value, field.name))


_ROUNDED = {"linear_packed": "int8", "logits_packed": "int8", "linear_packed_silu_mul": "int8_gated"}
"""Ops whose kernels may round what they multiply with."""


def dtypes_through(spec: SiteSpec) -> tuple[str, ...]:
    """The dtypes that values of a call site go through, beside the tensors' own: `through` of `compare`."""
    return (spec.dtype, str(spec.facts.get("kv_dtype", "")), _ROUNDED.get(spec.op, ""))


def describe(value: Any) -> list[str]:
    """Dtype and shape of every tensor in `value`: `["float32[5, 64]"]`."""
    return [f"{_name(t.dtype)}{list(t.shape)}" for _, t in leaves("", value)]


def _unlike(expected: Tensor, reason: str) -> Comparison:
    count = expected.numel()
    return Comparison(math.inf, math.inf, math.inf, count, count, reason)


def _worst(actual: Tensor, expected: Tensor, ratio: Tensor, wrong: int) -> str:
    at = int(ratio.flatten().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), expected.shape)]
    got, want = (t.reshape(-1)[at].to(torch.float64).item() for t in (actual.cpu(), expected.cpu()))
    return f"{wrong} of {expected.numel()} elements, the worst at {index}: {got:.6g} instead of {want:.6g}"


def _wide(x: Tensor) -> Tensor:
    return x.detach().to("cpu").to(torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
