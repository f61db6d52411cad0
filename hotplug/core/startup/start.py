"""The start of an engine, one stage after the other: from a configuration to ranks that wait for steps.

- bind: device, options, kernels, KV plan, model, rows; nothing is read (`bind`)
- ranks: processes of the other ranks, which take the same way from here on (`rank_processes`)
- weights: read, split over the ranks, repacked (`load`)
- kernels: what was compiled meanwhile (`warmup`)
- profile: the KV blocks that there is memory for, as many on every rank; cache: their memory (`kv_cache`)
- steps: recorded, or to be compiled (`executables`)
- scheduler: what plans the steps (`scheduling`)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from hotplug.core.config import EngineConfig
from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.ops.registry import Observe
from hotplug.core.ops.trace import synchronizer
from hotplug.core.parallel.executor import Executor, InProcessExecutor
from hotplug.core.parallel.peers import Peers
from hotplug.core.platform.discovery import Candidate
from hotplug.core.platform.optional import HasRuntime
from hotplug.core.runner import memory_guard
from hotplug.core.runner.executable import Executable
from hotplug.core.runner.memory_guard import MemoryGuard, step_guard
from hotplug.core.runner.rank_worker import RankWorker
from hotplug.core.runner.runner import Runner
from hotplug.core.scheduler.scheduler import Scheduler
from hotplug.core.startup import kv_cache
from hotplug.core.startup.bind import Bound, bind
from hotplug.core.startup.connect import make_connector, make_transfer
from hotplug.core.startup.executables import CompiledShapes, compiled_shapes, make_executable
from hotplug.core.startup.load import load
from hotplug.core.startup.phases import Phases
from hotplug.core.startup.rank_processes import give_share_back, lead, start_ranks, take_share
from hotplug.core.startup.scheduling import make_scheduler
from hotplug.core.startup.swap import make_space, make_swap
from hotplug.core.startup.warmup import WarmUp
from hotplug.core.transfer.background import Background
from hotplug.core.transfer.connector import KVConnector
from hotplug.core.transfer.swap import SwapSpace


@dataclass(frozen=True, slots=True)
class Prepared:
    """A rank before its weights are read."""

    bound: Bound
    compiles: CompiledShapes | None
    """The shapes of steps to compile, where steps are compiled."""
    connector: KVConnector | None
    """What keeps KV blocks elsewhere."""
    background: Background
    """The thread in which it works."""
    phases: Phases
    """How long each phase of this start takes."""


@dataclass(frozen=True, slots=True)
class Running:
    """A rank that waits for steps."""

    worker: RankWorker
    num_blocks: int
    """Blocks of its KV cache, the null block among them."""
    figures: dict[str, Any]
    """Memory of the prepared steps in bytes, as reserved and as taken, and what became of the warm-up."""


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that waits for requests."""

    bound: Bound
    """Rank 0's."""
    executor: Executor
    scheduler: Scheduler
    num_blocks: int
    """KV blocks, the null block among them."""
    figures: dict[str, Any]
    """What the start took (`EngineCore.report`)."""


def start(
    config: EngineConfig, *, observe: Observe | None = None, candidates: Sequence[Candidate] | None = None
) -> Started:
    """Start an engine: rank 0 in this process, and the others' processes. `observe` and `candidates` are as in `bind`.

    Raises ConfigError, PlatformError, OutOfMemoryError and whatever else a stage raises; EngineDeadError where another
    rank ends. No process is left behind then.
    """
    prepared = _prepare(config, rank=0, observe=observe, candidates=candidates)
    placement = prepared.bound.placement
    if placement.mesh.size == 1:
        running = _bring_up(prepared, None)
        return _started(prepared, running, InProcessExecutor(running.worker, int(placement.limits.asynchronous)))
    take_share(placement)
    with ExitStack() as failed:
        processes = start_ranks(config, placement)
        failed.callback(give_share_back, placement)
        failed.callback(processes.close)
        running = _bring_up(prepared, processes)
        failed.callback(running.worker.executable.release)
        processes.ready()
        started = _started(prepared, running, lead(running.worker, processes, placement))
        failed.pop_all()  # it has not
    return started


