"""A ring of slots in shared memory: one writer, several readers on the same host, no locks.

Every reader sees every message. A position is a count of slots, of all that were ever written or read; each has one
owner, who alone stores it, in a cache line of its own. The writer stays at most `slots` ahead of the slowest reader.
A message that does not fit a slot takes several in a row, as many as it needs, even more than the ring has.

    line 0            what the ring is: magic, slots, bytes of a slot, readers
    line 1            the writer's position
    line 2 + r        reader r's position, and whether it sleeps
    then the slots    number (position + 1), bytes in it, bytes of the message that follow in later slots; contents

Who waits looks again and again for 2 ms at most. A reader then sleeps on its doorbell, a pipe that the writer rings
where it finds it asleep; a writer that waits for a reader sleeps for a short while, again and again.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker, shared_memory

from hotplug.core.errors import ConfigError
from hotplug.core.parallel.transport import Check, TransportError

_MAGIC = 0x686F74706C756731
_LINE = 64
_WORDS = _LINE // 8
_HEADER = 32
"""Bytes before a slot's contents: three words, and one to spare."""
SLOTS, SLOT_BYTES = 64, 16 << 10
"""A step of 512 decodes takes about 9 kB."""
SPIN = 0.002
"""Seconds that a side looks again and again before it sleeps."""
_SLEEP, _DOZE = 0.0005, 0.05
"""Seconds that a writer sleeps at a time, and a reader at most before it looks by itself."""
STALLED = 60.0
"""Seconds that a writer waits for a reader before it gives up."""

_lock = threading.Lock()
_let_others_run: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))
"""`time.sleep(0)` takes some 60 us where it sets a timer."""


def _fence() -> None:
    """Order what this thread stored before against what it loads and stores after, for other cores too.

    Python has no fence; taking and leaving a lock that nobody else holds has the instructions of one.
    """
    with _lock:
        pass


class _Layout:
    """The words of a ring and its slots' contents."""

    def __init__(self, memory: memoryview, slots: int, slot_bytes: int, readers: int) -> None:
        self.slots, self.slot_bytes, self.readers = slots, slot_bytes, readers
        self._memory = memory
        self.words = memory.cast("Q")
        self._first = _LINE * (2 + readers)

    @staticmethod
    def size(slots: int, slot_bytes: int, readers: int) -> int:
        return _LINE * (2 + readers) + slots * slot_bytes

    @property
    def written(self) -> int:
        return self.words[_WORDS]

    @written.setter
    def written(self, position: int) -> None:
        self.words[_WORDS] = position

    def word_of(self, reader: int) -> int:
        """Index of a reader's position; the word after it says whether it sleeps."""
        return (2 + reader) * _WORDS

    def slot(self, position: int) -> tuple[int, memoryview]:
        """Index of the first word of a position's slot, and its contents."""
        begin = self._first + position % self.slots * self.slot_bytes
        return begin // 8, self._memory[begin + _HEADER : begin + self.slot_bytes]

    def release(self) -> None:
        self.words.release()
        self._memory.release()


class RingWriter:
    """Makes a ring for `readers` readers, who open it by `name`. `doorbells` are their pipes' ends to write to."""

    def __init__(
        self, readers: int, *, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES, doorbells: Sequence[int] = ()
    ) -> None:
        if slots < 1 or slot_bytes % _LINE or slot_bytes <= _HEADER:
            raise ConfigError("a ring has slots of a multiple of 64 bytes", where=f"{slots} slots of {slot_bytes}")
        size = _Layout.size(slots, slot_bytes, readers)
        self._shared = shared_memory.SharedMemory(create=True, size=size)
        self.name = self._shared.name
        self._layout = _Layout(_memory(self._shared)[:size], slots, slot_bytes, readers)
        for at, word in enumerate((_MAGIC, slots, slot_bytes, readers)):
            self._layout.words[at] = word
        self._doorbells = tuple(doorbells)
        self._position = 0
        self._slowest = 0
        """A position that no reader is behind, as last looked at."""
        self._linked = True

    def send(self, message: bytes, check: Check | None = None) -> None:
        """Implements `Writer`. Raises TransportError where a reader takes nothing for a minute."""
        layout, view = self._layout, memoryview(message)
        most, at = layout.slot_bytes - _HEADER, 0
        while True:
            if self._position - self._slowest >= layout.slots:
                self._wait_for_slot(check)
            part = view[at : at + most]
            at += len(part)
            word, contents = layout.slot(self._position)
            contents[: len(part)] = part
            layout.words[word + 1], layout.words[word + 2] = len(part), len(view) - at
            layout.words[word] = self._position = self._position + 1
            _fence()
            layout.written = self._position
            if at == len(view):
                break
            if self._position - self._slowest >= layout.slots:
                self._ring()  # for the slots that the rest needs
        self._ring()

    def unlink(self) -> None:
        """Take the ring's name away, once every reader has opened it: then its memory goes with the last process."""
        if self._linked:
            self._linked = False
            self._shared.unlink()

    def close(self) -> None:
        self.unlink()
        self._layout.release()
        self._shared.close()

    def _wait_for_slot(self, check: Check | None) -> None:
        layout = self._layout

        def free_slot() -> bool:
            positions = [layout.words[layout.word_of(reader)] for reader in range(layout.readers)]
            self._slowest = min(positions, default=self._position)
            return self._position - self._slowest < layout.slots

        deadline = time.monotonic() + STALLED
        while not _spin(free_slot):
            if check is not None:
                check()
            if time.monotonic() > deadline:
                raise TransportError("a rank has taken no step", where="shared-memory ring", why=f"for {STALLED:.0f} s")
            time.sleep(_SLEEP)

    def _ring(self) -> None:
        """Wake the readers that sleep. A full pipe rings already; whether a reader lives is another's business."""
        _fence()
        words = self._layout.words
        for reader, bell in enumerate(self._doorbells):
            if words[self._layout.word_of(reader) + 1]:
                try:
                    os.write(bell, b"\0")
                except (BlockingIOError, BrokenPipeError):
                    continue


