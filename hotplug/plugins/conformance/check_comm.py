"""Collectives of a platform against torch.distributed's gloo, two ranks in two processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from hotplug.core.platform.base import DeviceInfo, Platform
from hotplug.core.platform.optional import HasComm, NotHandled
from hotplug.core.platform.rank_group import RankGroup
from hotplug.core.runner.kv_memory import torch_device
from hotplug.plugins.conformance.report import Report, Skipped
from hotplug.plugins.conformance.target import Target

RANKS = 2
SIZES = ((1, 1), (1, 128), (3, 130), (16, 1024), (64, 2048), (512, 2048))
"""[num_tokens, hidden] of what is reduced and gathered."""


def collectives(target: Target, report: Report) -> None:
    """`all_reduce` and `all_gather` at six sizes; a size that is not handled is the default's."""
    if not isinstance(target.platform, HasComm):
        raise Skipped("the platform has no HasComm: torch.distributed serves it")
    if target.make is None:
        raise Skipped("the platform's class cannot be imported by name in another process")
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    address = f"tcp://127.0.0.1:{_free_port()}"
    torch.multiprocessing.spawn(_rank, (target.make, target.device, address, queue), nprocs=RANKS, join=True)
    handled = 0
    while not queue.empty():
        kind, words = queue.get()
        report.cases += 1
        if kind == "fault":
            report.fail(words)
        handled += kind == "ok"
    report.data["handled"] = handled
    if not handled:
        report.note("no size was handled: the default serves all")


def _rank(rank: int, make: Callable[[], Platform], device: DeviceInfo, address: str, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    platform = make()
    place = torch_device(platform, device)
    group = RankGroup("tp", tuple(range(RANKS)), rank)
    for shape in SIZES:
        random = torch.Generator().manual_seed(rank)
        tensor = torch.randn(shape, generator=random)
        for name, expected in (("all_reduce", _reduced(tensor)), ("all_gather", _gathered(tensor))):
            found = getattr(platform, name)(tensor.clone().to(place), group)
            if found is NotHandled:
                queue.put(("default", name))
                continue
            queue.put(_judged(name, rank, shape, found.to("cpu"), expected, tensor))
    torch.distributed.destroy_process_group()


def _judged(
    name: str, rank: int, shape: tuple[int, ...], found: torch.Tensor, expected: torch.Tensor, own: torch.Tensor
) -> tuple[str, str]:
    where = f"{name} of {list(shape)} on rank {rank}"
    if found.shape != expected.shape:
        return "fault", f"{where}: shape {list(found.shape)} instead of {list(expected.shape)}"
    if torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
        return "ok", ""
    others = " of the other ranks" if name == "all_reduce" else ""
    if torch.allclose(found, own.expand_as(found) if found.shape == own.shape else found * 0):
        return "fault", f"{where}: it drops the part{others}: the result is this rank's own"
    if torch.allclose(found, expected / RANKS, rtol=1e-5, atol=1e-5):
        return "fault", f"{where}: it averages where it should add"
    if name == "all_gather" and torch.allclose(found, expected.roll(own.shape[-1], -1)):
        return "fault", f"{where}: the ranks' parts are in the wrong order"
    parts = (found - expected).abs() > 1e-4
    return "fault", f"{where}: {int(parts.sum())} of {parts.numel()} elements differ from torch.distributed's"


def _reduced(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(RANKS)]
    torch.distributed.all_gather(parts, tensor)
    return torch.cat(parts, dim=-1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
