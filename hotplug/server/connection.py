"""One HTTP connection: uvicorn's protocol with a bound on everything that a client can make it keep or wait for.

uvicorn over httptools takes headers without end, injects a refusal into an answer that is under way, frames streams
for HTTP/1.0 in chunks, and parses any number of requests ahead. Here what comes is parsed in pieces, and
- bytes that complete neither a header block nor bring a part of a body are counted: 64 KiB of them end the connection;
- no more is parsed while a request waits for its turn, so that one connection holds a few requests at most;
- a connection that is refused has its earlier requests answered first, and is read to its end, or for a moment, so
  that the client gets to see why.
How long a client may take is the business of `hotplug.server.connections`. While an answer is written nothing here
runs: the cost is per request, not per token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from hotplug.server.connections import MIN_RATE, MOST_QUIET_OF_ALL, Connections, Waiting
from hotplug.server.gate import ANY_PATH
from hotplug.server.refused import MOST_HEADERS, MOST_QUIET, RefusedError, head_too_large, malformed, unframed

if TYPE_CHECKING:
    import asyncio

PIECE = 16 << 10
"""Bytes that are parsed at a time."""
_FRAMING = (b"content-length", b"transfer-encoding")


class _Parsing(Enum):
    """Where in a request the parser is."""

    BETWEEN = 0
    HEAD = 1
    BODY = 2


class State(ServerState):
    """What the connections of a server share."""

    def __init__(self, all_connections: Connections) -> None:
        super().__init__()
        self.all_connections = all_connections


class _Flow(FlowControl):
    """Flow control in which reading stays paused while bytes are held back."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """A connection of a `Server`, whose `server_state` is a `State`."""

    flow: _Flow

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.server_state, State)
        self._all = self.server_state.all_connections
        self.waiting_in: Waiting | None = None
        """The owner is `Connections`."""
        self._parsing = _Parsing.BETWEEN
        self._progress = False
        """Whether what was parsed last completed a header block or a request, or brought a part of a body."""
        self._quiet = 0
        """Bytes since the last progress; all connections together are bounded too."""
        self._held = b""
        """What came while a request waited for its turn."""
        self._unanswered = 0
        """Requests whose headers have come, and whose answer is not complete."""
        self._refusal: RefusedError | None = None
        self._deaf = False
        """Nothing that comes is taken any more."""
        self._answering: RequestResponseCycle | None = None
        """The request that has its turn; `cycle` is the one that was parsed last."""
        self._heard = 0.0
        """When the last part of a body came."""
        self._body_bytes = 0

    # --- the transport's side ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        if self._all.add(self):
            self._all.move(self, self._all.heads)
        else:
            self._deaf = True
            refusal = RefusedError(503, "the server has as many connections as it can take", "too_many_connections")
            transport.write(refusal.answer())
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        self._count_quiet(0)
        self._held = b""
        self.pipeline.clear()
        if self._answering is not None:
            _disconnect(self._answering)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._parsing is _Parsing.BODY:
            self._heard = self.loop.time()
            self._body_bytes += len(data)
        if self._held:
            self._held += data
        else:
            self._parse(data)
        self._wait()

    def shutdown(self) -> None:
        """Take no further request; end when the answers that are under way have."""
        if self._unanswered:
            self._held = b""
            super().shutdown()
        else:
            self.close()

    def close(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    # --- what comes ---

    def _parse(self, data: bytes) -> None:
        """Parse `data` up to where a request has to wait for its turn."""
        at = 0
        while at < len(data) and not self._deaf:
            if self.pipeline:
                self._held = data[at:]
                self.flow.held = True
                self.flow.pause_reading()
                return
            at += self._parse_piece(data[at : at + PIECE])

    def _parse_piece(self, piece: bytes) -> int:
        """Returns the bytes that were taken of it."""
        self._progress, taken = False, len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            taken = int(upgrade.args[0])
            self._ignore_upgrade()
        except httptools.HttpParserError as error:
            reason = error.__context__
            self._refuse(reason if isinstance(reason, RefusedError) else malformed(piece, error))
            return taken
        self._count_quiet(0 if self._progress else self._quiet + taken)
        if self._quiet > MOST_QUIET:
            self._refuse(unframed() if self._parsing is _Parsing.BODY else head_too_large())
        elif self._quiet and self._all.quiet_bytes > MOST_QUIET_OF_ALL:
            self._refuse(RefusedError(503, "too many requests are unfinished", "too_many_connections"))
        return taken

    def _count_quiet(self, number: int) -> None:
        self._all.quiet_bytes += number - self._quiet
        self._quiet = number

    def _ignore_upgrade(self) -> None:
        """Go on as if the client had not asked for another protocol, as its answer will tell it.

        The parser takes what follows for that protocol, and so loses the body: HTTP/2 is asked for in this way by
        clients that send one. Another parser joins in behind the headers.
        """
        framing = [b"%s: %s\r\n" % header for header in self.headers if header[0] in _FRAMING]
        callbacks = _AfterUpgrade(self)
        self.parser = httptools.HttpRequestParser(callbacks)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"".join([b"POST / HTTP/1.1\r\n", *framing, b"\r\n"]))
        callbacks.joined = True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._parsing = _Parsing.HEAD

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._parsing is _Parsing.BODY:
            return  # a trailer, which nobody asked for
        if len(self.headers) == MOST_HEADERS:
            raise RefusedError(431, f"the request has over {MOST_HEADERS} headers", "headers_too_large")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._quiet + PIECE > MOST_QUIET:  # it may be too long, by a part of a piece
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > MOST_QUIET:
                raise head_too_large()
        self._check_version()
        if self.url == b"*":  # of the server as a whole (RFC 9110, section 9.3.7)
            self.url = ANY_PATH.encode()
        super().on_headers_complete()
        self._parsing, self._progress = _Parsing.BODY, True
        self._unanswered += 1
        self._heard, self._body_bytes = self.loop.time(), 0

    def _check_version(self) -> None:
        version = self.parser.get_http_version()
        if version == "1.1":
            return
        if version != "1.0":
            raise RefusedError(505, f"HTTP/{version} is not served here; HTTP/1.1 is", "http_version")
        self.expect_100_continue = False  # such a client knows no answers before the answer
        if any(name == b"transfer-encoding" for name, _ in self.headers):
            raise RefusedError(400, "HTTP/1.0 has no Transfer-Encoding")

    def on_body(self, body: bytes) -> None:
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the parser thinks so
        super().on_message_complete()
        self._parsing, self._progress = _Parsing.BETWEEN, True

    # --- what goes ---

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            _end_by_closing(cycle)
        self._answering = cycle
        cycle.transport = _AnswerTransport(self)  # type: ignore[assignment]
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """In the place of uvicorn's, which would set a timer for each request."""
        self.server_state.total_requests += 1
        self._unanswered -= 1
        if self.transport.is_closing():
            self._all.move(self, None)
            return
        if self._deaf and self._refusal is None:
            return  # parting
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        if self._held and not self.pipeline:
            held, self._held, self.flow.held = self._held, b"", False
            self.flow.resume_reading()
            self._parse(held)
        if self._refusal is not None and not self._unanswered:
            self._tell_refusal(self._refusal)
        elif self._parsing is _Parsing.BODY and not self._unanswered and self.expect_100_continue:
            self._part()  # nobody knows whether the body that was not asked for will come
        self._wait()

    def _wait(self) -> None:
        """Enter the table of what is awaited of the client."""
        if self._deaf or self.transport.is_closing():
            return
        table: Waiting | None = None
        if self._parsing is _Parsing.BODY:
            if self._unanswered < 2:  # the answer that is due is that to this request
                table = self._all.bodies if self._unanswered else self._all.drains
        elif not self._unanswered:
            first = self.waiting_in is self._all.heads  # line breaks alone are no request
            table = self._all.heads if first or self._parsing is _Parsing.HEAD else self._all.idle
        self._all.move(self, table)

    # --- the end ---

    def head_timed_out(self, seconds: float) -> None:
        if self._parsing is _Parsing.BETWEEN:
            self._all.log.warning("silent", f"closed a connection{self._whose()} without a request in {seconds:.0f} s")
            self.close()
        else:
            self._refuse(RefusedError(408, f"the request's headers did not come within {seconds:.0f} s", "timeout"))

    def check_body(self, now: float, since: float, seconds: float) -> None:
        """Refuse a body that has stalled or trickles."""
        if self.flow.read_paused:  # the client is not to blame
            self._heard = now
        elif now - self._heard > seconds:
            self._refuse(RefusedError(408, f"nothing of the request's body came for {seconds:.0f} s", "timeout"))
        elif now - since > 2 * seconds and self._body_bytes < MIN_RATE * (now - since):
            self._refuse(RefusedError(408, f"the request's body came at less than {MIN_RATE:.0f} bytes/s", "timeout"))

    def _refuse(self, refusal: RefusedError) -> None:
        """Take nothing more; say why once earlier requests are answered."""
        self._refusal, self._deaf = refusal, True
        self._held, self.flow.held = b"", False
        what = f"refused a connection{self._whose()} with {refusal.status}: {refusal.message}"
        self._all.log.warning(str(refusal.status), what)
        if self._parsing is _Parsing.BODY and not self.cycle.response_complete:
            # the fault is in a request that may have its task, or its place in the queue
            self._unanswered -= 1
            if self.pipeline:
                self.pipeline.popleft()
            _disconnect(self.cycle)
            if self.cycle.response_started:
                self.transport.abort()
                return
        self._all.move(self, None)
        if not self._unanswered:
            self._tell_refusal(refusal)

    def _whose(self) -> str:
        return f" from {self.client[0]}" if self.client else ""

    def _tell_refusal(self, refusal: RefusedError) -> None:
        if not self.transport.is_closing():
            self.transport.write(refusal.answer())
            self._part()

    def _part(self) -> None:
        """Close, but not before the client has stopped sending, or a moment has passed: a connection that is closed
        with something unread is reset, which may cost the client the answer."""
        self._deaf = True
        self._held, self.flow.held = b"", False
        self._all.move(self, self._all.refused)
        self.flow.resume_reading()
        self.transport.write_eof()

    def end_answer(self) -> None:
        """The last answer of the connection is written."""
        if self._parsing is _Parsing.BODY and not self._deaf:
            self._part()
        else:
            self.transport.close()


class _AnswerTransport:
    """A transport as far as an answer needs one."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, connection: Connection) -> None:
        self.close = connection.end_answer
        self.is_closing = connection.transport.is_closing
        self.write = connection.transport.write


class _AfterUpgrade:
    """The callbacks of a connection for a parser that joins in after a request's headers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.joined = False
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete

    def on_message_begin(self) -> None:
        if self.joined:
            self._connection.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self.joined:
            self._connection.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.joined:
            self._connection.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.joined:
            self._connection.on_headers_complete()


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Let a request's task know that nobody waits for it."""
    if not cycle.response_complete:
        cycle.disconnected = True
    cycle.message_event.set()


def _end_by_closing(cycle: RequestResponseCycle) -> None:
    """Send an answer of unknown length unframed, to a client that knows no chunks; closing ends it."""
    send: Callable[[Any], Awaitable[None]] = cycle.send
    unframed = False

    async def send_unframed(message: Any) -> None:
        nonlocal unframed
        if message["type"] == "http.response.start":
            unframed = not any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if unframed:
                cycle.chunked_encoding = False
        elif unframed:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_unframed  # type: ignore[method-assign]
