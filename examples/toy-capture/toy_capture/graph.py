"""A recorded step: PyTorch operations on fixed memory, replayed in order without making a tensor.

An operation's result keeps the memory it got while recording; replaying writes there through the operation's
`out` form. Views need no replay, since they look at memory that does not move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hotplug.vendor import PlatformError
from toy_capture.device import NAME, memory

HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal"}
"""Operations whose result, or its shape, the host must read: a replay could not follow it."""


@dataclass
class Graph:
    """Calls to make, in order."""

    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def replay(self) -> None:
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def record(step: Callable[[], Any]) -> Graph:
    """Run `step` once and keep what it did. Raises PlatformError for what cannot be replayed."""
    recorder = _Recorder()
    with recorder:
        step()
    return recorder.graph


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in HOST_READS or (name == "index" and _has_mask(args)):
            raise PlatformError(f"{name} reads the device from the host, which a recorded step cannot repeat",
                                where="toy_capture", hint="Use a formulation of fixed shape.")  # fmt: skip
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # made of other operations: record those
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.graph.calls.append((func, args, kwargs))
        elif not _aliases(result, (args, kwargs)):
            out, names = _out_form(func)
            results = result if isinstance(result, tuple | list) else (result,)
            self.graph.calls.append((out, args, {**kwargs, **dict(zip(names, results, strict=True))}))
        return result


def _has_mask(args: Any) -> bool:
    """Whether an indexing picks by truth: then how much it picks is known only by looking."""
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:]))


def _aliases(result: Any, inputs: Any) -> bool:
    """Whether the result looks at the memory of an input (or holds none at all)."""
    known = {memory(t) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.device.type == NAME}
    made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.numel()]
    return all(memory(t) in known for t in made)


def _out_form(func: Any) -> tuple[Any, list[str]]:
    """The overload of an operation that writes to given tensors, and the names of these arguments."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        arguments = overload._schema.arguments
        names = [a.name for a in arguments if a.is_out]
        taken = [(a.name, str(a.type)) for a in arguments if not a.is_out]
        if names and [a for a in wanted if a in taken] == taken:
            return _only(overload, {name for name, _ in taken}), names
    raise PlatformError(f"{func} has no form that writes to given memory", where="toy_capture")


def _only(overload: Any, taken: set[str]) -> Callable[..., Any]:
    """The overload, called without the keywords it does not know (dtype, device: its out tensor has them)."""
    outs = {a.name for a in overload._schema.arguments if a.is_out}

    def call(*args: Any, **kwargs: Any) -> Any:
        return overload(*args, **{k: v for k, v in kwargs.items() if k in taken or k in outs})

    return call
