"""A model's logits at every position of a prompt, computed through the runner's own pieces in chosen chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hotplug.core.config import EngineConfig
from hotplug.core.models.loader import load_weights
from hotplug.core.platform.discovery import Candidate
from hotplug.core.request import SamplingParams
from hotplug.core.scheduler.plan import Admission, StepPlan
from hotplug.core.startup.bind import bind

ROW = 1  # not 0, so that a mix-up of rows and batch positions shows
NO_INTS = np.zeros(0, np.int32)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


class ModelRun:
    """A loaded checkpoint with a small KV cache whose blocks are handed out in a shuffled order."""

    def __init__(self, folder: Path, *, max_len: int = 64, block_size: int = 4,
                 candidates: Sequence[Candidate] | None = None, **options: object) -> None:  # fmt: skip
        fixed = {"model": str(folder), "device": "cpu", "max_num_seqs": 4, "max_model_len": max_len}
        config = EngineConfig(**{**fixed, "block_size": block_size, **options})
        self.bound = bind(config, candidates=candidates)
        load_weights(self.bound.model.decoder, self.bound.checkpoint)
        tables, blocks = self.bound.kv.groups.num_tables, -(-max_len // block_size)
        pages = tables * blocks
        self.kv = self.bound.kv.allocate(1 + pages, self.bound.placement)
        self.block_ids = np.random.default_rng(0).permutation(np.arange(1, pages + 1)).astype(np.int32)
        self.cells = np.indices((tables, blocks), np.int32).reshape(2, -1)
        """[2, pages] table and column that each of `block_ids` goes to."""

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        """Float32 [len(token_ids), vocab]; `chunks` are the steps' token counts, a 1 after the first is a decode."""
        assert sum(chunks) == len(token_ids)
        batch, model = self.bound.rows.batch, self.bound.model.decoder
        start, found = 0, []
        for count in chunks:
            decode = count == 1 and start > 0
            if decode:
                batch.last_tokens[ROW] = token_ids[start]
            plan = self._plan(token_ids, start, count, decode=decode)
            for admission in plan.admitted:
                batch.admit(admission)
            found.append(model.logits(model(batch.inputs(plan), self.kv)[0]))
            start += count
        return torch.cat(found)

    def _plan(self, token_ids: Sequence[int], start: int, count: int, *, decode: bool) -> StepPlan:
        tables, columns = self.cells if start == 0 else (NO_INTS, NO_INTS)
        admission = Admission(ROW, int32(*token_ids), len(token_ids), SamplingParams(), seed=0, eos_token_ids=())
        return StepPlan(
            rows=int32(ROW),
            start=int32(start),
            num_tokens=int32(count),
            samples=np.array([True]),
            num_decodes=int(decode),
            released=NO_INTS,
            admitted=[] if start else [admission],
            block_tables=tables,
            block_rows=np.full_like(columns, ROW),
            block_cols=columns,
            block_ids=self.block_ids[: len(columns)],
        )
