"""What travels between a front end and the engine: sampling parameters, requests, tokens, statistics.

Messages are msgspec structs, so one definition serves the Python API, the process boundary and validation.
This module knows nothing of HTTP, scheduling or devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from hotplug.core.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenIds = Sequence[int] | npt.NDArray[np.int32]
else:
    TokenIds = Any  # msgspec reads annotations, and knows no arrays

FinishReason = Literal["stop", "length", "abort", "error"]
NO_TOKEN = -2
"""What is sampled where no token can be chosen (`core.ops.sampling`). -1 stands for tokens not given or proposed."""

MAX_LOGPROBS = 20
"""The most alternatives a request may ask for per token (the OpenAI API's own limit)."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the tokens of one request. Validated on construction.

    Temperature 0 is greedy. `top_k` 0 means all tokens. `max_tokens` None runs to the end of the context;
    before `min_tokens`, tokens that would end it are not chosen: stop tokens, and unless `ignore_eos` the model's own.
    `seed` fixes the random numbers of this request whatever else is in the batch; None draws a fresh one.
    `logprobs` k returns the log-probability of each chosen token and the k most likely alternatives, taken
    from the model's own distribution before penalties and temperature; `prompt_logprobs` does so for the
    prompt.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logits_processors: dict[str, dict[str, Any]] | None = None
    """Processors of installed plugins by name, each with its arguments."""
    speculative: bool | None = None
    """Whether to verify several proposed tokens a step; None leaves it to the engine's configuration. The output is
    the same either way."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise RequestError(f"{name} must be a finite number, got {value!r}", param=name)
        _check(self.n >= 1, "n", self.n, "at least 1")
        _check(self.n <= 128, "n", self.n, "at most 128")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        if self.max_tokens is not None:
            _check(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens,
                   f"at most max_tokens ({self.max_tokens})")  # fmt: skip
        _check(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "between 0 and 100")
        _check(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _check(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 keeps all tokens)")
        _check(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1")
        _check(self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0")
        _check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty,
               "between -2 and 2")  # fmt: skip
        _check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty,
               "between -2 and 2")  # fmt: skip
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"between 0 and {MAX_LOGPROBS}")
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _check(all(self.stop), "stop", list(self.stop), "non-empty strings")
        for token, bias in (self.logit_bias or {}).items():
            _check(token >= 0, "logit_bias", token, "keyed by non-negative token ids")
            _check(math.isfinite(bias) and -100.0 <= bias <= 100.0, "logit_bias", bias,
                   "between -100 and 100")  # fmt: skip


def _check(ok: bool, param: str, value: object, requirement: str) -> None:
    if not ok:
        raise RequestError(f"{param} must be {requirement}, got {value!r}", param=param)


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate, as the engine sees it: token ids in, token ids out.

    `sampling.n` is 1 here: the front end expands a request for several completions. `priority`: lower runs
    first. `cache_salt` separates prefix-cache tenants. `eos_token_ids` end the sequence unless
    `sampling.ignore_eos`. Stop *strings* are the front end's business.
    """

    id: str
    prompt_token_ids: TokenIds
    """Integers, or [n] int32: what comes from another process is an array."""
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    arrival: float = 0.0
    """Seconds on the clock of `time.monotonic`, shared by the processes of one host."""
    tag: int = 0
    """What its front end finds it by: client number << 32 | slot. Comes back with every token, means nothing here."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the chosen token first, then the most likely ones, best first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of the chosen token in the distribution, 1 = most likely."""


class TokenDelta(msgspec.Struct, array_like=True):
    """What one step added to one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The end-of-sequence or stop token that ended the request; it is also the last of `token_ids`."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Sent once, with the first token: one entry a prompt token, None for the first."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache (on the first delta)."""
    queued: float = 0.0
    """Seconds between arrival and first being scheduled (on the first delta)."""
    error: str = ""
    """Why, when `finish_reason` is "error"."""
    tag: int = 0
    """The request's."""


class EngineStats(msgspec.Struct, array_like=True, kw_only=True):
    """A snapshot of the engine after a step; counters are totals since start."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Prompt tokens found there."""
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    reference_ops: int = 0
    """Call sites of the plan that run a plain-PyTorch reference on an accelerator."""
    recompiles: int = 0
    """Step shapes compiled while serving that were not planned at start."""
    host_blocks_used: int = 0
    host_blocks_total: int = 0
    """KV blocks of the swap space, 0 without one."""
    blocks_swapped_out: int = 0
    """KV blocks copied to the host when requests were preempted."""
    blocks_swapped_in: int = 0
    """KV blocks copied back when they returned."""
    verifications: int = 0
    """Decodes of a request that verified proposed tokens."""
    proposed_tokens: int = 0
    confirmed_tokens: int = 0
    """Proposed tokens, and those of them that the model's own choice confirmed."""
    phase_ns: list[int] = []
    """Nanoseconds of the loop in each of `hotplug.core.runner.timing.PHASES`."""
    step_buckets: list[int] = []
    """Steps by duration, in the buckets of `hotplug.core.runner.timing.STEP_SECONDS`."""
