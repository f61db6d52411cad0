"""Warm-up: a platform that can (`HasWarmup`) compiles its kernels while the weights load."""

from __future__ import annotations

import dataclasses
import logging
import threading

from hotplug.core.platform.base import DeviceInfo
from hotplug.core.platform.discovery import Candidate
from hotplug.core.platform.optional import HasWarmup
from hotplug.core.runner import capture
from hotplug.core.runner.executable import EagerStep
from hotplug.core.runner.profile import largest_steps, prompt_steps
from hotplug.core.runner.runner import Runner
from hotplug.core.scheduler.config import MOST_SCORED
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.executables import captured_prompts, captured_shapes
from hotplug.core.startup.swap import warm_up_swap

_logger = logging.getLogger(__name__)


class WarmUp:
    """A platform's warm-up, begun in a thread. Where it fails, kernels are made when they are first launched."""

    def __init__(self, bound: Bound) -> None:
        self.outcome = "none"
        """How it went: "none" without one, "done", or the error that ended it."""
        self._thread: threading.Thread | None = None
        platform = bound.placement.platform
        if isinstance(platform, HasWarmup):
            self._thread = threading.Thread(target=self._run, args=(bound, platform), name="hotplug-warm-up")
            self._thread.start()

    def wait(self) -> None:
        """Return when it has ended; a failure is logged."""
        if self._thread is not None:
            self._thread.join()
        if self.outcome not in ("none", "done"):
            _logger.warning("kernels are made when first launched, since compiling them ahead failed: %s", self.outcome)

    def _run(self, bound: Bound, platform: HasWarmup) -> None:
        try:
            platform.warm_up(lambda: run_on_meta(bound), bound.placement.device)
        except Exception as e:  # whatever a platform or a kernel cannot do without memory
            self.outcome = f"{type(e).__name__}: {e}"
        else:
            self.outcome = "done"


def run_on_meta(bound: Bound) -> None:
    """Run the steps of an engine's start, and a swap, on torch's meta device, with the kernels that its plan chose."""
    placement = bound.placement
    platform, name = placement.platform, f"{placement.platform.name}:{placement.device.index}"
    devices: tuple[DeviceInfo, ...] = (placement.device,)
    if placement.mesh.size > 1:  # the device that is asked for is that of rank 0
        name, devices = bound.config.device, tuple(platform.probe())
    here = Candidate(platform.name, "", platform, devices)
    config = dataclasses.replace(bound.config, device=name, trace_ops=False)
    twin = bind(config, meta=True, candidates=[here], rank=placement.rank)
    model, batch, sampler, resolved = twin.model.decoder, twin.rows.batch, twin.rows.sampler, twin.options.resolved
    cache = twin.kv.on_meta()
    eager = EagerStep(model, cache, batch)
    runner = Runner(model, batch, sampler, eager)
    tokens, reach = resolved.max_num_batched_tokens, twin.kv.reach
    verified = MOST_SCORED if resolved.speculates else 0
    for plan in largest_steps(resolved.max_num_seqs, tokens, reach, verified):
        runner.execute(plan)
    for plan in prompt_steps(tokens, reach):
        runner.execute(plan)
    shapes = captured_shapes(twin)
    if shapes:
        capture.run_once(eager, batch, sampler, shapes, captured_prompts(twin))
    warm_up_swap(twin, cache)
