"""What travels between a front end and the engine: sampling parameters, requests, tokens, statistics.

Messages are msgspec structs, so one definition serves the Python API, the process boundary and validation.
This module knows nothing of HTTP, scheduling or devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from hotplug.core import checks
from hotplug.core.logprobs import PromptLogprobs, TokenLogprobs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenIds = Sequence[int] | npt.NDArray[np.int32]
else:
    TokenIds = Any  # msgspec reads annotations, and knows no arrays

FinishReason = Literal["stop", "length", "error"]
NO_TOKEN = -2
"""What is sampled where no token can be chosen (`core.ops.sampling`). -1 stands for tokens not given or proposed."""

MAX_N = 128
"""The most completions of one prompt."""
MAX_LOGPROBS = 20
"""The most alternatives a request may ask for per token (the OpenAI API's own limit)."""
MAX_STOP = 64
MAX_STOP_CHARS = 1024
"""The most stop strings of a request, and characters of each."""
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_CACHE_SALT_CHARS = 1024
MAX_ID_CHARS = 1024
MAX_PROCESSORS = 64
MAX_PROCESSORS_DEPTH = 64
MAX_PROCESSORS_SIZE = 65_536
"""Characters and values in all of `logits_processors`."""
MAX_TOKEN_COUNT = checks.INT32
"""The most that a number of tokens may be said to be; above every context and vocabulary."""
MAX_PRIORITY = checks.INT32
MIN_TEMPERATURE = 1e-5
"""Below, the best token is as good as certain, and the division by it is not in float32: it counts as 0."""

_COUNT = checks.integer(1, MAX_TOKEN_COUNT)
_NOT_NEGATIVE = checks.integer(0, MAX_TOKEN_COUNT)
_LOGPROBS = checks.optional(checks.integer(0, MAX_LOGPROBS))
_PENALTY = checks.number(-2.0, 2.0)
_PROCESSORS = checks.plain(MAX_PROCESSORS_DEPTH, MAX_PROCESSORS_SIZE)


def _temperature(name: str, value: Any) -> float:
    found: float = _TEMPERATURE(name, value)
    return 0.0 if found < MIN_TEMPERATURE else found


_TEMPERATURE = checks.number(0.0, 100.0)


def _processors(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        checks.refuse(name, "arguments by the name of a processor", value)
    if len(value) > MAX_PROCESSORS:
        checks.refuse(name, f"at most {MAX_PROCESSORS} processors", value)
    if not all(isinstance(one, Mapping) for one in value.values()):
        checks.refuse(name, "arguments by the name of a processor", value)
    return _PROCESSORS(name, value) or None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the tokens of one request.

    Every value is checked on construction, for type and range (the constants of this module), wherever a request comes
    from; RequestError names the one at fault. NumPy's numbers become Python's, lists tuples.

    Temperature 0 is greedy. `top_k` 0 means all tokens. `max_tokens` None runs to the end of the context;
    before `min_tokens`, tokens that would end it are not chosen: stop tokens, and unless `ignore_eos` the model's own;
    a stop string counts from the token after them.
    `stop` is one string or several. `logit_bias` may have its token ids written as text, as JSON does.
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
    keep_special_tokens: tuple[int, ...] = ()
    """Special tokens that stay in the text although `skip_special_tokens`: tags that a parser of answers looks for."""
    logits_processors: dict[str, dict[str, Any]] | None = None
    """Processors of installed plugins by name, each with its arguments: what JSON can say."""
    speculative: bool | None = None
    """Whether to verify several proposed tokens a step; None leaves it to the engine's configuration. The output is
    the same either way."""

    def __post_init__(self) -> None:
        _apply(_SAMPLING_RULES, self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            checks.refuse("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)


def _apply(rules: Sequence[tuple[str, object, checks.Rule]], struct: msgspec.Struct) -> None:
    """Check what is not the default, and keep it as plain Python."""
    for name, default, rule in rules:
        value = getattr(struct, name)
        if value is not default:
            checked = rule(name, value)
            if checked is not value:
                msgspec.structs.force_setattr(struct, name, checked)


_Struct = TypeVar("_Struct", bound=msgspec.Struct)


def changed(struct: _Struct, **values: Any) -> _Struct:
    """A copy with other values. Unlike `msgspec.structs.replace` it checks nothing again: for values known to be right
    where the check is felt, as for 128 completions of one request."""
    found: _Struct = struct.__copy__()  # type: ignore[attr-defined]
    for name, value in values.items():
        msgspec.structs.force_setattr(found, name, value)
    return found


def _rules(struct: type[msgspec.Struct], rules: dict[str, checks.Rule]) -> list[tuple[str, object, checks.Rule]]:
    """With the default of each field, which needs no check: most fields of most requests have it."""
    return [(field.name, field.default, rules[field.name]) for field in msgspec.structs.fields(struct)
            if field.name in rules]  # fmt: skip


_SAMPLING_RULES = _rules(SamplingParams, {
    "n": checks.integer(1, MAX_N),
    "max_tokens": checks.optional(_COUNT),
    "min_tokens": _NOT_NEGATIVE,
    "temperature": _temperature,
    "top_p": checks.number(0.0, 1.0, above=True),
    "top_k": _NOT_NEGATIVE,
    "min_p": checks.number(0.0, 1.0),
    "repetition_penalty": checks.number(0.001, 1000.0),  # scores times or by it stay far from float32's ends
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": checks.optional(checks.biases(MAX_LOGIT_BIAS, 100.0)),
    "seed": checks.optional(checks.integer(-(2**63), 2**63 - 1)),
    "stop": checks.texts(MAX_STOP, checks.text(MAX_STOP_CHARS, least=1)),
    "stop_token_ids": checks.integers(MAX_STOP_TOKEN_IDS, 0, checks.INT32),
    "include_stop_str_in_output": checks.flag,
    "ignore_eos": checks.flag,
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "skip_special_tokens": checks.flag,
    "keep_special_tokens": checks.integers(MAX_STOP_TOKEN_IDS, 0, checks.INT32),
    "logits_processors": checks.optional(_processors),
    "speculative": checks.optional(checks.flag),
})  # fmt: skip


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate, as the engine sees it: token ids in, token ids out. Raises RequestError.

    `sampling.n` is 1 here: the front end expands a request for several completions. `priority`: lower runs
    first. `cache_salt` separates prefix-cache tenants. `eos_token_ids` end the sequence unless
    `sampling.ignore_eos`; the engine leaves out those beyond its vocabulary. Stop *strings* are the front end's
    business. The prompt is checked by the engine, which knows the vocabulary and the context.
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

    def __post_init__(self) -> None:
        _apply(_REQUEST_RULES, self)


def _is_sampling(name: str, value: Any) -> SamplingParams:
    if not isinstance(value, SamplingParams):
        checks.refuse(name, "SamplingParams", value)
    return value


_REQUEST_RULES = _rules(Request, {
    "id": checks.text(MAX_ID_CHARS),
    "sampling": _is_sampling,
    "eos_token_ids": checks.integers(MAX_STOP_TOKEN_IDS, -checks.INT64 - 1, checks.INT64),
    "priority": checks.integer(-MAX_PRIORITY - 1, MAX_PRIORITY),
    "cache_salt": checks.text(MAX_CACHE_SALT_CHARS),
    "arrival": checks.number(-1e18, 1e18),
    "tag": checks.integer(0, checks.INT64),
})  # fmt: skip


class TokenDelta(msgspec.Struct, array_like=True):
    """What one step added to one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The end-of-sequence or stop token that ended the request; it is also the last of `token_ids`."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """Sent once, with the first token."""
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
    """Requests in the queue, without those of `waiting_for_kv`."""
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
    accepted_tokens: int = 0
    """Proposed tokens, and those of them that the model's own choice accepted."""
    waiting_for_kv: int = 0
    """Requests whose KV blocks are on their way from a connector."""
    phase_ns: list[int] = []
    """Nanoseconds of the loop in each of `hotplug.core.runner.timing.PHASES`."""
    step_buckets: list[int] = []
    """Steps by duration, in the buckets of `hotplug.core.runner.timing.STEP_SECONDS`."""
