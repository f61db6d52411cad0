"""From token deltas to text: what a front end keeps of each completion, and what it hands to its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from hotplug.core.logprobs import PromptLogprobs, TokenLogprobs
from hotplug.core.request import FinishReason, SamplingParams, TokenDelta
from hotplug.core.text.detokenizer import Detokenizer, LateStops
from hotplug.core.text.tokenizer import Tokenizer


@dataclass(slots=True)
class CompletionChunk:
    """What one step added to one completion, as text."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for the model's own end of sequence."""
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int = 0
    queued: float = 0.0
    """Seconds between arrival and first being scheduled (with the first token)."""
    error: str = ""
    """Why, when `finish_reason` is "error"."""

    def extend(self, later: CompletionChunk) -> None:
        """Become what this chunk and the `later` one of the same completion are together."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, later.num_cached_tokens)
        self.queued = max(self.queued, later.queued)
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.error = later.error


@dataclass(slots=True)
class CompletionOutput:
    """A whole completion; with the `finish_reason` "error" what there was before it failed, and `error` says why."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str = ""


@dataclass(slots=True)
class RequestOutput:
    """All completions of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    def add(self, chunk: CompletionChunk) -> None:
        """Append a chunk to its completion."""
        output = self.outputs[chunk.index]
        output.text += chunk.text
        output.token_ids += chunk.token_ids
        if chunk.logprobs is not None:
            output.logprobs = (output.logprobs or []) + chunk.logprobs
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = list(chunk.prompt_logprobs)
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        output.finish_reason = chunk.finish_reason
        output.stop_reason = chunk.stop_reason
        output.error = chunk.error


class Completion:
    """The text side of one sequence in the engine: detokenizes, and finds stop strings."""

    __slots__ = ("_detokenizer", "_eos", "_params", "finished", "index", "num_tokens")

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
        prompt_token_ids: Sequence[int],
    ) -> None:
        self.index = index
        self._params = params
        self._eos = () if params.ignore_eos else eos_token_ids
        kind = partial(LateStops, min_tokens=params.min_tokens) if params.stop and params.min_tokens else Detokenizer
        self._detokenizer: Detokenizer = kind(
            tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            prompt_ids=prompt_token_ids,
            keep=params.keep_special_tokens,
        )
        self.finished = False
        self.num_tokens = 0

    def push_token(self, token: int) -> str:
        """The text of `push` for a delta of one token that does not end the sequence. Hot path.

        When a stop string ends it, `finished` is true, `stopped` names it, and the text goes up to it.
        """
        self.num_tokens += 1
        detokenizer = self._detokenizer
        text = detokenizer.push_token(token)
        if detokenizer.stopped is not None:
            self.finished = True
        return text

    @property
    def stopped(self) -> str | None:
        """The stop string that ended it."""
        return self._detokenizer.stopped

    def push(self, delta: TokenDelta) -> CompletionChunk:
        """The chunk of a delta. When a stop string ended it though the engine goes on, `finish_reason` says so."""
        token_ids, logprobs = delta.token_ids, delta.logprobs
        shown = token_ids
        if delta.stop_token is not None and not self._params.include_stop_str_in_output:
            shown = shown[:-1]  # the token that ended the sequence is not text
        if self._params.stop and len(token_ids) > 1:
            text = ""
            for count, token in enumerate(shown, 1):  # what follows a stop string is no part of the completion
                text += self._detokenizer.push_token(token)
                if self._detokenizer.stopped is not None:
                    token_ids, logprobs = token_ids[:count], logprobs and logprobs[:count]
                    break
        else:
            text = self._detokenizer.push(shown)
        self.num_tokens += len(token_ids)
        reason = delta.finish_reason
        stop_reason: str | int | None = self._stop_reason(delta)
        if self._detokenizer.stopped is not None:
            reason, stop_reason = "stop", self._detokenizer.stopped
        elif reason is not None:
            text += self._detokenizer.finish()
            if self._detokenizer.stopped is not None:
                reason, stop_reason = "stop", self._detokenizer.stopped
        self.finished = reason is not None
        return CompletionChunk(
            self.index, text, token_ids, logprobs, reason, stop_reason,
            delta.prompt_logprobs, delta.num_cached_tokens, delta.queued, delta.error if reason == "error" else "",
        )  # fmt: skip

    def fail(self, error: str) -> CompletionChunk:
        """The chunk that ends it where its tokens cannot be made text."""
        self.finished = True
        return CompletionChunk(self.index, "", [], finish_reason="error", error=error)

    def _stop_reason(self, delta: TokenDelta) -> int | None:
        return None if delta.stop_token in self._eos else delta.stop_token
