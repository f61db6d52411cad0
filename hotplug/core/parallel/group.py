"""The process group of an engine's ranks: torch.distributed's default one, as its collectives use it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from hotplug.core.errors import ConfigError
from hotplug.core.parallel.mesh import Mesh

TIMEOUT = timedelta(seconds=120)
"""How long a rank waits in a collective for another, which may be reading weights or compiling."""
_INTERFACE = "GLOO_SOCKET_IFNAME"
_LOOPBACK = "lo"


def require_free() -> None:
    """Raises ConfigError where this process is in a group already, or PyTorch has none."""
    if not torch.distributed.is_available():
        raise ConfigError("this build of PyTorch has no torch.distributed", where="--tensor-parallel-size")
    if torch.distributed.is_initialized():
        raise ConfigError(
            "this process has a torch.distributed group already", where="--tensor-parallel-size",
            why="a process has one engine of several ranks at most", hint="Close the other engine first.",
        )  # fmt: skip


def join(store: Path, mesh: Mesh, rank: int) -> None:
    """Enter the group of all ranks of `mesh`, on this host, who meet at the file `store`; waits for all of them."""
    with _on_loopback():
        torch.distributed.init_process_group(
            init_method=store.as_uri(), rank=rank, world_size=mesh.size, timeout=TIMEOUT
        )


def leave() -> None:
    """Leave the group without the others, who may be gone: some backends' orderly end waits for all of them."""
    world = torch.distributed.group.WORLD
    if world is not None:
        world.abort()
        torch.distributed.destroy_process_group()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ranks of one host talk over its loopback interface, whatever its name resolves to, unless the user says else."""
    if _INTERFACE in os.environ or _LOOPBACK not in (name for _, name in socket.if_nameindex()):
        yield
        return
    os.environ[_INTERFACE] = _LOOPBACK
    try:
        yield
    finally:
        del os.environ[_INTERFACE]