class RingReader:
    """Opens a ring as reader number `reader`. `doorbell` is the pipe's end to read from; without one it dozes."""

    def __init__(self, name: str, reader: int, doorbell: int | None = None) -> None:
        self._shared = _attach(name)
        words = _memory(self._shared)[: 4 * 8].cast("Q")
        magic, slots, slot_bytes, readers = words
        words.release()
        if magic != _MAGIC or not 0 <= reader < readers:
            self._shared.close()
            raise TransportError("this is no ring of ours, or it has no such reader", where=f"{name}, reader {reader}")
        size = _Layout.size(slots, slot_bytes, readers)
        self._layout = _Layout(_memory(self._shared)[:size], slots, slot_bytes, readers)
        self._own = self._layout.word_of(reader)
        self._position = self._layout.words[self._own]
        self._doorbell = doorbell

    def receive(self, check: Check | None = None) -> bytes:
        """Implements `Reader`."""
        layout = self._layout
        message = b""
        while True:
            self._wait(check)
            word, contents = layout.slot(self._position)
            number, count, rest = layout.words[word : word + 3]
            if number != self._position + 1 or count > len(contents):
                raise TransportError(f"slot {self._position} holds number {number}", where="shared-memory ring")
            message += contents[:count]
            _fence()  # it is read before it may be written again
            self._position += 1
            layout.words[self._own] = self._position
            if not rest:
                return message

    def close(self) -> None:
        self._layout.release()
        self._shared.close()

    def _ready(self) -> bool:
        return self._layout.written > self._position

    def _wait(self, check: Check | None) -> None:
        """Return once the slot at the own position is written."""
        if not self._ready() and not _spin(self._ready):
            self._sleep(check)
        _fence()

    def _sleep(self, check: Check | None) -> None:
        words, asleep = self._layout.words, self._own + 1
        while True:
            words[asleep] = 1
            _fence()  # the writer sees who sleeps, or we see what it wrote
            if self._ready():
                break
            if check is not None:
                check()
            if self._doorbell is None:
                time.sleep(_SLEEP)
            elif select.select([self._doorbell], [], [], _DOZE)[0]:
                os.read(self._doorbell, 4096)
        words[asleep] = 0


def _spin(ready: Callable[[], bool]) -> bool:
    """Look until `ready`, for 2 ms at most, and return whether it is. Others may have the core meanwhile."""
    deadline = time.perf_counter() + SPIN
    while not ready():
        if time.perf_counter() > deadline:
            return False
        _let_others_run()
    return True


def _attach(name: str) -> shared_memory.SharedMemory:
    """Shared memory that its writer owns: before 3.13, Python would unlink it when this process ends."""
    if sys.version_info >= (3, 13):
        return shared_memory.SharedMemory(name, track=False)
    register = resource_tracker.register
    resource_tracker.register = lambda name, rtype: None
    try:
        return shared_memory.SharedMemory(name)
    finally:
        resource_tracker.register = register


def _memory(shared: shared_memory.SharedMemory) -> memoryview:
    assert shared.buf is not None
    return shared.buf