def start_rank(config: EngineConfig, leader: Peers) -> Running:
    """Start a rank other than the first, in this process. `leader` is rank 0 as it sees it.

    Raises EOFError where rank 0 is gone, and as `start`.
    """
    prepared = _prepare(config, rank=leader.rank)
    take_share(prepared.bound.placement)
    return _bring_up(prepared, leader)


def _prepare(
    config: EngineConfig,
    *,
    rank: int,
    observe: Observe | None = None,
    candidates: Sequence[Candidate] | None = None,
) -> Prepared:
    """Decide everything, and check what can be checked before weights are read."""
    phases = Phases()
    with phases("bind"):
        bound = bind(config, observe=observe, candidates=candidates, rank=rank)
        prepared = Prepared(bound, compiled_shapes(bound), make_connector(bound), _background(), phases)
    kv_cache.check_asked(bound)
    return prepared


def _background() -> Background:
    """One thread, which begins with its first call; what it was given is done before the process ends."""
    return ThreadPoolExecutor(1, thread_name_prefix="hotplug-kv")


def _bring_up(prepared: Prepared, peers: Peers | None) -> Running:
    """From a bound model to a rank that waits for steps. `peers` are the other ranks, where there are any."""
    bound, phases, placement = prepared.bound, prepared.phases, prepared.bound.placement
    warm_up = WarmUp(bound)
    with phases("weights"):
        load(bound)
        space = make_space(bound)
        synchronizer(placement.platform, placement.device, placement.torch_device)()
    if peers is not None:
        with phases("ranks"):
            peers.join(bound.kernels.plan.hash)
    with phases("kernels"):
        warm_up.wait()
    with phases("profile"):
        memory = kv_cache.measure(bound)
        num_blocks = memory.num_blocks if peers is None else peers.agree(memory.num_blocks)
    with phases("cache"):
        cache = kv_cache.allocate(bound, num_blocks)
    with phases("steps"):
        executable, taken = _prepare_steps(prepared, cache)
    runner = _make_runner(prepared, cache, space, executable)
    worker = RankWorker(bound.model.decoder, cache, executable, runner, step_guard(placement.selection))
    figures = {"steps_memory": {"reserved": memory.reserved, "taken": taken}, "warm_up": warm_up.outcome}
    return Running(worker, num_blocks, figures)


def _prepare_steps(prepared: Prepared, cache: list[KVBlocks]) -> tuple[Executable, int]:
    """What runs the steps, and the bytes that preparing them took. Raises OutOfMemoryError."""
    placement = prepared.bound.placement
    free = placement.platform.memory(placement.device).free
    with MemoryGuard("preparing the steps", placement.selection, memory_guard.EXECUTABLES):
        executable = make_executable(prepared.bound, cache, prepared.compiles)
    return executable, free - placement.platform.memory(placement.device).free


def _make_runner(prepared: Prepared, cache: list[KVBlocks], space: SwapSpace | None, executable: Executable) -> Runner:
    """What makes steps of plans, and moves blocks between the cache and what is elsewhere."""
    bound = prepared.bound
    platform, rows = bound.placement.platform, bound.rows
    return Runner(
        bound.model.decoder,
        rows.batch,
        rows.sampler,
        executable,
        make_transfer(bound, cache, prepared.connector, prepared.background),
        platform if isinstance(platform, HasRuntime) else None,
        make_swap(bound, cache, space),
    )


def _started(prepared: Prepared, running: Running, executor: Executor) -> Started:
    """The engine of a rank 0 that runs."""
    bounds = None if prepared.compiles is None else prepared.compiles.bounds
    figures = {"seconds": prepared.phases.report(), **running.figures}
    scheduler = make_scheduler(prepared.bound, running.num_blocks, bounds, prepared.connector, prepared.background)
    return Started(prepared.bound, executor, scheduler, running.num_blocks, figures)
