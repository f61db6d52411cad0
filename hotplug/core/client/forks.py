"""What a fork of this process may do with engines.

A forked child has none of its parent's threads and a copy of its locks: an engine of the parent would hang in it, and
an accelerator's context cannot be used there at all. So an engine belongs to the process that made it (`OwnProcess`).

A child that leaves its parent's engines alone must not be harmed by them. GNU's OpenMP keeps a pool of threads for
each thread that computes; in a child it waits for ever for those of its parent. The pool of the forking thread is
therefore given up just before a fork, which takes a few milliseconds; the next computation starts another. And the
child never destroys what its parent's engines hold, since destructors of libraries wait for their threads as well. So
PyTorch, a new engine on the host's own processor, and the end of the program work in the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.process
import os
import sys
import weakref
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hotplug.core.engine.main_script import ENGINE
from hotplug.core.errors import EngineDeadError

_HINT = ("Make the engine in the process that uses it, and start such processes with "
         'multiprocessing.get_context("spawn") instead of a fork.')  # fmt: skip
_OMP_PAUSE_SOFT = 1
"""OpenMP 5.0: give up the threads, keep the settings."""

_accelerator_used = False
"""Whether this process has run an engine on a device that has memory of its own."""
_engines: weakref.WeakSet[Any] = weakref.WeakSet()
_obstacle = ""
"""Why no engine can be made in this process; empty where one can."""


class OwnProcess:
    """The process that made an engine, which is the only one to use it."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def require(self) -> None:
        """Raises EngineDeadError in a fork of that process."""
        if os.getpid() != self._pid:
            raise EngineDeadError(
                "this engine belongs to another process",
                why=f"process {self._pid} made it, and process {os.getpid()} is a fork of that, without its threads",
                hint=_HINT,
            )


def require_usable() -> None:
    """Raises EngineDeadError where a new engine would hang or fail, because of what this process was forked from."""
    if _obstacle:
        raise EngineDeadError("no engine can be made in this process", why=_obstacle, hint=_HINT)


def engine_made(engine: object, *, accelerator: bool) -> None:
    """This process has an engine now, on an accelerator or on the host's own processor."""
    global _accelerator_used
    _accelerator_used = _accelerator_used or accelerator
    _engines.add(engine)


def _before_fork() -> None:
    global _pool_kept
    _pool_kept = "torch" in sys.modules and not _give_up_openmp_threads()


def _in_child() -> None:
    global _obstacle
    for held in (*_engines, *_groups()):  # as long as the child lives: a destructor may wait for threads, too
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
    children: set[BaseProcess] = getattr(multiprocessing.process, "_children", set())
    for process in [child for child in children if child.name == ENGINE]:
        children.discard(process)  # else `multiprocessing` would end its parent's engine when this process ends
    if _accelerator_used:
        _obstacle = "it was forked from one that has used an accelerator, whose context a fork cannot use"
    elif _pool_kept:
        _obstacle = "it was forked from one whose OpenMP threads a fork would wait for"


def _groups() -> list[Any]:
    """Connections to the other ranks of this process's engine."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return []
    return list(getattr(distributed.distributed_c10d._world, "pg_map", ()))


_pool_kept = False
"""Whether the thread that forks has OpenMP threads that it could not give up."""


def _give_up_openmp_threads() -> bool:
    """Have every GNU OpenMP library here end the threads it keeps for this thread; False where one could not."""
    try:
        with Path("/proc/self/maps").open() as maps:
            libraries = {line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line}
    except OSError:
        return True  # not Linux, where other OpenMP libraries serve, which look after forks themselves
    done = True
    for library in libraries:
        try:
            done &= ctypes.CDLL(library, mode=os.RTLD_NOLOAD).omp_pause_resource_all(_OMP_PAUSE_SOFT) == 0
        except (OSError, AttributeError):  # replaced on disk; older than GCC 9
            done = False
    return done


with contextlib.suppress(AttributeError):  # a system without forks
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
