"""Rank 0's start of the other ranks, and each rank's part of a device that several are on."""

from __future__ import annotations

import dataclasses

from hotplug.core.parallel.workers import Workers
from hotplug.core.platform.optional import HasRuntime, HasShare
from hotplug.core.startup.bind import Bound

WORKER = "hotplug.core.engine.worker"
"""The module of a worker's process."""
TRANSPORT = "ring"
"""What plans go over: the ring of one host, or zmq."""


def start_workers(bound: Bound) -> Workers:
    """Start the other ranks of an engine, each on the device that it is to have. Raises ConfigError."""
    device = f"{bound.selection.platform.name}:{bound.selection.device.index}"
    return Workers(dataclasses.replace(bound.config, device=device), WORKER, TRANSPORT)


def take_share(bound: Bound) -> None:
    """Have this process use its rank's device, or its part of one."""
    platform, device = bound.selection.platform, bound.selection.device
    if isinstance(platform, HasRuntime):
        platform.set_device(device)
    if bound.sharing > 1 and isinstance(platform, HasShare):
        platform.share(device, bound.context.rank, bound.sharing)


def give_share_back(bound: Bound) -> None:
    """Have this process use all of the device again."""
    if bound.sharing > 1 and isinstance(bound.selection.platform, HasShare):
        bound.selection.platform.share(bound.selection.device, 0, 1)
