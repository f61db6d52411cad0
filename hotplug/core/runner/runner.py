"""The one runner: applies a step plan to the persistent batch, runs the step, samples, hands back tokens.

It knows no platform: kernels come bound in the model, memory from the KV cache, order from the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hotplug.core.models.decoder import Decoder
from hotplug.core.platform.optional import HasRuntime
from hotplug.core.request import TokenLogprobs
from hotplug.core.runner.batch import Batch
from hotplug.core.runner.executable import Executable, HostStep, StepOutputs
from hotplug.core.sample.sampler import Logprobs, Sampled, Sampler
from hotplug.core.scheduler.plan import StepPlan, StepResult
from hotplug.core.transfer.blocks import BlockTransfer
from hotplug.core.transfer.swap import BlockSwap

PROMPT_LOGPROB_ROWS = 256
"""Prompt positions scored at once: bounds the [rows, vocab] logits of a request that asks for them."""


@dataclass(slots=True)
class _PromptScores:
    """Log-probabilities of one row's prompt chunk, on the device, in parts."""

    row: int
    num_top: int
    parts: list[Logprobs] = field(default_factory=list)


class _Tokens:
    """Sampled tokens on their way to the host: copied beside later steps where the platform has a runtime."""

    def __init__(self, tokens: Tensor, runtime: HasRuntime | None) -> None:
        self._host, self._event = tokens, None
        if runtime is not None:
            self._host, self._event = runtime.pinned(tokens.shape, tokens.dtype), runtime.event()
            self._host.copy_(tokens, non_blocking=True)
            self._event.record()

    def wait(self) -> npt.NDArray[np.int64]:
        """int64 [S], once their step has run."""
        if self._event is not None:
            self._event.synchronize()
        found: npt.NDArray[np.int64] = self._host.to("cpu").numpy()
        return found


@dataclass(slots=True)
class StepHandle:
    """A step in flight. `result` waits for its tokens."""

    plan: StepPlan
    sampled: Sampled | None
    tokens: _Tokens | None
    """[S] sampled; where the plan verifies, followed by how many proposals of each sampling request hold."""
    prompt_scores: list[_PromptScores]

    def result(self) -> StepResult:
        plan = self.plan
        token_ids = np.zeros(len(plan.rows), np.int32)
        logprobs: dict[int, list[TokenLogprobs]] = {}
        verified: dict[int, list[int]] = {}
        if self.sampled is not None and self.tokens is not None:
            tokens = self.tokens.wait()
            if plan.num_verifies:
                first = first_scored(plan)
                tokens, confirmed = tokens[: first[-1]], tokens[first[-1] :]
                ends = first[:-1] + confirmed
                for i in plan.verifies:
                    verified[int(plan.rows[i])] = tokens[first[i] : ends[i] + 1].tolist()
                tokens = tokens[ends]
            token_ids[plan.samples] = tokens
            if self.sampled.logprobs is not None:
                entries = self.sampled.logprobs.to_host(self.sampled.logprob_counts)
                for row, entry in zip(self.sampled.logprob_rows, entries, strict=True):
                    logprobs.setdefault(row, []).append(entry)
        prompt = {
            scores.row: [entry for part in scores.parts for entry in part.to_host([scores.num_top] * len(part.rank))]
            for scores in self.prompt_scores
        }
        return StepResult(token_ids, logprobs, prompt, verified)


def first_scored(plan: StepPlan) -> npt.NDArray[np.int64]:
    """[Q + 1] where each of the Q entries that sample begins among the plan's scored tokens, and their number."""
    entries, _ = plan.scored()
    return np.append(np.flatnonzero(np.diff(entries, prepend=-1)), len(entries))


def proposed(plan: StepPlan) -> npt.NDArray[np.int64]:
    """[S] what was proposed to follow each of the plan's scored tokens; -1 where nothing was."""
    tokens = np.full(len(plan.scored()[0]), -1, np.int64)
    begin = plan.num_decodes  # each decode has one scored token
    tokens[begin : begin + len(plan.drafts) - 1] = plan.drafts[1:]
    tokens[begin + np.cumsum(plan.num_tokens[begin : plan.first_chunk]) - 1] = -1
    return tokens


