"""The sampler: the sampling state of every batch row, and the way from a step's logits to its tokens.

Parameters live on the device, indexed by row. The host keeps just enough (who is greedy, who has
penalties) to leave out what no row of the step needs. Order of effects: penalties and biases, logits processors,
temperature, top-k, top-p, min-p, then the draw. Log-probabilities are of the logits before all that.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hotplug.core.logprobs import Columns, TokenLogprobs
from hotplug.core.ops.plan import Plan
from hotplug.core.request import SamplingParams
from hotplug.core.sample.history import TokenHistory
from hotplug.core.sample.processors import Factory, RowProcessors, make_processors

Rows = npt.NDArray[np.int32]
Counters = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int64]
"""Token ids."""


class Draw(enum.Enum):
    """What the sampling of a step needs."""

    GREEDY = enum.auto()
    """The best token of every row."""
    RANDOM = enum.auto()
    """Temperatures, filters and seeds of the rows (the op `sample_rows`)."""
    LOGITS = enum.auto()
    """More than that: penalties, biases, log-probabilities or a logits processor of some row."""


_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_NEUTRAL = SamplingParams(temperature=0.0)


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities on the device, copied to the host when asked for."""

    chosen_ids: Tensor
    chosen: Tensor
    rank: Tensor
    top_ids: Tensor
    top: Tensor

    def to_host(self, counts: list[int]) -> list[TokenLogprobs]:
        """One entry a position; `counts` says how many alternatives each wants."""
        chosen_ids, chosen, rank = self.chosen_ids.tolist(), self.chosen.tolist(), self.rank.tolist()
        top_ids, top = self.top_ids.tolist(), self.top.tolist()
        return [
            TokenLogprobs([chosen_ids[i], *top_ids[i][:n]], [chosen[i], *top[i][:n]], rank[i])
            for i, n in enumerate(counts)
        ]

    def columns(self, top: int) -> Columns:
        """The same of all positions, with `top` alternatives each."""
        ids = torch.cat((self.chosen_ids[:, None], self.top_ids[:, :top]), 1).to(torch.int32)
        logprobs = torch.cat((self.chosen[:, None], self.top[:, :top]), 1).to(torch.float32)
        return Columns(*(column.cpu().numpy() for column in (ids, logprobs, self.rank.to(torch.int32))))


@dataclass(slots=True)
class Sampled:
    """A step's tokens, still on the device."""

    tokens: Tensor
    """int64 [S], `NO_TOKEN` where there is none (`core.ops.sampling`)"""
    logprobs: Logprobs | None
    logprob_rows: list[int]
    logprob_counts: list[int]


