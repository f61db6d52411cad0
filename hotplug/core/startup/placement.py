"""The first stage of a start: which platform was selected, and which of its devices a rank of the engine runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hotplug.core.config import EngineConfig
from hotplug.core.parallel.mesh import Mesh
from hotplug.core.platform.base import DeviceInfo, Limits, Platform
from hotplug.core.platform.discovery import Candidate
from hotplug.core.platform.optional import HasShare
from hotplug.core.platform.rank_group import RankGroup
from hotplug.core.platform.select import Selection, select
from hotplug.core.runner.kv_memory import torch_device


@dataclass(frozen=True, slots=True)
class Placement:
    """What one rank of an engine runs on."""

    selection: Selection
    """The platform, this rank's device, and why they were selected."""
    limits: Limits
    """What the device can do."""
    mesh: Mesh
    """How the ranks of the engine are laid out."""
    rank: int
    """Which of them this is."""
    sharing: int
    """Ranks on this rank's device, itself among them."""
    num_devices: int
    """Devices for the engine: the one that was selected for rank 0, and those after it."""
    torch_device: torch.device
    """Where tensors are made: the device, or torch's meta device where nothing may take memory."""

    @property
    def platform(self) -> Platform:
        return self.selection.platform

    @property
    def device(self) -> DeviceInfo:
        return self.selection.device

    @property
    def tensor_group(self) -> RankGroup:
        """The ranks that split every layer with this one."""
        return self.mesh.group("tp", self.rank)

    @property
    def shares_devices(self) -> bool:
        """Whether the platform can have several ranks on a device."""
        return isinstance(self.platform, HasShare)


def choose_device(config: EngineConfig, candidates: Sequence[Candidate], rank: int, *, meta: bool) -> Placement:
    """Select a device for rank 0 from `candidates`, and give `rank` its own. Raises FeatureError, PlatformError."""
    mesh = Mesh.of(config)
    first = select(config.device, candidates)
    devices = devices_from(first)
    selection, sharing = device_of_rank(first, devices, mesh, rank)
    return Placement(
        selection=selection,
        limits=selection.platform.limits(selection.device),
        mesh=mesh,
        rank=rank,
        sharing=sharing,
        num_devices=len(devices),
        torch_device=torch.device("meta") if meta else torch_device(selection.platform, selection.device),
    )


def devices_from(selection: Selection) -> list[DeviceInfo]:
    """The selected device and those after it."""
    found = list(selection.platform.probe())
    at = [device.index for device in found].index(selection.device.index)
    return found[at:]


def device_of_rank(first: Selection, devices: Sequence[DeviceInfo], mesh: Mesh, rank: int) -> tuple[Selection, int]:
    """What a rank runs on, and how many ranks share that.

    `first`, and the first of `devices`, is rank 0's; the others have those after it, or the same where there are not
    as many.
    """
    if mesh.size == 1 or len(devices) < mesh.size:
        return first, mesh.size
    return Selection(first.platform, devices[rank], first.reason), 1
