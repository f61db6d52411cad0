"""Recorded steps on the host: the calls of one step, kept with their memory and made again without its Python.

While a step is recorded it runs as always. Calls of the native library are noted with their structs; they follow
each other in one call when the step is replayed. What PyTorch computes between them is noted by operator and made
again in the same order, its results copied to where they were. Kernels that steer by values on the host are made
again as a whole (`opaque`).
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hotplug.platforms.cpu.native import library
from hotplug.vendor import PlatformError

_ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""
_FACTORIES = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}
"""Make memory and nothing in it, from the pool where it is contiguous."""


P = ParamSpec("P")
R = TypeVar("R")


class _Pool:
    """Memory that recorded steps compute in. All share it, so only one may run at a time.

    A buffer is free again when no tensor lies in it any more; what a recorded step wrote there is of no use then to
    the rest of the step, and so neither when it is replayed.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while a step is recorded or replayed."""
        self._free: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._live: set[int] = set()

    def tensor(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized contiguous tensor, aligned to 64 bytes."""
        count = 1
        for length in size:
            count *= length
        if not count:
            return torch.empty(size, dtype=dtype)
        wanted = max(count * dtype.itemsize, _ALIGNMENT)
        capacity = 1 << (wanted - 1).bit_length()  # of a size that steps of other numbers of rows ask for too
        ready = self._free.setdefault(capacity, [])
        buffer = ready.pop() if ready else _aligned(capacity)
        part = buffer[: count * dtype.itemsize]  # an object of its own: it dies with the tensor's memory
        address = buffer.ctypes.data
        self._live.add(address)
        weakref.finalize(part, self._freed, address, ready, buffer)
        return torch.frombuffer(part, dtype=dtype).view(*size)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._live

    def _freed(self, address: int, ready: list[np.ndarray[Any, Any]], buffer: np.ndarray[Any, Any]) -> None:
        self._live.discard(address)
        ready.append(buffer)


def _aligned(size: int) -> np.ndarray[Any, Any]:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size]


_pool = _Pool()
_thread = threading.local()


class _Native:
    """Calls of the library, one after the other."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self._entries: Any = None

    def seal(self) -> None:
        """No call comes any more."""
        c = library.load().c
        self._entries = (library.ReplayEntry * len(self.calls))(
            *((ctypes.cast(getattr(c, name), ctypes.c_void_p), packed) for name, packed in self.calls)
        )
        self._failed = ctypes.c_int64()
        self._replay, self._count, self._at = c.hp_replay, len(self.calls), ctypes.addressof(self._failed)

    def __call__(self) -> None:
        if status := self._replay(self._entries, self._count, self._at):
            library.checked(status, self.calls[self._failed.value][0])


class _Again:
    """A function of tensors whose results go to where they were first."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs
        memory = _memory((args, kwargs))
        # What lies in an argument was written in place.
        self._results = [
            (i, t) for i, t in enumerate(tree_leaves(result))
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in memory
        ]  # fmt: skip

    def __call__(self) -> None:
        result = self._function(*self._args, **self._kwargs)
        if self._results:
            leaves = tree_leaves(result)
            for i, kept in self._results:
                kept.copy_(leaves[i])


class _Recorder(TorchDispatchMode):
    """Notes what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[_Native | _Again] = []
        self.kept: list[Any] = []
        """Tensors of memory that is neither the pool's nor a result of a part, alive while calls point there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler when the first step is recorded: a second, and 120 MB, for nothing."""
        return False

    def native(self, name: str, packed: bytes) -> None:
        if not self.parts or not isinstance(self.parts[-1], _Native):
            self.parts.append(_Native())
        last = self.parts[-1]
        assert isinstance(last, _Native)
        last.calls.append((name, packed))

    def again(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        self.parts.append(_Again(function, args, kwargs, result))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            like = func(*args, **{**kwargs, "device": "meta"})
            if like.is_contiguous():
                return _pool.tensor(like.shape, like.dtype)
        result = func(*args, **kwargs)
        made = _tensors(result)
        # Schemas do not tell: of what may give a view (`contiguous`, `to`) some results are and some are computed.
        if func in _FACTORIES or (made and not func._schema.is_mutable and _memory(made) <= _memory((args, kwargs))):
            self.kept += [t for t in made if not _pool.holds(t)]
            return result
        if not made and not func._schema.is_mutable:
            raise PlatformError(
                "a step that reads values on the host cannot be recorded",
                why=f"{func} does, in a kernel or a reference",
                hint="Run with --exec eager.",
            )
        self.again(func, args, kwargs, result)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tree: Any) -> set[int]:
    """Where its tensors' memory begins."""
    return {t.untyped_storage().data_ptr() for t in _tensors(tree)}


def opaque(kernel: Callable[P, R]) -> Callable[P, R]:
    """A kernel that steers by values on the host: a recorded step calls it again, whatever is in it."""

    @wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        recorder = getattr(_thread, "recorder", None)
        if recorder is None:
            return kernel(*args, **kwargs)
        with _disable_current_modes(), library.noted(None):
            result = kernel(*args, **kwargs)
        recorder.again(kernel, args, kwargs, result)
        return result

    return run


def capture(step: Callable[[], Any]) -> Callable[[], None]:
    """Run `step` while recording it; the answer replays it on the same tensors.

    A replay that begins in one thread waits for one in another. Raises PlatformError for a step that reads values on
    the host outside of `opaque` kernels.
    """
    recorder = _Recorder()
    before, _thread.recorder = getattr(_thread, "recorder", None), recorder
    try:
        with _pool.lock, recorder, library.noted(recorder.native):
            step()
    finally:
        _thread.recorder = before
    for part in recorder.parts:
        if isinstance(part, _Native):
            part.seal()

    def replay() -> None:
        with _pool.lock:
            for part in recorder.parts:  # with the recorder lives the memory that it keeps
                part()

    return replay
