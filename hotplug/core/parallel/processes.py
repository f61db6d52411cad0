"""Rank 0's side: the processes of the other ranks on this host, started, told what to do, watched and ended.

They are programs of their own rather than forks or `multiprocessing` children: an engine process is itself a child
that may have none of those, and a user's script needs no guard around its main part. A worker ends when its pipe
from rank 0 does, whatever either was doing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import TypeVar

from hotplug.core.config import EngineConfig
from hotplug.core.errors import EngineDeadError
from hotplug.core.parallel import group
from hotplug.core.parallel.channel import Begin, Blocks, Loaded, Message, RankChannel, RankFailed, RankReady
from hotplug.core.parallel.mesh import Mesh
from hotplug.core.parallel.ring import RingWriter
from hotplug.core.parallel.transport import Writer
from hotplug.core.parallel.zmq_transport import ZmqWriter

_BOOT = (
    "import importlib, json, sys; "
    "path, module, *fds = sys.argv[1:]; "
    "sys.path[:] = json.loads(path); "
    "importlib.import_module(module).main(*map(int, fds))"
)
PATIENCE = 2.0
"""Seconds that a worker gets to end by itself."""
_LAST_WORDS = 1.0
"""Seconds that a step's failure may be older than the news of the worker behind it."""

M = TypeVar("M", bound=Message)


class RankProcesses:
    """The processes of ranks 1 to `mesh.size` - 1. Implements `Peers` for rank 0."""

    rank = 0

    def __init__(self, config: EngineConfig, mesh: Mesh, module: str, transport: str = "ring") -> None:
        """`module` has the `main` of a worker. `transport` is what plans go over: ring or zmq.

        Raises ConfigError where this process cannot be rank 0.
        """
        group.require_free()
        self._mesh = mesh
        self._folder = Path(tempfile.mkdtemp(prefix="hotplug-ranks-"))
        self._held = _Held(self._folder)
        self.close = weakref.finalize(self, self._held.end)
        """End the workers and leave the group; also done when this object goes, or the program ends."""
        pipes = [os.pipe() for _ in range(1, mesh.size)]
        self._held.bells = [bell for _, bell in pipes]
        for _, bell in pipes:
            os.set_blocking(bell, False)
        writer: RingWriter | ZmqWriter
        if transport == "zmq":
            writer = ZmqWriter(mesh.size - 1)
            addresses = writer.addresses
        else:
            writer = RingWriter(mesh.size - 1, doorbells=self._held.bells)
            addresses = [writer.name] * (mesh.size - 1)
        self._held.writer = writer
        for rank, ((doorbell, _), steps) in enumerate(zip(pipes, addresses, strict=True), start=1):
            self._held.start(module, rank, doorbell)
            os.close(doorbell)
            self._tell(rank, Begin(dataclasses.asdict(config), rank, str(self._folder / "store"), steps, doorbell))
        self._poll = select.poll()
        for link in self._held.links:
            self._poll.register(link, select.POLLIN)

    @property
    def sentinels(self) -> tuple[int, ...]:
        """File descriptors that become readable when a worker has ended."""
        return tuple(link.fileno() for link in self._held.links)

    def join(self, plan: str) -> None:
        others = {loaded.plan for loaded in self._each(Loaded)}
        if others != {plan}:
            raise EngineDeadError(
                "the ranks have bound different kernels", where="--tensor-parallel-size",
                why=f"plans {', '.join(sorted({plan, *others}))}", hint="Run them on devices of one kind.",
            )  # fmt: skip
        for rank in range(1, self._mesh.size):
            self._tell(rank, RankReady())
        group.join(self._folder / "store", self._mesh, self.rank)
        self._held.joined = True

    def agree(self, blocks: int) -> int:
        count = min(blocks, *(found.count for found in self._each(Blocks)))
        for rank in range(1, self._mesh.size):
            self._tell(rank, Blocks(count))
        return count

    def ready(self) -> None:
        self._each(RankReady)
        if isinstance(self._held.writer, RingWriter):
            self._held.writer.unlink()

    def send(self, message: bytes) -> None:
        """Give every rank a plan. Raises EngineDeadError where one has ended."""
        writer = self._held.writer
        assert writer is not None
        writer.send(message, self.check)

    def check(self, patience: float = 0.0) -> None:
        """Raises EngineDeadError if a worker has ended, or does within `patience` seconds."""
        if self._poll.poll(patience * 1000):
            raise self._ended()

    def blame(self, error: BaseException) -> EngineDeadError | None:
        """What is behind the failure of a step, if it is a worker's end."""
        if isinstance(error, EngineDeadError):
            return error
        if isinstance(error, Exception):
            try:
                self.check(_LAST_WORDS)
            except EngineDeadError as dead:
                return dead
        return None

    def _tell(self, rank: int, message: Message) -> None:
        """Send to a worker; that it has ended is found where its answer is waited for."""
        with contextlib.suppress(EOFError):
            self._held.links[rank - 1].send(message)

    def _each(self, kind: type[M]) -> list[M]:
        """A message of every worker. Raises EngineDeadError as soon as one has ended."""
        found: dict[int, M] = {}
        links = {link.fileno(): i for i, link in enumerate(self._held.links)}
        while len(found) < len(links):
            for end, _ in self._poll.poll():
                index = links[end]
                try:
                    message = self._held.links[index].receive()
                except EOFError:
                    raise self._ended() from None
                if not isinstance(message, kind):
                    raise self._ended({index: message})
                found[index] = message
        return [found[i] for i in range(len(links))]

    def _ended(self, said: dict[int, Message] | None = None) -> EngineDeadError:
        """The error that names every worker which has ended or is about to, with its last words."""
        words, causes = [], []
        for i, link in enumerate(self._held.links):
            failed, over = (said or {}).get(i), False
            while not over and not isinstance(failed, RankFailed) and _readable(link):
                try:
                    failed = link.receive()
                except EOFError:
                    over = True
            if isinstance(failed, RankFailed):
                causes.append(failed.message if failed.deliberate else f"{failed.message}\n{failed.traceback}")
            elif not over:
                continue  # it lives
            words.append(f"rank {i + 1} has ended, {_exit(self._held.exit_code(i))}")
        return EngineDeadError("; ".join(words), where="--tensor-parallel-size", why=causes)


