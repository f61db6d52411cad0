"""Warm-up: a platform that can (`HasWarmup`) compiles its kernels while the weights load."""

from __future__ import annotations

import dataclasses
import threading

import torch

from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.platform.base import DeviceInfo
from hotplug.core.platform.discovery import Candidate
from hotplug.core.platform.optional import HasWarmup
from hotplug.core.runner import capture, kv_memory
from hotplug.core.runner.executable import EagerStep
from hotplug.core.runner.profile import largest_steps, prompt_steps
from hotplug.core.runner.runner import Runner
from hotplug.core.scheduler.config import MOST_SCORED
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.executables import captured_prompts, captured_shapes
from hotplug.core.startup.swap import warm_up_swap


class WarmUp:
    """A platform's warm-up, begun in a thread. Where it fails, kernels are made when they are first launched."""

    def __init__(self, bound: Bound) -> None:
        self.outcome = "none"
        """How it went: "none" without one, "done", or the error that ended it."""
        self._thread: threading.Thread | None = None
        platform = bound.selection.platform
        if isinstance(platform, HasWarmup):
            self._thread = threading.Thread(target=self._run, args=(bound, platform), name="hotplug-warm-up")
            self._thread.start()

    def wait(self) -> None:
        """Return when it has ended."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, bound: Bound, platform: HasWarmup) -> None:
        try:
            platform.warm_up(lambda: run_on_meta(bound), bound.selection.device)
        except Exception as e:  # whatever a platform or a kernel cannot do without memory
            self.outcome = f"{type(e).__name__}: {e}"
        else:
            self.outcome = "done"


def run_on_meta(bound: Bound) -> None:
    """Run the steps of an engine's start, and a swap, on torch's meta device, with the kernels that its plan chose."""
    selection = bound.selection
    rank, name = bound.context.rank, f"{selection.platform.name}:{selection.device.index}"
    devices: tuple[DeviceInfo, ...] = (selection.device,)
    if bound.context.ranks > 1:  # the device that is asked for is that of rank 0
        name, devices = bound.config.device, tuple(selection.platform.probe())
    here = Candidate(selection.platform.name, "", selection.platform, devices)
    config = dataclasses.replace(bound.config, device=name, trace_ops=False)
    twin = bind(config, meta=True, candidates=[here], rank=rank)
    memory = torch.empty(kv_memory.lane_shape(twin.groups, 1), dtype=kv_memory.page_dtype(twin.groups), device="meta")
    cache: list[KVBlocks] = [lane.unbind() for lane in memory]
    eager = EagerStep(twin.model, cache, twin.batch)
    runner = Runner(twin.model, twin.batch, twin.sampler, eager)
    tokens = twin.resolved.max_num_batched_tokens
    verified = MOST_SCORED if twin.resolved.speculates else 0
    for plan in largest_steps(twin.resolved.max_num_seqs, tokens, twin.context.max_position, verified):
        runner.execute(plan)
    for plan in prompt_steps(tokens, twin.context.max_position):
        runner.execute(plan)
    shapes = captured_shapes(twin)
    if shapes:
        capture.run_once(eager, twin.batch, twin.sampler, shapes, captured_prompts(twin))
    warm_up_swap(twin, cache)
