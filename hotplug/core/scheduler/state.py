"""What the parts of the scheduler share: the requests, the rows, the steps in flight, and the counts."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hotplug.core.kv.manager import KVManager
from hotplug.core.request import EngineStats
from hotplug.core.scheduler.config import MOST_SCORED, SchedulerConfig
from hotplug.core.scheduler.plan import StepPlan
from hotplug.core.scheduler.running import RunningBatch
from hotplug.core.scheduler.sequence import Sequence, Status
from hotplug.core.scheduler.waiting import WaitingQueue


@dataclass(slots=True)
class InFlight:
    """A plan whose results are outstanding."""

    plan: StepPlan
    generations: npt.NDArray[np.int64]
    """[R] generation of each row when planned."""
    preempted: dict[int, Sequence] = field(default_factory=dict)
    """By index in the plan: requests that lost their row since."""


class SchedulerState:
    """Requests, rows, queue and steps in flight. `planning`, `residency` and `results` change it; nobody else does."""

    def __init__(self, config: SchedulerConfig, kv: KVManager) -> None:
        self.config = config
        self.kv = kv
        # The last token of a sequence needs no KV. A sequence that has the pool to itself always fits: this is
        # what rules out a deadlock.
        self.max_model_len = min(config.max_model_len, kv.max_tokens_alone(config.max_num_batched_tokens) + 1)
        """Longest sequence that can be served: the configured one, or less where the KV pool is smaller."""
        self.most_scored = config.max_prefill_requests or max(config.max_num_seqs, MOST_SCORED)
        self.batch = RunningBatch(config.max_num_seqs, self.max_model_len)
        self.waiting = WaitingQueue()
        self.requests: dict[str, Sequence] = {}
        self.arriving: dict[Future[Any], tuple[Sequence, int]] = {}
        """Requests in `Status.WAITING_FOR_KV`: by what fetches their blocks, each with the first of these."""
        self.prefilling: list[int] = []
        """Rows whose prompt is not planned to its end, in the order of their admission."""
        self.released: list[int] = []
        """Rows freed since the last plan."""
        self.in_flight: deque[InFlight] = deque()
        self.num_speculating = 0
        """Requests with a drafter that have not ended."""
        self.stats = EngineStats(kv_blocks_total=kv.pool.num_usable)
        if kv.host is not None:
            self.stats.host_blocks_total = kv.host.blocks.num_usable

    def free_row(self, seq: Sequence) -> None:
        """Take a sequence's row and its blocks away."""
        row = seq.row
        seq.status = Status.WAITING
        if row in self.prefilling:
            self.prefilling.remove(row)
        self.kv.free(row)
        self.batch.remove(seq)
        self.released.append(row)

    def end(self, seq: Sequence) -> None:
        """End a request wherever it is; its blocks are free at once."""
        if seq.row >= 0:
            self.free_row(seq)
        else:
            if seq.status is Status.WAITING:
                self.waiting.remove(seq)
            self.drop_swapped(seq)
        seq.status = Status.ENDED
        seq.done = True
        self.num_speculating -= seq.drafter is not None
        del self.requests[seq.request.id]

    def drop_swapped(self, seq: Sequence) -> None:
        """Free what the host keeps of a sequence."""
        if seq.swapped is not None:
            self.kv.drop(seq.swapped)
            seq.swapped = None
