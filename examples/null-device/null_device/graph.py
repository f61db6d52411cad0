"""A recorded step: the few operations that are left of it, made again on the same memory.

Views need no replay. Kernels compute with NumPy (`compute`), whose calls cost the host least, and are called again on
the same arrays. Of PyTorch's operations, what computes new memory is called again in its form that writes to given
memory, what writes in place as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hotplug.vendor import PlatformError
from null_device.clock import Clock


def record(step: Callable[[], Any], clock: Clock) -> Callable[[], None]:
    """Run a step of decodes and note it; the answer replays it. Raises PlatformError where the host reads a value."""
    recorder = _Recorder()
    _Recorder.current = recorder
    try:
        with recorder:
            step()
    finally:
        _Recorder.current = None
    calls = recorder.calls

    def replay() -> None:
        clock.launch(0)  # a recorded step has one token a request
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return replay


def compute(function: Callable[..., None], out: Tensor, *inputs: Tensor) -> Tensor:
    """`out`, filled by a function of NumPy arrays: that of `out`, then those of the inputs."""
    arrays = tuple(t.numpy() for t in (out, *inputs))
    function(*arrays)
    if _Recorder.current is not None:
        _Recorder.current.calls.append((function, arrays, {}))
    return out


class _Recorder(TorchDispatchMode):
    current: _Recorder | None = None
    """What notes now."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler when the first step is recorded."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.empty.memory_format:
            return result  # for `compute` to fill
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs))
        elif not isinstance(result, Tensor | list | tuple):
            raise PlatformError(f"{func} reads the device from the host, which a recorded step cannot repeat",
                                where="null_device", hint="Run with --exec eager.")  # fmt: skip
        elif not _memory(result) <= _memory((args, kwargs)):
            self.calls.append(_again(func, args, kwargs, result))
        return result


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[Callable[..., Any], Any, Any]:
    """The call that computes `result` once more where it is. Raises PlatformError for several results."""
    if not isinstance(result, Tensor):
        raise PlatformError(f"{func} has several results, which a recorded step here cannot repeat",
                            where="null_device", hint="Run with --exec eager.")  # fmt: skip
    if func is torch.ops.aten._to_copy.default:
        return result.copy_, args, {}
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for overload in (getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads()):
        outs = [a.name for a in overload._schema.arguments if a.is_out]
        if len(outs) == 1 and [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out] == wanted:
            return overload, args, {**kwargs, outs[0]: result}
    return _copied, (func, args, kwargs, result), {}


def _copied(func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    result.copy_(func(*args, **kwargs))


def _memory(tree: Any) -> set[int]:
    """Where its tensors' memory begins; nothing of tensors without elements."""
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel()}
