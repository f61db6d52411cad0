"""Rank 0's start of the other ranks, and each rank's part of a device that several are on."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from hotplug.core.config import EngineConfig
from hotplug.core.platform.optional import HasRuntime, HasShare
from hotplug.core.startup.placement import Placement

if TYPE_CHECKING:  # an engine of one rank needs none of it
    from hotplug.core.parallel.process_executor import ProcessExecutor
    from hotplug.core.parallel.processes import RankProcesses
    from hotplug.core.runner.rank_worker import RankWorker

WORKER = "hotplug.core.engine.worker"
"""The module of a worker's process."""
TRANSPORT = "ring"
"""What plans go over: the ring of one host, or zmq."""


def start_ranks(config: EngineConfig, placement: Placement) -> RankProcesses:
    """Start the other ranks of an engine, each on the device that it is to have. Raises ConfigError."""
    from hotplug.core.parallel.processes import RankProcesses

    device = f"{placement.platform.name}:{placement.device.index}"
    return RankProcesses(dataclasses.replace(config, device=device), placement.mesh, WORKER, TRANSPORT)


def lead(worker: RankWorker, processes: RankProcesses, placement: Placement) -> ProcessExecutor:
    """The executor of rank 0's `worker` and of the others' processes; closing it gives the device back too."""
    from hotplug.core.parallel.process_executor import ProcessExecutor

    ahead = int(placement.limits.asynchronous)
    return ProcessExecutor(worker, ahead, processes, partial(give_share_back, placement))


def take_share(placement: Placement) -> None:
    """Have this process use its rank's device, or its part of one."""
    platform, device = placement.platform, placement.device
    if isinstance(platform, HasRuntime):
        platform.set_device(device)
    if placement.sharing > 1 and isinstance(platform, HasShare):
        platform.share(device, placement.rank, placement.sharing)


def give_share_back(placement: Placement) -> None:
    """Have this process use all of the device again."""
    if placement.sharing > 1 and isinstance(placement.platform, HasShare):
        placement.platform.share(placement.device, 0, 1)
