"""A recorded step: the few PyTorch operations that are left of it, made again on the same memory.

Views need no replay. What computes new memory is computed again and copied to where it was, what writes in place is
called again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hotplug.vendor import PlatformError
from null_device.clock import Clock


def record(step: Callable[[], Any], clock: Clock) -> Callable[[], None]:
    """Run a step of decodes and note it; the answer replays it. Raises PlatformError where the host reads a value."""
    recorder = _Recorder()
    with recorder:
        step()
    calls = recorder.calls

    def replay() -> None:
        clock.launch(0)  # a recorded step has one token a request
        for function, args, kwargs, result in calls:
            again = function(*args, **kwargs)
            if result is not None:
                result.copy_(again)

    return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Tensor | None]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler when the first step is recorded."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.calls.append((func, args, kwargs, None))
        elif not isinstance(result, Tensor | list | tuple):
            raise PlatformError(f"{func} reads the device from the host, which a recorded step cannot repeat",
                                where="null_device", hint="Run with --exec eager.")  # fmt: skip
        elif not _memory(result) <= _memory((args, kwargs)):
            if not isinstance(result, Tensor):
                raise PlatformError(f"{func} has several results, which a recorded step here cannot repeat",
                                    where="null_device", hint="Run with --exec eager.")  # fmt: skip
            self.calls.append((func, args, kwargs, result))
        return result


def _memory(tree: Any) -> set[int]:
    """Where its tensors' memory begins; nothing of tensors without elements."""
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel()}