class Runner:
    """Runs steps of one model on one device."""

    def __init__(
        self,
        model: Decoder,
        batch: Batch,
        sampler: Sampler,
        executable: Executable,
        transfer: BlockTransfer | None = None,
        runtime: HasRuntime | None = None,
        swap: BlockSwap | None = None,
    ) -> None:
        self._transfer = transfer
        self._swap = swap
        self._runtime = runtime
        self._model = model
        self._batch = batch
        self._sampler = sampler
        self._executable = executable
        self._prompt_logprobs: dict[int, int] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepHandle:
        """Launch a step; returns at once where the device runs asynchronously."""
        if self._transfer is not None:
            self._transfer.save(plan.saves)
        if self._swap is not None:
            self._swap.swap_out(plan.swap_out)
            self._swap.swap_in(plan.swap_in)
        if self._transfer is not None:
            self._transfer.load(plan.loads)
        self._apply(plan)
        entries, position = plan.scored()
        rows = plan.rows[entries]
        counters = position + 1 - self._batch.num_prompt_tokens[rows]
        scored_only = not any(row in self._prompt_logprobs for row in plan.rows[plan.first_chunk :].tolist())
        demand = self._sampler.demand(rows, counters)
        outputs = self._executable(HostStep(plan, rows, demand, counters, scored_only))
        sampled = tokens = None
        if len(rows):
            if outputs.tokens is not None:
                sampled = Sampled(outputs.tokens, None, [], [])
                tokens = _Tokens(sampled.tokens, self._runtime)
            else:
                assert outputs.logits is not None
                sampled = self._sampler.sample(outputs.logits, rows, counters)
                tokens = _Tokens(self._settle(plan, sampled.tokens), self._runtime)
        return StepHandle(plan, sampled, tokens, self._score_prompts(plan, outputs))

    def _settle(self, plan: StepPlan, tokens: Tensor) -> Tensor:
        """Keep each request's last one of the sampled `tokens` [S]; returns what the host needs (`StepHandle.tokens`)."""
        batch, host = self._batch, tokens
        rows = plan.rows[plan.samples]
        if plan.num_verifies:
            where, first, drafts = batch.upload(rows, first_scored(plan), proposed(plan))
            confirmed, last = self._sampler.verify(tokens, drafts, first)
            host = torch.cat((tokens, confirmed.to(tokens.dtype)))
        else:
            (where,), last = batch.upload(rows), tokens
        batch.last_tokens[where] = last.to(batch.last_tokens.dtype)
        return host

    @torch.inference_mode()
    def save(self, blocks: list[tuple[int, bytes]]) -> None:
        """Hand full blocks to the KV connector, outside of a step."""
        if self._transfer is not None:
            self._transfer.save(blocks)

    def _apply(self, plan: StepPlan) -> None:
        """Bring the persistent batch up to date."""
        if len(plan.released):
            self._sampler.release(plan.released)
            for row in plan.released.tolist():
                self._prompt_logprobs.pop(row, None)
        for a in plan.admitted:
            self._batch.admit(a)
            self._sampler.admit(a.row, a.sampling, a.seed, a.token_ids, a.num_prompt_tokens, a.eos_token_ids)
            if a.sampling.prompt_logprobs is not None:
                self._prompt_logprobs[a.row] = a.sampling.prompt_logprobs
        self._batch.update_tables(plan)

    def _score_prompts(self, plan: StepPlan, outputs: StepOutputs) -> list[_PromptScores]:
        """Log-probabilities of the prompt tokens that follow each position of this step's chunks."""
        if not self._prompt_logprobs or outputs.hidden is None:
            return []
        found = []
        ends = np.cumsum(plan.num_tokens)
        for i in range(plan.first_chunk, len(plan.rows)):
            row, start, count = int(plan.rows[i]), int(plan.start[i]), int(plan.num_tokens[i])
            if row not in self._prompt_logprobs:
                continue
            scores = _PromptScores(row, self._prompt_logprobs[row])
            begin = int(ends[i]) - count
            prompt_end = int(self._batch.num_prompt_tokens[row])
            following = self._batch.tokens[row, start + 1 : min(start + count + 1, prompt_end)]
            targets = self._batch.upload(following)[0].to(torch.int64)
            for at in range(0, len(targets), PROMPT_LOGPROB_ROWS):
                part = targets[at : at + PROMPT_LOGPROB_ROWS]
                hidden: Tensor = outputs.hidden[begin + at : begin + at + len(part)]
                scores.parts.append(self._sampler.logprobs(self._model.logits(hidden), part, scores.num_top))
            found.append(scores)
        return found
