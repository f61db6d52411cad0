"""One rank of an engine, ready for steps. Every rank is one of these: nothing in it tells rank 0 from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hotplug.core.layers.kv_cache import KVBlocks
from hotplug.core.models.decoder import Decoder
from hotplug.core.runner.executable import Executable
from hotplug.core.runner.memory_guard import MemoryGuard
from hotplug.core.runner.runner import Runner


@dataclass(frozen=True, slots=True)
class RankWorker:
    """A model, or a rank's part of one, with its weights, its KV cache, and what runs steps on both."""

    model: Decoder
    cache: Sequence[KVBlocks]
    """Keys and values by layer."""
    executable: Executable
    """How a step runs: op by op, recorded or compiled."""
    runner: Runner
    """Makes steps of plans."""
    step_guard: MemoryGuard
    """Around a step: explains an allocation that fails in it."""
