"""Kernels as opaque calls of a compiled step: `hotplug_kernels::<op>(..., kernel)`, torch.library operators.

An operator has the parameters of the program's node, with the name of a kernel in place of the call site's. One that
writes to its arguments says so in its schema, so that the compiler orders reads after it and copies nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hotplug.vendor import AttentionInputs, PlatformError

NAMESPACE = "hotplug_kernels"
WRITTEN: Mapping[str, tuple[str | None, ...]] = {
    "kv_write": ("k_cache", "v_cache"),
    "rope_kv_write": (None, "k_cache", "v_cache"),
    "qk_norm_rope_kv_write": (None, "k_cache", "v_cache"),
}
"""Ops whose kernels write in place: for each result of the node the parameter that it is, None for a new tensor."""

_LIBRARY: Any = cast("Any", torch.library).Library(NAMESPACE, "FRAGMENT")  # untyped in torch
_kernels: dict[str, Callable[..., Any]] = {}
_schemas: dict[str, str] = {}


def schema_of(node: Any) -> str:
    """The schema of the operator that stands for a node (`torch._ops.OpOverload`) of a step program."""
    schema = str(node._schema)
    name = schema[schema.index("::") + 2 : schema.index("(")]
    parameters, result = re.fullmatch(r"[^(]*\((.*), str site\) -> (.*)", schema).groups()  # type: ignore[union-attr]
    results = WRITTEN.get(name)
    if results is not None:
        for i, parameter in enumerate(filter(None, results)):
            parameters, found = re.subn(rf"\bTensor {parameter}\b", f"Tensor(a{i}!) {parameter}", parameters)
            assert found == 1, f"{name} has no tensor {parameter}"
        new = ["Tensor"] * len(new_results(name))
        result = new[0] if len(new) == 1 else f"({', '.join(new)})"
    return f"{name}({parameters}, str kernel) -> {result}"


def new_results(name: str) -> list[int]:
    """Which results of an op that writes in place are new tensors: what its operator returns, in this order."""
    return [i for i, parameter in enumerate(WRITTEN[name]) if parameter is None]


def operator(schema: str) -> Any:
    """The operator of a schema, defined on first use. Raises PlatformError where another of its name is in use."""
    name = schema[: schema.index("(")]
    known = _schemas.get(name)
    if known is None:
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        _LIBRARY.impl(name, _runs(name, schema), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fakes(name), lib=_LIBRARY)
        _schemas[name] = schema
    elif known != schema:
        raise PlatformError("another operator of this name is in use in this process", where=name,
                            why=f"{known} is not {schema}")  # fmt: skip
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def provide(name: str, kernel: Callable[..., Any]) -> None:
    """Let operators call `kernel` under `name`."""
    _kernels[name] = kernel


def _runs(name: str, schema: str) -> Callable[..., Any]:
    parameters = re.findall(r"(\w+)(?:,|\))", schema[: schema.index(" -> ")])[:-1]
    begin = _fields(parameters)

    def run(*args: Any) -> Any:
        kernel, given = _kernels[args[-1]], list(args[:-1])
        if begin is not None:
            end = begin + len(AttentionInputs.NODE_FIELDS)
            given[begin:end] = [AttentionInputs.from_node(*given[begin:end])]
        result = kernel(*given)
        return _own(_returned(name, result), args)

    return run


def _returned(name: str, result: Any) -> Any:
    """What the operator returns of a kernel's result: all of it, or the new tensors where it writes in place."""
    if name not in WRITTEN:
        return result
    new = [result[i] for i in new_results(name)]
    return tuple(new) if len(new) > 1 else new[0] if new else None


def _fields(parameters: list[str]) -> int | None:
    """Where the fields of `AttentionInputs` stand among the parameters."""
    fields = list(AttentionInputs.NODE_FIELDS)
    places = [i for i in range(len(parameters)) if parameters[i : i + len(fields)] == fields]
    return places[0] if places else None


def _own(result: Any, args: tuple[Any, ...]) -> Any:
    """Results as the compiler was told: dense, and no memory of an argument."""
    given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
    return tree_map_only(
        Tensor, lambda t: t.clone() if t.untyped_storage().data_ptr() in given else t.contiguous(), result
    )


def _fakes(name: str) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        result = _returned(name, getattr(torch.ops.hotplug, name)(*args[:-1], ""))
        return tree_map_only(Tensor, lambda t: t.new_empty(t.shape), result)

    return fake
