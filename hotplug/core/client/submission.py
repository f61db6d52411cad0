"""One prompt on its way through an engine: its requests (one a completion) and the text made of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from hotplug.core.checks import shown
from hotplug.core.client.outputs import Completion, CompletionChunk, CompletionOutput, RequestOutput
from hotplug.core.errors import RequestError
from hotplug.core.request import Request, SamplingParams, TokenDelta, changed
from hotplug.core.scheduler.tokens import token_array
from hotplug.core.text.tokenizer import Tokenizer


class Submission:
    """A prompt, its `n` requests to the engine, and their completions by request id."""

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
        *,
        priority: int = 0,
        cache_salt: str = "",
        tags: Iterator[int] | None = None,
    ) -> None:
        """`tags` gives each request its tag. Raises RequestError for a prompt that is not token ids, and for what
        `Request` refuses."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {shown(params)}", param="params")
        self.request_id = request_id
        array = token_array(prompt_token_ids)
        self.prompt_token_ids: list[int] = array.tolist()
        self.arrival = time.monotonic()
        each = _expand(params)
        self.requests = [
            Request(
                id=f"{request_id}.{index}" if len(each) > 1 else request_id,
                prompt_token_ids=array,
                sampling=sampling,
                eos_token_ids=eos_token_ids,
                priority=priority,
                cache_salt=cache_salt,
                arrival=self.arrival,
                tag=0 if tags is None else next(tags),
            )
            for index, sampling in enumerate(each)
        ]
        self.completions = {
            request.id: Completion(index, request.sampling, tokenizer, eos_token_ids, self.prompt_token_ids)
            for index, request in enumerate(self.requests)
        }

    def push(self, delta: TokenDelta) -> CompletionChunk:
        """The chunk of one of this submission's deltas."""
        return self.completions[delta.request_id].push(delta)

    @property
    def finished(self) -> bool:
        return all(c.finished for c in self.completions.values())

    def unfinished(self) -> Iterator[str]:
        """Ids of the requests whose completion has not ended."""
        return (request_id for request_id, c in self.completions.items() if not c.finished)

    def output(self, prompt: str | None = None) -> RequestOutput:
        """An empty output for chunks to be added to."""
        outputs = [CompletionOutput(c.index) for c in self.completions.values()]
        return RequestOutput(self.request_id, prompt, self.prompt_token_ids, outputs)


def _expand(params: SamplingParams) -> list[SamplingParams]:
    """One set of parameters a completion, each with a seed of its own if a seed was given."""
    if params.n == 1:
        return [params]
    return [_of_one(params, i) for i in range(params.n)]


def _of_one(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one of several completions. The prompt's log-probabilities, which may be megabytes and are the
    same for all, come with the first alone."""
    seed = None if params.seed is None else _wrap(params.seed + index)
    return changed(params, n=1, seed=seed, prompt_logprobs=None if index else params.prompt_logprobs)


def _wrap(seed: int) -> int:
    """Into the range of a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
