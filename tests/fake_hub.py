"""A model hub on loopback that misbehaves on request: what the hub library asks of a real one, and no more."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights " * 4096}


class Hub(ThreadingHTTPServer):
    """Serves `acme/tiny`. `misbehave`, if set, is given each request first; true where it has answered itself."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.misbehave: Callable[[_Handler], bool] | None = None
        self.ranges: list[str] = []
        """The Range headers of requests for files."""
        self.released = threading.Event()
        """Set at the end: a handler that stalls waits for it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        if self.server.misbehave is not None and self.server.misbehave(self):
            return
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/acme/tiny/tree/"):
            entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                       for name, data in FILES.items()]  # fmt: skip
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/acme/tiny"):
            self.answer(json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": []}).encode())
        elif self.file is not None:
            self._send_file(self.file)
        else:
            self.answer(b"{}", status=404, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    @property
    def file(self) -> bytes | None:
        """The content that the request is for."""
        start = f"/acme/tiny/resolve/{COMMIT}/"
        return FILES.get(self.path.removeprefix(start)) if self.path.startswith(start) else None

    @property
    def wants_weights(self) -> bool:
        return self.command == "GET" and self.path.endswith(".safetensors")

    def begin_file(self, data: bytes, *, start: int = 0) -> None:
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()

    def _send_file(self, data: bytes) -> None:
        asked = self.headers.get("Range")
        if asked:
            self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.begin_file(data, start=start)
        if self.command == "GET":
            self.wfile.write(data[start:])

    def answer(self, body: bytes, *, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()
