"""The requests of one front end that are in flight: what the engine says of them becomes text in their mailboxes.

Hot path: `take` is called once a step, and costs below 3 us for each steady token, detokenizing and handing over
included (`ci/bench/front_end.py`).
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from hotplug.core.client.mailbox import Mailbox
from hotplug.core.client.observer import EngineObserver
from hotplug.core.client.outputs import Completion, CompletionChunk
from hotplug.core.client.submission import Submission
from hotplug.core.engine.messages import Outputs
from hotplug.core.errors import EngineDeadError, HotplugError
from hotplug.core.request import TokenDelta
from hotplug.core.scheduler.tokens import CLIENT_SHIFT

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Stream:
    """One request in flight."""

    request_id: str
    submission: Submission
    completion: Completion
    mailbox: Mailbox
    last_token: float = 0.0
    """When its latest tokens came; 0 before the first."""
    index: int = field(init=False)

    def __post_init__(self) -> None:
        self.index = self.completion.index


class Streams:
    """By tag: request, text and mailbox."""

    def __init__(self, client: int) -> None:
        self._streams: dict[int, _Stream] = {}
        self.tags = self._free_tags(client)
        """Tags for new requests. One is not given again soon, and the first is drawn: late tokens may still come, of an
        aborted request, or of a front end that had this number before."""

    def _free_tags(self, client: int) -> Iterator[int]:
        slots = 1 << CLIENT_SHIFT
        for slot in itertools.count(random.randrange(slots)):
            tag = client << CLIENT_SHIFT | slot % slots
            if tag not in self._streams:
                yield tag

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._streams)

    def open(self, submission: Submission) -> Mailbox:
        """A submission's requests go to the engine; returns where their chunks will be."""
        mailbox = Mailbox()
        for request in submission.requests:
            completion = submission.completions[request.id]
            self._streams[request.tag] = _Stream(request.id, submission, completion, mailbox)
        return mailbox

    def close(self, submission: Submission, observer: EngineObserver | None = None) -> list[str]:
        """Nobody reads a submission any more; returns the ids of its requests that have not ended."""
        left = [stream for r in submission.requests if (stream := self._streams.pop(r.tag, None)) is not None]
        for stream in left:
            _tell_end(stream, "abort", time.monotonic(), observer)
        return [stream.request_id for stream in left]

    def refuse(self, tag: int, error: HotplugError) -> None:
        """The engine did not take a request."""
        stream = self._streams.pop(tag, None)
        if stream is not None:
            stream.mailbox.fail(error)

    def fail(self, reason: str) -> list[str]:
        """Everything in flight ends with EngineDeadError; returns the ids of the requests."""
        failed = list(self._streams.values())
        self._streams.clear()
        for stream in failed:
            stream.mailbox.fail(EngineDeadError(reason))
        return [stream.request_id for stream in failed]

    def take(self, outputs: Outputs, now: float, observer: EngineObserver | None) -> list[str]:
        """Hand out what a step gave. Returns the ids of requests that ended here, unknown to the engine: by a stop
        string, or because they cannot be made into text."""
        ended: list[str] = []
        gaps: list[float] = []
        find = self._streams.get
        tags, tokens = outputs.columns()
        for tag, token in zip(tags.tolist(), tokens.tolist(), strict=True):
            stream = find(tag)
            if stream is None:
                continue  # its consumer is gone; the abort is under way
            gaps.append(now - stream.last_token)
            stream.last_token = now
            completion = stream.completion
            try:
                text = completion.push_token(token)
            except Exception as e:
                ended.append(self._broken(tag, stream, e, now, observer))
                continue
            if completion.finished:
                chunk = CompletionChunk(stream.index, text, [token], None, "stop", completion.stopped)
                self._end(tag, stream, chunk, now, observer)
                stream.mailbox.put(chunk)
                ended.append(stream.request_id)
            else:
                stream.mailbox.put_token(stream.index, text, token)
        if gaps and observer is not None:
            observer.inter_tokens(gaps)
        for delta in outputs.deltas:
            stream = find(delta.tag)
            if stream is None:
                continue
            try:
                if self._push(stream, delta, now, observer):
                    ended.append(stream.request_id)
            except Exception as e:
                ended.append(self._broken(delta.tag, stream, e, now, observer))
        return ended

    def _broken(self, tag: int, stream: _Stream, error: Exception, now: float, observer: EngineObserver | None) -> str:
        """End a request whose tokens cannot be made into text, and nobody else's; returns its id."""
        _tell_end(stream, "error", now, observer)
        _logger.error("request %s ends: its tokens cannot be made into text", stream.request_id, exc_info=error)
        self.refuse(tag, HotplugError("the output cannot be made into text", why=f"{type(error).__name__}: {error}"))
        return stream.request_id

    def _push(self, stream: _Stream, delta: TokenDelta, now: float, observer: EngineObserver | None) -> bool:
        """Hand out what is more than one token. Whether the request ended here, and maybe not in the engine."""
        if delta.finish_reason == "error":
            _tell_end(stream, "error", now, observer)
            self.refuse(delta.tag, HotplugError(delta.error))
            return True
        chunk = stream.completion.push(delta)
        if observer is not None:
            if stream.last_token:
                observer.inter_token(now - stream.last_token, len(delta.token_ids))
            else:
                observer.queued(delta.queued)
                observer.first_token(now - stream.submission.arrival)
        stream.last_token = now
        if chunk.finish_reason is not None:
            self._end(delta.tag, stream, chunk, now, observer)
        stream.mailbox.put(chunk)
        return chunk.finish_reason is not None and delta.finish_reason is None

    def _end(
        self, tag: int, stream: _Stream, chunk: CompletionChunk, now: float, observer: EngineObserver | None
    ) -> None:
        del self._streams[tag]
        if chunk.finish_reason is not None:
            _tell_end(stream, chunk.finish_reason, now, observer)


def _tell_end(stream: _Stream, reason: str, now: float, observer: EngineObserver | None) -> None:
    if observer is not None:
        submission = stream.submission
        seconds = now - submission.arrival
        observer.finished(reason, len(submission.prompt_token_ids), stream.completion.num_tokens, seconds)
