"""An engine front end without an engine: what the server's tests talk to.

It writes the alphabet, one letter a token, over a vocabulary of bytes, and can be told to refuse, to fail
in the middle, to wait, or to be dead. It has the interface of `hotplug.core.client.async_llm.AsyncLLM`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from functools import cached_property
from typing import Any

from logprob_columns import of_prompt

from hotplug.core.client.outputs import CompletionChunk
from hotplug.core.config import EngineConfig
from hotplug.core.errors import RequestError
from hotplug.core.logprobs import TokenLogprobs
from hotplug.core.request import SamplingParams

BOS, EOS, VOCAB = 256, 257, 260


class ByteTokenizer:
    """Token i is byte i; two special tokens. Implements what the server uses of the real tokenizer."""

    vocab_size = VOCAB
    special_ids = frozenset({BOS, EOS})
    byte_level = joins_bytes = True
    strips_first_space = False

    def __init__(self, *, adds_bos: bool = False) -> None:
        self.adds_bos = adds_bos
        self.mentions = frozenset({"tools", "tool_calls"})
        """Names in its chat template."""

    def template_mentions(self, name: str, *, tools: bool) -> bool:
        return name in self.mentions

    @cached_property
    def whole_texts(self) -> dict[int, str | None]:
        """By id: ASCII and special tokens are text, other bytes parts of it."""
        return {i: None if 128 <= i < 256 else self.token_text(i) for i in range(VOCAB)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * (self.adds_bos and add_special_tokens) + list(text.encode())

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in ids if i < 256 or not skip_special_tokens]
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def special_among(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(i for i in (BOS, EOS) if self.token_text(i) in texts)

    def token_text(self, token: int) -> str:
        return {BOS: "<s>", EOS: "</s>"}.get(token, "") if token >= BOS else bytes([token]).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else self.token_text(token).encode()

    def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        text += "".join(f"[{k}={v}]" for k, v in variables.items())
        if "raise" in text:
            raise RequestError("the chat template says no", param="messages")
        return self.encode(text + "<assistant>" * add_generation_prompt, add_special_tokens=False)


class FakeLLM:
    def __init__(self, *, max_model_len: int = 512, adds_bos: bool = False) -> None:
        self.config = EngineConfig(served_model_name="fake")
        self.tokenizer = ByteTokenizer(adds_bos=adds_bos)
        self.max_model_len = max_model_len
        self.vocab_size = VOCAB
        self.ready = True
        self.failure: str | None = None
        self.observer: Any = None
        self.seen: list[tuple[list[int], SamplingParams, int, str]] = []
        self.refuse: Exception | None = None
        """Raised before the first token."""
        self.break_after: tuple[int, Exception] | None = None
        """Raised after so many tokens."""
        self.hang_after: int | None = None
        """Wait for ever after so many tokens; only closing the stream ends it."""
        self.says: str | None = None
        """Text of every answer, a character a token, in the place of the alphabet."""
        self.hanging = threading.Event()
        self.aborted = threading.Event()
        self.closed = threading.Event()
        self._died = asyncio.Event()

    stalled: str | None = None
    plan_hash = "0123456789abcdef"

    async def start(self) -> None: ...

    async def wait_ready(self) -> None: ...

    async def wait_dead(self) -> str:
        await self._died.wait()
        assert self.failure is not None
        return self.failure

    def die(self, reason: str) -> None:
        """End as a dead engine does."""
        self.failure = reason
        self._died.set()

    async def close(self) -> None:
        self.closed.set()

    async def explain(self) -> dict[str, Any]:
        return {"plan_hash": self.plan_hash, "sites": []}

    async def stream(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[CompletionChunk, None]:
        self.seen.append((prompt_token_ids, params, priority, cache_salt))
        if self.refuse is not None:
            raise self.refuse
        if self.says is not None:
            for i, letter in enumerate(self.says):
                last = i + 1 == len(self.says)
                for index in range(params.n):
                    yield CompletionChunk(index, letter, [ord(letter)], finish_reason="stop" if last else None)
            return
        limit = params.max_tokens or self.max_model_len - len(prompt_token_ids)
        written = [""] * params.n
        live = set(range(params.n))
        for step in range(limit):
            await self._misbehave(step)
            for index in sorted(live):
                chunk = self._chunk(step, index, prompt_token_ids, params, limit, written[index])
                written[index] += chunk.text
                if chunk.finish_reason:
                    live.discard(index)
                yield chunk
            if not live:
                return

    async def _misbehave(self, step: int) -> None:
        if self.break_after is not None and step == self.break_after[0]:
            raise self.break_after[1]
        if step == self.hang_after:
            self.hanging.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.aborted.set()

    def _chunk(
        self, step: int, index: int, prompt: list[int], params: SamplingParams, limit: int, written: str
    ) -> CompletionChunk:
        token = ord("a") + (step + index) % 26
        text = "".join(chr(ord("a") + (i + index) % 26) for i in range(step + 1))
        last = step + 1 == limit
        held = 0 if last else max(map(len, params.stop), default=1) - 1
        chunk = CompletionChunk(index, text[len(written) : len(text) - held], [token])
        if last:
            chunk.finish_reason = "length"
        for stop in params.stop:
            if stop in text:
                chunk.text = text[len(written) : text.index(stop)]
                chunk.finish_reason, chunk.stop_reason = "stop", stop
        if params.logprobs is not None:
            chunk.logprobs = [_logprobs(token, params.logprobs)]
        if step == 0:
            chunk.num_cached_tokens = 3
            if index == 0 and params.prompt_logprobs is not None:
                k = params.prompt_logprobs
                chunk.prompt_logprobs = of_prompt([_logprobs(t, k) for t in prompt[1:]], k)
        return chunk


def _logprobs(token: int, k: int) -> TokenLogprobs:
    best = [token, *(ord("A") + i for i in range(k))][:k]
    return TokenLogprobs([token, *best], [-0.5, *(-0.5 * (i + 1) for i in range(k))], 1)
