"""Whether steps and engines leave something behind: tensors, device memory, threads, open files."""

from __future__ import annotations

import gc
import threading
import warnings

import psutil
import torch

from hotplug.plugins.conformance.engine_runs import config, generate, prompts, small_model, start
from hotplug.plugins.conformance.report import Report
from hotplug.plugins.conformance.target import Target

SLACK = 64 << 10
"""Bytes of live tensors by which two rounds of the same requests may differ."""
HOST_SLACK = 24 << 20
"""Bytes by which the process may grow over all rounds: allocators keep what they had once."""


def leaks(target: Target, report: Report) -> None:
    """Rounds of the same requests, then engines started anew, end with as much as they began with."""
    rounds = 3 if target.options.quick else 8
    model, asked = small_model(target.folder), prompts(6, longest=60)
    core = start(target, config(target, model))
    sizes, device, host = [], [], []
    process = psutil.Process()
    for _ in range(rounds + 2):
        generate(core, asked, 8)
        sizes.append(_live_bytes())
        device.append(target.platform.memory(target.device).free)
        host.append(process.memory_info().rss)
    steps = core.stats().steps // (rounds + 2)
    grown = sizes[-1] - sizes[1]  # the first rounds make what is made once
    report.data |= {"tensor_bytes": grown, "host_bytes": host[-1] - host[1]}
    if grown > SLACK:
        report.fail(f"memory leaks: live tensors grow by {grown / rounds / steps:,.0f} bytes a step")
    elif not target.limits.shared_host_memory and device[1] - device[-1] > SLACK * rounds:
        report.fail(f"device memory leaks: {device[1] - device[-1]:,} bytes less are free after {rounds} rounds of the "
                    "same requests")  # fmt: skip
    elif host[-1] - host[1] > HOST_SLACK:
        report.fail(f"memory leaks: the process grows by {(host[-1] - host[1]) / rounds:,.0f} bytes a round")
    del core
    before = _handles(process)
    for _ in range(2 if target.options.quick else 4):
        start(target, config(target, model))
    gc.collect()
    after = _handles(process)
    for name, count in after.items():
        if count > before[name] + 1:
            report.fail(f"{count - before[name]} {name} are left behind by engines that ended")
    report.cases = rounds


def _live_bytes() -> int:
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        for item in gc.get_objects():
            if type(item) is torch.Tensor or type(item) is torch.nn.Parameter:
                storage = item.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _handles(process: psutil.Process) -> dict[str, int]:
    files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    return {"threads": threading.active_count(), "open files": files}
