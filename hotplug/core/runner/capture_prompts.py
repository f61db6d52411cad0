"""Recorded steps that hold prompt chunks, beside decodes: for short prompts the host launches longer than the device
computes.

The layout of a step is static: `decodes` entries of one token, then up to `CHUNKS` prompt chunks of `tokens` tokens
together. What is left of either belongs to the batch's spare row: decodes of its first token, and a last chunk that
holds the tokens that no request has. So every token is of some entry, and padding writes to the null block alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hotplug.core.runner.device_batch import DeviceBatch, Region
from hotplug.core.runner.executable import EagerStep, HostStep, StepOutputs
from hotplug.core.runner.timing import PREPARE
from hotplug.core.sample.sampler import Draw, Sampler

CHUNKS = 8
"""Prompt chunks that a recorded step holds at most."""
_LEAST = 128
"""Tokens of the smallest shape: below, padding costs less than another shape."""
_DRAWS = (Draw.GREEDY, Draw.RANDOM)
"""Ways to draw that are recorded; the scores themselves are asked for too seldom."""

Capture = Callable[[Callable[[], None]], Callable[[], Any]]


class PromptShape(NamedTuple):
    """The size of a recorded step with prompt chunks."""

    decodes: int
    tokens: int
    """Of all chunks together."""

    @property
    def size(self) -> tuple[int, int]:
        """(tokens, requests)."""
        return self.decodes + self.tokens, self.decodes + CHUNKS + 1


def prompt_shapes(max_num_seqs: int, max_tokens: int) -> list[PromptShape]:
    """Shapes to record for chunks of up to `max_tokens` tokens, smallest first; none below the smallest shape.

    Chunks in powers of two; beside them no decodes, a few, or steps of half the largest batch's power of two.
    """
    sizes = [1 << i for i in range(_LEAST.bit_length() - 1, max_tokens.bit_length()) if 1 << i <= max_tokens]
    middle = [n for n in (16, 64, 128, 256, 384, 512, 768) if n < max_num_seqs]
    shapes = [PromptShape(decodes, tokens) for decodes in (0, *middle, max_num_seqs) for tokens in sizes]
    return sorted(shapes, key=lambda shape: shape.size)


class RecordedPrompts:
    """One shape: its inputs on the device, and a recorded step for each way to draw that is recorded."""

    def __init__(self, shape: PromptShape, eager: EagerStep, batch: DeviceBatch, sampler: Sampler) -> None:
        self.shape = shape
        self._eager = eager
        self._batch = batch
        self._sampler = sampler
        tokens, requests = shape.size
        scores = requests - 1
        sizes = {"given": tokens, "rows": requests, "start": requests, "query_start": requests + 1, "scored": scores,
                 "scored_rows": scores, "counters": scores}  # fmt: skip
        self._host = Region(batch, sizes)
        self._tokens = torch.zeros(scores, dtype=torch.int64, device=batch.device)
        self._replay: dict[Draw, Callable[[], Any]] = {}
        self._fill_empty(self._host)
        self._host.send()

    def holds(self, decodes: int, tokens: int) -> bool:
        return decodes <= self.shape.decodes and tokens <= self.shape.tokens

    def warm_up(self) -> None:
        """Run the step in every way: what is made on first use must not be recorded."""
        for draw in _DRAWS:
            self._step(draw)

    def record(self, capture: Capture) -> None:
        self.warm_up()
        for draw in _DRAWS:
            self._replay[draw] = capture(partial(self._step, draw))

    def release(self) -> None:
        self._replay.clear()

    def __call__(self, step: HostStep) -> StepOutputs:
        """Replay with a step that the shape holds, drawn in a way that is recorded."""
        self._batch.update_tables(step.plan)
        self._fill(step)
        self._host.send()
        step.timer.lap(PREPARE)
        self._replay[step.draw]()
        return StepOutputs(None, None, self._tokens[: len(step.rows)])

    def _fill_empty(self, host: Region) -> None:
        """A step of padding alone."""
        decodes, tokens = self.shape
        host["given"][:] = 0
        host["rows"][:] = host["scored_rows"][:] = self._batch.spare_row
        host["start"][:] = 0
        host["start"][decodes:-1] = 1  # an empty chunk has a length too
        host["query_start"][: decodes + 1] = range(decodes + 1)
        host["query_start"][decodes + 1 : -1] = decodes
        host["query_start"][-1] = decodes + tokens
        host["scored"][:] = host["counters"][:] = 0

    def _fill(self, step: HostStep) -> None:
        plan, host, first = step.plan, self._host, self.shape.decodes
        host.begin()
        self._fill_empty(host)
        n, chunks = plan.num_decodes, len(plan.rows) - plan.num_decodes
        host["given"][:n] = -1
        host["given"][n - len(plan.drafts) : n] = plan.drafts
        ends = first + np.cumsum(plan.num_tokens[n:])
        begin = first
        for i, end in enumerate(ends.tolist(), n):
            start = int(plan.start[i])
            host["given"][begin:end] = self._batch.tokens[plan.rows[i], start : start + end - begin]
            begin = end
        for at, part in ((0, slice(0, n)), (first, slice(n, n + chunks))):
            host["rows"][at : at + part.stop - part.start] = plan.rows[part]
            host["start"][at : at + part.stop - part.start] = plan.start[part]
        host["query_start"][first + 1 : first + 1 + chunks] = ends
        host["query_start"][first + 1 + chunks : -1] = begin
        scored = len(step.rows)
        host["scored"][:n] = range(n)
        host["scored"][n:scored] = ends[plan.samples[n:]] - 1
        host["scored_rows"][:scored] = step.rows
        host["counters"][:scored] = step.counters

    def _step(self, draw: Draw) -> None:
        on = self._host.on_device
        inputs = self._batch.mixed(
            on["rows"], on["start"], on["given"], on["query_start"], on["scored"], num_decodes=self.shape.decodes,
            max_query_len=self.shape.tokens,
        )  # fmt: skip
        logits = self._eager.run(inputs).logits
        assert isinstance(logits, Tensor)
        tokens = self._sampler.draw(logits, on["scored_rows"], on["counters"], draw)
        self._batch.last_tokens[on["scored_rows"]] = tokens.to(self._batch.index_dtype)
        self._tokens.copy_(tokens)


def served(step: HostStep, shapes: Sequence[PromptShape]) -> int | None:
    """Index of the smallest of `shapes` (smallest first) that holds a step with prompt chunks; None where none does."""
    plan = step.plan
    if step.draw not in _DRAWS or not step.scored_only or len(plan.rows) - plan.num_decodes > CHUNKS:
        return None
    tokens = int(plan.num_tokens[plan.num_decodes :].sum())
    return next((i for i, s in enumerate(shapes) if s.decodes >= plan.num_decodes and s.tokens >= tokens), None)
