"""LLM: offline generation, the engine in the caller's own process."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.engine.outputs import CompletionChunk, RequestOutput
from hotplug.core.engine.submission import Submission
from hotplug.core.errors import HotplugError, RequestError
from hotplug.core.request import SamplingParams
from hotplug.core.text.tokenizer import load_tokenizer, read_template
from hotplug.core.weights.source import resolve
from hotplug.plugins.installed import check_names

Prompt = str | Sequence[int]
Message = dict[str, Any]


class LLM:
    """A model to generate from. Options are the fields of `EngineConfig`.

    >>> llm = LLM("smollm2")
    >>> llm.chat([{"role": "user", "content": "Hello"}])[0].outputs[0].text
    """

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        self._start(EngineConfig.from_mapping({"model": model, **options}, where="LLM"))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        self.config = config
        template = Path(config.chat_template) if config.chat_template else None
        if template is not None:
            read_template(template)  # what is wrong with it is known before weights are read
        check_names(config)
        path = resolve(config.model)
        with ThreadPoolExecutor(1, "hotplug-tokenizer") as beside:
            tokenizer = beside.submit(load_tokenizer, path, template)
            # The caller waits for all of its prompts, so none is refused for want of a place in the queue.
            self.core = EngineCore(dataclasses.replace(config, max_queue=sys.maxsize))
        self.tokenizer = tokenizer.result()
        self._ids = itertools.count()
        self._open: dict[str, Submission] = {}
        """By request id: what has not finished."""

    def close(self) -> None:
        """End the processes of an engine of several ranks, which also end with this object, or with the program."""
        self.core.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts (text or token ids), in order. Raises RequestError; then none of them runs on."""
        batch = _as_batch(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(batch)
        if len(params) != len(batch):
            raise RequestError(f"{len(batch)} prompts came with {len(params)} sets of parameters", param="params")
        submissions: list[Submission] = []
        try:
            for prompt, one in zip(batch, params, strict=True):
                submissions.append(self._submit(prompt, one))
            return self._collect(batch, submissions, progress)
        finally:
            for submission in submissions:
                self._drop(submission)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, each a list of {"role", "content"} messages."""
        single = bool(messages) and isinstance(messages[0], dict)
        conversations: Sequence[Any] = [messages] if single else messages
        prompts = [self.tokenizer.encode_chat(list(conversation)) for conversation in conversations]
        return self.generate(prompts, params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[CompletionChunk]:
        """Chunks of one prompt's completions as they come. Closing the iterator ends the request."""
        submission = self._submit(prompt, params or SamplingParams())
        try:
            while not submission.finished:
                for _, chunk in self._step():
                    yield chunk
        finally:
            self._drop(submission)

    def chat_stream(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[CompletionChunk]:
        """`stream` for a conversation."""
        return self.stream(self.tokenizer.encode_chat(list(messages)), params)

    def _submit(self, prompt: Prompt, params: SamplingParams) -> Submission:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        submission = Submission(str(next(self._ids)), token_ids, params, self.tokenizer, self.core.eos_token_ids)
        try:
            for request in submission.requests:
                self.core.add(request)
                self._open[request.id] = submission
        except HotplugError:
            self._drop(submission)
            raise
        return submission

    def _collect(self, prompts: Sequence[Prompt], submissions: list[Submission], progress: bool) -> list[RequestOutput]:
        """Run steps until all submissions have ended."""
        outputs = {
            s.request_id: s.output(prompt if isinstance(prompt, str) else None)
            for prompt, s in zip(prompts, submissions, strict=True)
        }
        with _progress_bar(progress, total=sum(len(s.requests) for s in submissions)) as advance:
            tokens = 0
            while any(request_id in self._open for s in submissions for request_id in s.unfinished()):
                for submission, chunk in self._step():
                    outputs[submission.request_id].add(chunk)
                    tokens += len(chunk.token_ids)
                    advance(chunk.finish_reason is not None, tokens)
        return list(outputs.values())

    def _step(self) -> Iterator[tuple[Submission, CompletionChunk]]:
        """One step of the engine, as text."""
        for delta in self.core.step():
            submission = self._open.get(delta.request_id)
            if submission is None:
                continue  # aborted while the step ran
            chunk = submission.push(delta)
            if chunk.finish_reason is not None:
                del self._open[delta.request_id]
                if delta.finish_reason is None:  # a stop string ended it; the engine cannot know
                    self.core.abort(delta.request_id)
            yield submission, chunk

    def _drop(self, submission: Submission) -> None:
        """End what has not ended."""
        for request_id in submission.unfinished():
            if self._open.pop(request_id, None) is not None:
                self.core.abort(request_id)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, of one prompt or several."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


@contextmanager
def _progress_bar(shown: bool, total: int) -> Iterator[Callable[[bool, int], None]]:
    """A bar over finished completions with the output rate; `advance(finished, tokens so far)`."""
    if not shown:
        yield lambda finished, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[rate]:.0f} tokens/s"))  # fmt: skip
    begin = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task("generate", total=total, rate=0.0)

        def advance(finished: bool, tokens: int) -> None:
            elapsed = max(time.perf_counter() - begin, 1e-6)
            bar.update(task, advance=int(finished), rate=tokens / elapsed)

        yield advance
