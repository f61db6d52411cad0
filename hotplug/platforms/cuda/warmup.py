"""Compiling ahead: what steps on tensors without memory launch is compiled by many threads, and launched by none.

Triton holds Python's lock only while it reads a kernel's source; its passes, LLVM, ptxas and the C compiler that makes
a launcher run beside each other. What is compiled is in this process's cache then, and in Triton's on disk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, wraps
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.experimental.gluon.nvidia import hopper
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from hotplug.platforms.cuda.target import stands_for

MOST_THREADS = 16


def compile_launches(
    steps: Callable[[], Any], gpu: torch.device, enter: Callable[[torch.device], Any] = torch.cuda.set_device
) -> None:
    """Run `steps`, on the meta device, and compile for `gpu` what this thread would launch; returns when all is done.

    `enter` makes `gpu` current for a thread. What does not compile is left to fail where it is launched.
    """
    _catch_launches()
    enter(gpu)
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with (
        _Compilers(threads, "hotplug-compile", initializer=enter, initargs=(gpu,)) as compilers,
        AsyncCompileMode(compilers, ignore_errors=True),
        stands_for(gpu),
    ):
        _catching.seen = set()
        try:
            steps()
        finally:
            _catching.seen = None


class _Compilers(ThreadPoolExecutor):
    """Threads that compile a kernel, make its launcher and load it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def make() -> Any:
            kernel = fn(*args, **kwargs)
            kernel._init_handles()
            return kernel

        return super().submit(make)


class _Catching(threading.local):
    seen: set[Any] | None = None
    """What launches of this thread, which are to be compiled only, were made with; None where they are launched."""


_catching = _Catching()


@cache
def _catch_launches() -> None:
    """Put a switch in front of every launch, once and for all: a second engine may start beside one that runs."""
    launch = JITFunction.run

    @wraps(launch)
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        seen = _catching.seen
        if seen is None:
            return launch(self, *args, grid=grid, warmup=warmup, **options)
        call = (self, *map(_kind, args), *((name, _kind(value)) for name, value in options.items()))
        if call not in seen:  # a model has many layers
            seen.add(call)
            launch(self, *args, grid=grid, warmup=True, **options)
        return None

    JITFunction.run = run


def _kind(value: Any) -> Any:
    """Equal for arguments that Triton compiles one kernel for, though not for them alone."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape), tuple(value.shape), tuple(value.strides), value.padding
    if isinstance(value, hopper.TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape), value.layout, value.padding
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return type(value), value
