"""Compiled executables: whole steps of a few shapes, compiled ahead of time and kept on disk.

A shape is fixed and steps are padded into it, or it bounds steps that run as they are (`CompileLimits.dynamic`). Shapes
are compiled largest first, in a thread beside the serving one where the platform can also run op by op: until
a shape is ready, a larger one or op-by-op execution serves its steps. A platform that only compiles starts once all
shapes are ready.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hotplug.core.errors import PlatformError
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.ops.inputs import StepInputs
from hotplug.core.platform.optional import HasCompile
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.runner.dynamic import DynamicInputs
from hotplug.core.runner.executable import EagerStep, HostStep, StepOutputs, listed
from hotplug.core.runner.schema import by_lane
from hotplug.core.runner.static import StaticInputs, StepShape
from hotplug.core.runner.timing import PREPARE

Compiled = Callable[..., Any]
"""What a platform makes of a program: its inputs in order to its outputs in order."""


@dataclass(frozen=True, slots=True)
class StepBounds:
    """What the shapes allow a step with prompt chunks to hold."""

    max_tokens: int
    max_requests: int


def checked_shapes(
    buckets: Sequence[tuple[int, int]],
    *,
    max_num_seqs: int,
    max_shapes: int,
    mixed_steps: bool,
    where: str,
    dynamic: bool = False,
) -> tuple[list[StepShape], StepBounds]:
    """A platform's buckets as shapes, smallest first. Raises PlatformError where they leave a step unserved.

    `dynamic` says that nothing is padded, so that a shape with room for prompt chunks is as good for decodes.
    """
    shapes = sorted({StepShape(*bucket) for bucket in buckets})
    decodes = max((s.num_requests for s in shapes if s.decodes or dynamic), default=0)
    prefills = [s for s in shapes if not s.decodes]
    faults = [f"({s.num_tokens}, {s.num_requests}) has fewer tokens than requests"
              for s in shapes if not 0 < s.num_requests <= s.num_tokens]  # fmt: skip
    if max_shapes and len(shapes) > max_shapes:
        faults.append(f"{len(shapes)} shapes are more than max_graph_shapes {max_shapes}")
    if decodes < max_num_seqs:
        faults.append(f"none holds the decodes of max_num_seqs {max_num_seqs}: (n, n) with n that large")
    if not prefills:
        faults.append("none holds a prompt chunk: (tokens, requests) with more tokens than requests")
    elif mixed_steps and max(s.num_requests for s in prefills) < max_num_seqs:
        faults.append(f"none holds {max_num_seqs} requests and a prompt chunk, as mixed_steps has it")
    if faults:
        raise PlatformError("the buckets do not cover the steps", where=where, why=faults)
    largest = max(prefills, key=lambda s: (s.num_requests >= max_num_seqs if mixed_steps else True, s.num_tokens))
    return shapes, StepBounds(largest.num_tokens, largest.num_requests)


@dataclass(slots=True)
class _Entry:
    """One shape on its way to an executable."""

    inputs: StaticInputs | DynamicInputs
    state: Literal["waiting", "compiling", "ready"] = "waiting"
    seconds: float = 0.0
    run: Compiled | None = None


class CompiledSteps:
    """Runs a step in the smallest ready shape that holds it.

    `compile_shape` makes one executable. The caches in `kv` are replaced by those that a step returns.
    """

    def __init__(
        self,
        platform: HasCompile,
        compile_shape: Callable[[StaticInputs | DynamicInputs], Compiled],
        inputs: Sequence[StaticInputs | DynamicInputs],
        kv: list[KVBlocks],
        batch: DeviceBatch,
        eager: EagerStep | None,
    ) -> None:
        self._platform = platform
        self._batch = batch
        self._compile_shape = compile_shape
        self._kv = kv
        self._eager = eager
        self._entries = [_Entry(each) for each in sorted(inputs, key=lambda each: each.shape)]
        self._ready: tuple[_Entry, ...] = ()
        self._failure = ""
        self._known = platform.num_compiled()
        self.shapes = tuple(entry.inputs.shape for entry in self._entries)
        self.eager_steps = 0
        """Steps that ran op by op because no shape was ready for them."""
        self._thread = threading.Thread(target=self._compile_all, name="compile")
        self._thread.start()
        if eager is None:
            self.wait()

    def wait(self) -> None:
        """Return when every shape is ready. Raises PlatformError where compiling failed."""
        self._thread.join()
        self._raise_failure()

    @property
    def recompiles(self) -> int:
        """Compilations that steps set off, beyond those of the planned shapes."""
        return self._platform.num_compiled() - self._known if not self._thread.is_alive() else 0

    def report(self) -> dict[str, Any]:
        compiled = [{"shape": list(e.inputs.shape), "state": e.state, "seconds": round(e.seconds, 3)}
                    for e in self._entries]  # fmt: skip
        return {**listed(self.shapes), "compiled": compiled}

    def release(self) -> None:
        """As `Executable` has it; a shape that is being compiled goes with this object."""
        self._ready = ()
        for entry in self._entries:
            entry.run = None

    def __call__(self, step: HostStep) -> StepOutputs:
        self._raise_failure()
        inputs = self._batch.inputs(step.plan, scored_only=step.scored_only)
        step.timer.lap(PREPARE)
        attention = inputs.attention[0]
        tokens, requests = len(inputs.token_ids), len(attention.seq_lens)
        for entry in self._ready:
            if entry.inputs.shape.holds(tokens, requests, attention.max_query_len):
                return self._run(entry, inputs)
        if self._eager is None:
            raise PlatformError(f"no compiled shape holds a step of {tokens} tokens and {requests} requests")
        self.eager_steps += 1
        return self._eager.run(inputs)

    def _run(self, entry: _Entry, inputs: StepInputs) -> StepOutputs:
        assert entry.run is not None
        arguments = entry.inputs.arguments(inputs)
        hidden, logits, *caches = entry.run(*arguments, *(cache for blocks in self._kv for cache in blocks))
        self._kv[:] = by_lane(caches, len(self._kv[0]))
        every = None if inputs.scored is not None else hidden[: len(inputs.token_ids)]
        return StepOutputs(every, logits[: len(inputs.logit_indices)])

    def _compile_all(self) -> None:
        try:
            with torch.no_grad():
                for entry in reversed(self._entries):
                    if threading.main_thread().is_alive():  # the process waits at its end for one shape at most
                        self._compile(entry)
        except BaseException:
            self._failure = traceback.format_exc()

    def _compile(self, entry: _Entry) -> None:
        entry.state, begin = "compiling", time.perf_counter()
        entry.run = self._compile_shape(entry.inputs)
        entry.state, entry.seconds = "ready", time.perf_counter() - begin
        self._known = self._platform.num_compiled()
        self._ready = tuple(e for e in self._entries if e.state == "ready")

    def _raise_failure(self) -> None:
        if self._failure:
            raise PlatformError("compiling a step failed", why=self._failure, hint="Try --exec eager.")