class Sampler:
    """Owns the sampling state of `max_rows` rows over a vocabulary."""

    def __init__(
        self,
        plan: Plan,
        max_rows: int,
        vocab: int,
        device: torch.device,
        processors: Mapping[str, Factory] = MappingProxyType({}),
        *,
        speculates: bool = False,
    ) -> None:
        """`speculates` says that steps may verify proposals."""
        self.vocab = vocab
        self._factories = processors
        self._device = device
        self._argmax = plan.bind("argmax", "argmax", "float32", vocab=vocab)
        self._sample = plan.bind("sample", "sample", "float32", vocab=vocab)
        self._sample_rows = plan.bind("sample_rows", "sample_rows", "float32", vocab=vocab)
        self._logprobs = plan.bind("logprobs", "logprobs", "float32", vocab=vocab)
        self._reject_sample = plan.bind("reject_sample", "reject_sample", "int") if speculates else None
        self._history = TokenHistory(plan, max_rows, vocab, device)

        # One row more than requests may have: what pads a step of static shape is greedy.
        self._host_floats = np.empty((len(_FLOATS), max_rows + 1), np.float32)
        self._host_floats[:] = [[getattr(_NEUTRAL, name)] for name in _FLOATS]
        self._host_ints = np.zeros((2, max_rows + 1), np.int64)
        """top_k and seed."""
        self._host = dict(zip(_FLOATS, self._host_floats, strict=True))
        floats = torch.from_numpy(self._host_floats.copy()).to(device)
        ints = torch.zeros((2, max_rows + 1), dtype=torch.int64, device=device)
        self._tables = (floats, ints)
        self._floats = dict(zip(_FLOATS, floats.unbind(), strict=True))
        self._host_top_k, self._host_seeds = self._host_ints
        self._top_k, self._seeds = ints.unbind()
        self._stale = False
        """Whether the host knows parameters that the device does not."""
        self._special = np.zeros(max_rows, bool)
        """Rows that need more than `sample_rows`, as long as they run."""
        self._warm = np.zeros(max_rows, bool)
        """Rows with a temperature, as long as they run."""
        self._num_logprobs = np.full(max_rows, -1, np.int32)
        self._min_tokens = np.zeros(max_rows, np.int64)
        self._has_bias = np.zeros(max_rows, bool)
        self._bias: dict[int, tuple[Ids, npt.NDArray[np.float32]]] = {}
        self._held_back: dict[int, Ids] = {}
        self._has_processor = np.zeros(max_rows, bool)
        self._processors: dict[int, RowProcessors] = {}

    def admit(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        token_ids: npt.NDArray[np.int32],
        num_prompt_tokens: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """Set up a row. `token_ids` holds the prompt and what was generated before a preemption."""
        for name in _FLOATS:
            self._host[name][row] = getattr(params, name)
        self._host_top_k[row], self._host_seeds[row] = params.top_k, seed
        self._stale = True
        self._warm[row] = params.temperature > 0
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._has_bias[row] = bool(params.logit_bias)
        if params.logit_bias:
            ids = np.array(list(params.logit_bias), np.int64)
            self._bias[row] = (ids, np.array(list(params.logit_bias.values()), np.float32))
        # Only what would end the request is held back: with nothing that does, the row is like any other.
        held = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)} if params.min_tokens else set()
        self._min_tokens[row] = params.min_tokens if held else 0
        if held:
            self._held_back[row] = np.array(sorted(held), np.int64)
        self._has_processor[row] = bool(params.logits_processors)
        if params.logits_processors:
            self._processors[row] = RowProcessors(self._factories, params.logits_processors, self.vocab)
            self._processors[row].start(token_ids, num_prompt_tokens, self._device)
        if _penalized(params):
            self._history.admit(row, token_ids, num_prompt_tokens)
        self._special[row] = (
            _penalized(params) or params.logprobs is not None or bool(params.logit_bias or params.logits_processors)
        )

    def check_processors(self, params: SamplingParams) -> None:
        """Raises RequestError for a processor that does not exist or does not take its arguments."""
        make_processors(self._factories, params.logits_processors or {}, self.vocab)

    def release(self, rows: Rows) -> None:
        """Forget what rows hold beyond their fixed-size parameters."""
        self._has_processor[rows] = self._special[rows] = self._warm[rows] = False
        self._min_tokens[rows] = 0
        for row in rows.tolist():
            self._processors.pop(row, None)
            self._bias.pop(row, None)
            self._held_back.pop(row, None)
            self._history.release(row)

    def demand(self, rows: Rows, counters: Counters) -> Draw:
        """What a step needs that samples for `rows` [S], each with `counters` [S] tokens generated before.

        Sends to the device what it does not know yet of admitted rows.
        """
        self._send()
        # Whether any row at all has it is known without picking those of the step, and mostly none has.
        special = self._special.any() and self._special[rows].any()
        if special or (self._min_tokens.any() and (counters < self._min_tokens[rows]).any()):
            return Draw.LOGITS
        return Draw.RANDOM if self._warm.any() and self._warm[rows].any() else Draw.GREEDY

    def draw(self, logits: Tensor, rows: Tensor, counters: Tensor, draw: Draw) -> Tensor:
        """Int64 [S] tokens for float32 `logits` [S, vocab] of batch `rows` [S], made on the device alone.

        For recorded steps: what it reads of a row is what the device knows when the step runs.
        """
        if draw is Draw.GREEDY:
            best: Tensor = self._argmax(logits)
            return best
        tokens: Tensor = self._sample_rows(
            logits, rows, self._floats["temperature"], self._top_k, self._floats["top_p"], self._floats["min_p"],
            self._seeds, counters,
        )  # fmt: skip
        return tokens

    def verify(self, tokens: Tensor, proposed: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The op `reject_sample`: how many proposals of each request hold, and the token after them."""
        assert self._reject_sample is not None
        accepted, last = self._reject_sample(tokens, proposed, first)
        return accepted, last

    def _send(self) -> None:
        if self._stale:
            floats, ints = self._tables
            floats.copy_(torch.from_numpy(self._host_floats.copy()), non_blocking=True)
            ints.copy_(torch.from_numpy(self._host_ints.copy()), non_blocking=True)
            self._stale = False

    def sample(self, logits: Tensor, rows: Rows, counters: Counters) -> Sampled:
        """Tokens for float32 `logits` [S, vocab] of batch `rows` [S], each with `counters` [S] tokens generated before.

        A row may occur several times, for as many successive tokens, unless it has penalties or logits processors.
        """
        self._send()
        raw = logits
        logits = self._adjust(logits, rows, counters)
        tokens: Tensor = self._argmax(logits)
        random = np.flatnonzero(self._host["temperature"][rows] > 0)
        if len(random):
            tokens[self._index(random)] = self._draw(logits, rows, counters, random)
        if self._history.active:
            self._history.append(rows, tokens.clamp(min=0))  # here and below NO_TOKEN would be an index
        for i in np.flatnonzero(self._has_processor[rows]).tolist():
            self._processors[int(rows[i])].accept(tokens[i].clamp(min=0))
        wanted = np.flatnonzero(self._num_logprobs[rows] >= 0)
        counts = self._num_logprobs[rows[wanted]]
        logprobs = None
        if len(wanted):
            index = self._index(wanted)
            logprobs = self.logprobs(raw[index], tokens[index].clamp(min=0), int(counts.max()))
        return Sampled(tokens, logprobs, rows[wanted].tolist(), counts.tolist())

    def logprobs(self, logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        """Log-probabilities of `tokens` [S] and the `num_top` best under `logits` [S, vocab]."""
        return Logprobs(tokens, *self._logprobs(logits, tokens, num_top))

    def _adjust(self, logits: Tensor, rows: Rows, counters: Counters) -> Tensor:
        """Penalties, biases, logits processors and held-back stop tokens; a new tensor if anything changes."""
        adjusted = self._history.penalize(logits, rows, self._floats) if self._history.active else logits
        biased = np.flatnonzero(self._has_bias[rows])
        short = np.flatnonzero(counters < self._min_tokens[rows])
        processed = np.flatnonzero(self._has_processor[rows])
        if adjusted is logits and (len(biased) or len(short) or len(processed)):
            adjusted = logits.clone()
        if len(biased):
            ids, values = zip(*(self._bias[row] for row in rows[biased].tolist()), strict=True)
            added = torch.from_numpy(np.concatenate(values)).to(self._device, non_blocking=True)
            adjusted.index_put_(self._cells(biased, ids), added, accumulate=True)
        for i in processed.tolist():
            self._processors[int(rows[i])].apply(adjusted[i])
        if len(short):
            never = adjusted.new_full((), float("-inf"))
            adjusted.index_put_(self._cells(short, [self._held_back[row] for row in rows[short].tolist()]), never)
        return adjusted

    def _cells(self, entries: npt.NDArray[np.int64], ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """The index of each of the token `ids` of each of the step's `entries`, for scores [S, vocab]."""
        index = np.stack((np.repeat(entries, [len(own) for own in ids]), np.concatenate(ids)))
        row, column = self._index(index)
        return row, column

    def _draw(self, logits: Tensor, rows: Rows, counters: Counters, which: npt.NDArray[np.int64]) -> Tensor:
        """Random tokens for the entries `which` of the step."""
        subset = rows[which]
        if len(which) < len(rows):
            logits = logits[self._index(which)]
        row = self._index(subset)
        filter_k = bool((self._host_top_k[subset] > 0).any())
        filter_p = bool((self._host["top_p"][subset] < 1).any())
        filter_min = bool((self._host["min_p"][subset] > 0).any())
        return self._sample(
            logits,
            self._floats["temperature"][row],
            self._top_k[row] if filter_k else None,
            self._floats["top_p"][row] if filter_p else None,
            self._floats["min_p"][row] if filter_min else None,
            self._seeds[row],
            self._index(counters[which]),
        )

    def _index(self, values: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device, non_blocking=True)


def _penalized(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
