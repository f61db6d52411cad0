"""An engine core in the caller's own process, for several readers in any number of threads.

Nobody owns the loop: a reader that has nothing to read takes its turn and runs a step, which gives all readers what is
theirs. What does not concern a step (a new request, the end of one) is left in an inbox, which whoever steps next
reads, so it never waits, and may come from a finalizer or another thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType

from hotplug.core.client.forks import OwnProcess
from hotplug.core.client.outputs import CompletionChunk
from hotplug.core.client.submission import Submission
from hotplug.core.client.turns import HeldSignals, Turns
from hotplug.core.engine.core import EngineCore
from hotplug.core.errors import EngineDeadError
from hotplug.core.request import TokenDelta

_logger = logging.getLogger(__name__)
_CLOSED = "the engine was closed"


class InProcessClient:
    """Runs the steps of one core for all that read from it."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._process = OwnProcess()
        self._turns = Turns()
        self._closed = False
        self._inbox: deque[tuple[_Mailbox, bool]] = deque()
        """Mailboxes whose requests are to be added (True), or ended (False)."""
        # What follows is touched by the thread whose turn it is.
        self._open: dict[str, tuple[Submission, _Mailbox]] = {}
        """By request id: what has not ended."""

    def require(self) -> None:
        """Raises EngineDeadError after `close`, and in a fork of the process that made the engine."""
        self._process.require()
        if self._closed:
            raise EngineDeadError(_CLOSED)

    def read(self, submissions: Sequence[Submission]) -> Reader:
        """Run these. What the engine refuses is raised by the reader. Raises EngineDeadError."""
        self.require()
        mailbox = _Mailbox(submissions)
        self._inbox.append((mailbox, True))
        return Reader(self, mailbox)

    def close(self) -> None:
        """End the engine: all readers get EngineDeadError. In a fork, nothing."""
        if self._process.is_here:
            with HeldSignals(), self._turns:
                self._closed = True
                self._core.close()

    def take(self, mailbox: _Mailbox) -> tuple[Submission, CompletionChunk] | None:
        """The next chunk, running steps until there is one; None when all have ended, or the reader was closed.

        Raises what the engine refused a request with, or what a step raised; EngineDeadError.
        """
        chunks = mailbox.chunks
        while True:
            over = mailbox.over  # looked at first, since the last chunk is put before
            try:
                return chunks.popleft()
            except IndexError:
                if over:
                    if mailbox.error is not None:
                        raise mailbox.error from None
                    return None
            self._process.require()
            try:
                with HeldSignals(), self._turns:
                    if not (chunks or mailbox.over):  # nobody has stepped in the meantime
                        self._step()
            finally:
                if self._inbox:
                    self._read_inbox_if_free()

    def end(self, mailbox: _Mailbox) -> None:
        """Nobody reads it any more: its requests end. Waits for nothing: at the latest, the next step does it."""
        if not mailbox.over and self._process.is_here:
            mailbox.closed = mailbox.over = True
            mailbox.chunks.clear()
            self._inbox.append((mailbox, False))
            self._read_inbox_if_free()

    def _step(self) -> None:
        """Run a step, and give everyone what is theirs."""
        if self._closed:
            raise EngineDeadError(_CLOSED)
        self._read_inbox()
        for delta in self._core.step():
            found = self._open.get(delta.request_id)
            if found is None:
                continue  # ended while the step was in flight
            submission, mailbox = found
            chunk = self._push(submission, delta)
            mailbox.chunks.append((submission, chunk))
            if chunk.finish_reason is None:
                continue
            del self._open[delta.request_id]
            mailbox.running -= 1
            mailbox.over = mailbox.over or not mailbox.running
            if delta.finish_reason is None:  # the text ended it; the engine cannot know
                self._core.abort(delta.request_id)

    def _push(self, submission: Submission, delta: TokenDelta) -> CompletionChunk:
        try:
            return submission.push(delta)
        except Exception as e:  # its own end, and nobody else's
            _logger.exception("request %s ends: its tokens cannot be made text", delta.request_id)
            why = f"its tokens cannot be made text: {type(e).__name__}: {e}"
            return submission.completions[delta.request_id].fail(why)

    def _read_inbox_if_free(self) -> None:
        """Read it if no one steps; else who does reads it afterwards."""
        while self._inbox:
            with HeldSignals():
                if not self._turns.take_if_free():
                    return
                try:
                    self._read_inbox()
                finally:
                    self._turns.give()

    def _read_inbox(self) -> None:
        while self._inbox:
            mailbox, new = self._inbox.popleft()
            if new and not mailbox.closed:
                self._add(mailbox)
            else:
                self._end(mailbox)

    def _add(self, mailbox: _Mailbox) -> None:
        """Queue all of its requests, or none."""
        try:
            for submission in mailbox.submissions:
                for request in submission.requests:
                    self._core.add(request)
                    self._open[request.id] = submission, mailbox
        except Exception as e:  # of this caller alone
            self._end(mailbox)
            mailbox.error, mailbox.over = e, True

    def _end(self, mailbox: _Mailbox) -> None:
        """End what has not ended of its requests, and free their blocks."""
        for submission in mailbox.submissions:
            for request_id in submission.unfinished():
                if self._open.pop(request_id, None) is not None:
                    self._core.abort(request_id)


class _Mailbox:
    """What has come for one reader."""

    def __init__(self, submissions: Sequence[Submission]) -> None:
        self.submissions = submissions
        self.chunks: deque[tuple[Submission, CompletionChunk]] = deque()
        self.running = sum(len(submission.requests) for submission in submissions)
        """Requests that have not ended."""
        self.error: Exception | None = None
        """What the engine refused one of them with."""
        self.closed = False
        self.over = not self.running
        """Nothing more comes: all have ended, or were refused, or nobody reads."""


class Reader(Iterator[tuple[Submission, CompletionChunk]]):
    """Chunks of some submissions, in the order they come. Its end, or the end of this object, ends their requests.

    Any thread may read or close it. What comes while nobody reads waits here.
    """

    def __init__(self, client: InProcessClient, mailbox: _Mailbox) -> None:
        self._client = client
        self._mailbox = mailbox

    def __next__(self) -> tuple[Submission, CompletionChunk]:
        try:
            found = self._client.take(self._mailbox)
        except Exception:
            self.close()
            raise
        if found is None:
            raise StopIteration
        return found

    def close(self) -> None:
        """End what still runs; a thread that waits in `next` gets StopIteration."""
        self._client.end(self._mailbox)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
