"""The toy device: PyTorch tensors of a device type of its own ("toy"), through PyTorch's PrivateUse1 key.

A toy tensor has no memory that PyTorch knows of; its storage remembers a host storage, which only the one kernel here
sees: it runs any operation on the hidden host tensors and hides what comes out. So a host access that is no copy fails
(`numpy`, `item`), and so does an operation that mixes toy and host tensors. Importing this module sets the device up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from hotplug.vendor import PlatformError

NAME = "toy"
HOST = torch.device("cpu")
COPIES = {"_copy_from", "copy_", "_to_copy"}
"""Operations that may see both sides."""
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)  # its as_strided looks at no memory

_setup_privateuseone_for_python_backend(NAME)
_library = torch.library.Library("_", "IMPL")


def memory(x: Tensor) -> int:
    """Where the tensor's hidden memory begins: equal for tensors that look at the same."""
    return _storage(x).data_ptr()


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage().host  # type: ignore[attr-defined]


def _shown(x: Tensor) -> Tensor:
    """The hidden host tensor."""
    return torch.empty(0, dtype=x.dtype).set_(_storage(x), x.storage_offset(), x.shape, x.stride())


def _hidden(x: Tensor, base: Tensor | None) -> Tensor:
    """A toy tensor that looks at the memory of a host tensor; a view of `base` where that is its memory too."""
    if base is None or base.dtype is not x.dtype:
        base = torch._C._acc.create_empty_tensor((0,), x.dtype)
        base.untyped_storage().host = x.untyped_storage()  # type: ignore[attr-defined]
    return torch.ops.aten.as_strided.default.redispatch(_META, base, x.shape, x.stride(), x.storage_offset())


@cache
def _number_places(op: Any) -> tuple[int, ...]:
    """Where an operation takes a tensor, and may be given a number instead."""
    return tuple(i for i, argument in enumerate(op._schema.arguments) if str(argument.type) == "Tensor")


class _Call:
    """One operation: its toy arguments are shown to it, and its results hidden again."""

    def __init__(self, op: Any) -> None:
        self._op = op
        self._mixes = op.overloadpacket.__name__ in COPIES
        self._given: dict[int, Tensor] = {}
        self._bases: dict[int, Tensor] = {}

    def show(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            if x.device.type != NAME:
                if x.dim() and not self._mixes:
                    raise PlatformError(f"{self._op} mixes tensors of the toy device and of the host",
                                        where="toy_capture")  # fmt: skip
                return x
            shown = _shown(x)
            self._given[id(shown)] = self._bases[shown.untyped_storage()._cdata] = x
            return shown
        if isinstance(x, list | tuple):
            return type(x)(map(self.show, x))
        return HOST if isinstance(x, torch.device) and x.type == NAME else x

    def hide(self, x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(self.hide, x))
        if not isinstance(x, Tensor):
            return x
        if (own := self._given.get(id(x))) is not None:  # an argument that was written to comes back itself
            if own.shape != x.shape:  # an `out` that was made without knowing the size
                own.data = _hidden(x, None)
            return own
        return _hidden(x, self._bases.get(x.untyped_storage()._cdata))


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    name = op.overloadpacket.__name__
    if name == "_local_scalar_dense":
        raise PlatformError("the host reads a value of the toy device", where="toy_capture",
                            hint="Copy the tensor to the host first.")  # fmt: skip
    call = _Call(op)
    host_args = [call.show(a) for a in args]
    if name == "_copy_from":
        source, target = host_args[:2]
        target.copy_(source)
        return args[1]
    for i in _number_places(op):
        if i < len(host_args) and isinstance(host_args[i], int | float):
            host_args[i] = torch.tensor(host_args[i])
    return call.hide(op(*host_args, **{name: call.show(value) for name, value in kwargs.items()}))


_library.fallback(_run, "PrivateUse1")