def _readable(link: RankChannel) -> bool:
    """Whether there is a message, or the end."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    return bool(poll.poll(0))


class _Held:
    """What has to be ended: it knows nothing of the object whose end it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owner = os.getpid()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.links: list[RankChannel] = []
        self.lives: list[int] = []
        """Ends of pipes; a worker ends when its own is closed."""
        self.bells: list[int] = []
        self.writer: Writer | None = None
        self.joined = False

    def start(self, module: str, rank: int, doorbell: int) -> None:
        """Start the process of `rank`, which gets a link, a life and the end of a doorbell."""
        ours, theirs = socket.socketpair()
        life, held = os.pipe()
        fds = (theirs.fileno(), life, doorbell)
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), module, *map(str, fds[:2])]
        with theirs:
            self.processes.append(subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL))
        os.close(life)
        self.lives.append(held)
        self.links.append(RankChannel(ours))

    def exit_code(self, index: int) -> int | None:
        """Of a worker that has ended or is about to; None for one that does not."""
        try:
            return self.processes[index].wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Let all workers end, make them if they do not, and let go of everything."""
        if os.getpid() != self._owner:
            return  # a fork of rank 0, whose end is not the engine's
        for life in self.lives:
            os.close(life)
        for index, process in enumerate(self.processes):
            if self.exit_code(index) is None:
                process.kill()
                process.wait()
        for link in self.links:
            link.close()
        for bell in self.bells:
            os.close(bell)
        if self.writer is not None:
            self.writer.close()
        if self.joined:
            group.leave()
        shutil.rmtree(self._folder, ignore_errors=True)


def _exit(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "though its process hangs"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
