"""The one runner: applies a step plan to the persistent batch, runs the step, samples, hands back tokens.

It knows no platform: kernels come bound in the model, memory from the KV cache, order from the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hotplug.core.logprobs import Columns, TokenLogprobs
from hotplug.core.models.decoder import Decoder
from hotplug.core.platform.optional import HasRuntime
from hotplug.core.runner.device_batch import DeviceBatch
from hotplug.core.runner.executable import Executable, HostStep, StepOutputs
from hotplug.core.runner.timing import LAUNCH, StepTimer
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

    def columns(self) -> Columns:
        found = [part.columns(self.num_top) for part in self.parts]
        return Columns(*map(np.concatenate, zip(*found, strict=True)))


class _Tokens:
    """Sampled tokens on their way to the host: copied beside later steps where the platform has a runtime."""

    def __init__(self, tokens: Tensor, runtime: HasRuntime | None) -> None:
        self._event = None
        if runtime is None:
            self._host = tokens.clone()  # a recorded step writes to the same memory again
        else:
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
                begins = _begins(plan)
                tokens, accepted = tokens[: begins[-1]], tokens[begins[-1] :]
                ends = begins[:-1] + accepted
                for i in plan.verifies:
                    verified[int(plan.rows[i])] = tokens[begins[i] : ends[i] + 1].tolist()
                tokens = tokens[ends]
            token_ids[plan.samples] = tokens
            if self.sampled.logprobs is not None:
                entries = self.sampled.logprobs.to_host(self.sampled.logprob_counts)
                for row, entry in zip(self.sampled.logprob_rows, entries, strict=True):
                    logprobs.setdefault(row, []).append(entry)
        prompt = {scores.row: scores.columns() for scores in self.prompt_scores if scores.parts}
        return StepResult(token_ids, logprobs, prompt, verified)


def _begins(plan: StepPlan) -> npt.NDArray[np.int64]:
    """[Q + 1] where each of the Q entries that sample has its first among the tokens sampled, and their number."""
    counts = np.ones(int(plan.samples.sum()), np.int64)
    counts[plan.num_decodes : plan.first_chunk] = plan.num_tokens[plan.num_decodes : plan.first_chunk]
    return np.append(0, np.cumsum(counts))


def _proposed(plan: StepPlan, begins: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[S] what was proposed in the place of each token that is sampled; -1 where nothing was."""
    tokens = np.full(begins[-1], -1, np.int64)
    tokens[plan.num_decodes : plan.num_decodes + len(plan.drafts) - 1] = plan.drafts[1:]
    tokens[begins[1:] - 1] = -1
    return tokens


class Runner:
    """Runs steps of one model on one device."""

    def __init__(
        self,
        model: Decoder,
        batch: DeviceBatch,
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
        self.timer = StepTimer()

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
        step = plan.unrolled()
        rows, ends = step.rows, step.start + step.num_tokens
        if step.num_decodes < len(rows):  # some are prompt chunks
            rows, ends = rows[step.samples], ends[step.samples]
        counters = np.subtract(ends, self._batch.num_prompt_tokens[rows], dtype=np.int64)
        scored_only = not self._prompt_logprobs or not any(
            row in self._prompt_logprobs for row in step.rows[step.num_decodes :].tolist()
        )
        demand = self._sampler.demand(rows, counters)
        outputs = self._executable(HostStep(step, rows, demand, counters, scored_only, self.timer))
        sampled = tokens = None
        if len(rows):
            if outputs.tokens is not None:
                sampled = Sampled(outputs.tokens, None, [], [])
            else:
                assert outputs.logits is not None
                sampled = self._sampler.sample(outputs.logits, rows, counters)
            kept = outputs.tokens is not None and not plan.num_verifies  # in the batch already
            host = sampled.tokens if kept else self._settle(plan, sampled.tokens)
            tokens = _Tokens(host, self._runtime)
        handle = StepHandle(plan, sampled, tokens, self._score_prompts(step, outputs))
        self.timer.lap(LAUNCH)
        return handle

    def _settle(self, plan: StepPlan, tokens: Tensor) -> Tensor:
        """Keep each row's last one of the sampled `tokens` [S]; returns what the host needs (`StepHandle.tokens`)."""
        batch, rows = self._batch, plan.rows[plan.samples]
        if plan.num_verifies:
            begins = _begins(plan)
            where, first, proposed = batch.upload(rows, begins, _proposed(plan, begins))
            accepted, last = self._sampler.verify(tokens, proposed, first)
            host = torch.cat((tokens, accepted.to(tokens.dtype)))
        else:
            (where,), last, host = batch.upload(rows), tokens, tokens
        batch.last_tokens[where] = last.to(batch.last_tokens.dtype)
        return host

    @torch.inference_mode()
    def save(self, blocks: list[tuple[int, bytes]]) -> None:
        """Hand full blocks to the KV connector, outside of a step."""
        if self._transfer is not None:
            self._transfer.save(blocks)

    def _apply(self, plan: StepPlan) -> None:
        """Bring the persistent batch up to date, but for its block tables: these go with the step's inputs."""
        if len(plan.released):
            self._sampler.release(plan.released)
            for row in plan.released.tolist():
                self._prompt_logprobs.pop(row, None)
        for a in plan.admitted:
            self._batch.admit(a)
            self._sampler.admit(a.row, a.sampling, a.seed, a.token_ids, a.num_prompt_tokens, a.eos_token_ids)
            if a.sampling.prompt_logprobs is not None:
                self._prompt_logprobs[a.row] = a.sampling.prompt_logprobs

    def _score_prompts(self, plan: StepPlan, outputs: StepOutputs) -> list[_PromptScores]:
        """Log-probabilities of the prompt tokens that follow each position of this step's chunks."""
        if not self._prompt_logprobs or outputs.hidden is None:
            return []
        found = []
        ends = np.cumsum(plan.num_tokens)
        for i in range(plan.num_decodes, len(plan.rows)):
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
