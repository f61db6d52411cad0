"""LLM: offline generation, the engine in the caller's own process."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from hotplug.core.client import forks
from hotplug.core.client.inprocess import InProcessClient, Reader
from hotplug.core.client.outputs import CompletionChunk, RequestOutput
from hotplug.core.client.prompts import (
    OnePrompt,
    Prompt,
    read_conversations,
    read_messages,
    read_params,
    read_prompt,
    read_prompts,
)
from hotplug.core.client.submission import Submission
from hotplug.core.config import EngineConfig
from hotplug.core.engine.core import EngineCore
from hotplug.core.request import SamplingParams
from hotplug.core.startup.installed import check_names
from hotplug.core.text.tokenizer_files import load_tokenizer, read_template
from hotplug.core.weights.source import resolve

Message = Mapping[str, Any]


class LLM:
    """A model to generate from. Options are the fields of `EngineConfig`.

    >>> llm = LLM("smollm2")
    >>> llm.chat([{"role": "user", "content": "Hello"}])[0].outputs[0].text

    Any number of threads may use it at once, and streams may be open beside each other and beside `generate`: their
    requests run together, and each caller gets its own. It belongs to the process that made it: in a fork of that,
    its methods raise EngineDeadError.
    """

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        self._start(EngineConfig.from_mapping({"model": model, **options}, where="LLM"))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        forks.require_usable()
        self.config = config
        template = Path(config.chat_template) if config.chat_template else None
        if template is not None:
            read_template(template)  # what is wrong with it is known before weights are read
        check_names(config)
        path = resolve(config.model)
        with ThreadPoolExecutor(1, "hotplug-tokenizer") as beside:
            special = config.chat_special_tokens
            tokenizer = beside.submit(load_tokenizer, path, template, chat_special_tokens=special)
            # The caller waits for all of its prompts, so none is refused for want of a place in the queue.
            self.core = EngineCore(dataclasses.replace(config, max_queue=sys.maxsize))
        self.tokenizer = tokenizer.result()
        forks.engine_made(self.core, accelerator=self.core.bound.placement.limits.accelerator)
        self._client = InProcessClient(self.core)
        self._ids = itertools.count()

    def close(self) -> None:
        """End the engine, and the processes of one of several ranks, which also end with this object, or the program.

        Who still reads from it, and who uses it later, gets EngineDeadError.
        """
        self._client.close()

    def generate(
        self,
        prompts: OnePrompt | Iterable[OnePrompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, in order: one, or any iterable of them (`hotplug.core.client.prompts` lists the forms).

        Raises RequestError for one that cannot run; then none of them runs on. One that fails while it runs does not
        end the others: its completion has the `finish_reason` "error", and `error` says why.
        """
        self._client.require()
        batch = read_prompts(prompts)
        each = read_params(params, len(batch))
        submissions = [self._submission(prompt, one) for prompt, one in zip(batch, each, strict=True)]
        outputs = {s.request_id: s.output(prompt.text) for prompt, s in zip(batch, submissions, strict=True)}
        with (
            self._client.read(submissions) as reader,
            _progress_bar(progress, total=sum(len(s.requests) for s in submissions)) as advance,
        ):
            tokens = 0
            for submission, chunk in reader:
                outputs[submission.request_id].add(chunk)
                tokens += len(chunk.token_ids)
                advance(chunk.finish_reason is not None, tokens)
        return list(outputs.values())

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, each a list of {"role", "content"} messages. Otherwise as `generate`."""
        self._client.require()
        prompts = [self.tokenizer.encode_chat(conversation) for conversation in read_conversations(messages)]
        return self.generate(prompts, params, progress=progress)

    def stream(self, prompt: OnePrompt, params: SamplingParams | None = None) -> CompletionStream:
        """Chunks of one prompt's completions as they come; the request is queued at once. Raises RequestError, and
        with the first chunk PromptTooLongError and others of its kind."""
        self._client.require()
        (one,) = read_params(params, 1)
        return CompletionStream(self._client.read([self._submission(read_prompt(prompt), one)]))

    def chat_stream(self, messages: Sequence[Message], params: SamplingParams | None = None) -> CompletionStream:
        """`stream` for a conversation."""
        self._client.require()
        return self.stream(self.tokenizer.encode_chat(read_messages(messages)), params)

    def _submission(self, prompt: Prompt, params: SamplingParams) -> Submission:
        token_ids, eos = prompt.encoded(self.tokenizer.encode), self.core.eos_token_ids
        return Submission(str(next(self._ids)), token_ids, params, self.tokenizer, eos, cache_salt=prompt.cache_salt)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an LLM cannot be copied or sent to another process: make one in the process that uses it")


class CompletionStream(Generator[CompletionChunk, None, None]):
    """Chunks of one prompt's completions. Closing it, or letting go of it, ends the request; any thread may do so."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def send(self, value: None) -> CompletionChunk:
        return next(self._reader)[1]

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        value: object = None,
        trace: TracebackType | None = None,
    ) -> NoReturn:
        """End the request and raise this."""
        self._reader.close()
        error = kind if isinstance(kind, BaseException) else value if isinstance(value, BaseException) else kind()
        raise error.with_traceback(trace) if trace is not None else error

    def close(self) -> None:
        """End the request."""
        self._reader.close()


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
