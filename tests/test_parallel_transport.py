"""What carries plans to other ranks: every message once, whole, in order, however slow a reader is."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import shared_memory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotplug.core.errors import ConfigError
from hotplug.core.parallel import ring, zmq_transport
from hotplug.core.parallel.ring import RingReader, RingWriter
from hotplug.core.parallel.transport import TransportError
from hotplug.core.parallel.zmq_transport import ZmqReader, ZmqWriter

pytestmark = pytest.mark.timeout(120)
SPAWN = multiprocessing.get_context("spawn")


# --- in one process: what fits ---------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    readers=st.integers(1, 3),
    slots=st.integers(2, 5),
    rounds=st.lists(st.lists(st.binary(max_size=70), max_size=3), max_size=12),
)
def test_a_ring_gives_each_reader_every_message_in_order(readers: int, slots: int, rounds: list[list[bytes]]) -> None:
    """A slot holds 32 bytes here, so most messages take several; rounds go around the ring again and again."""
    with closing(RingWriter(readers, slots=slots, slot_bytes=64)) as writer:
        ends = [RingReader(writer.name, r) for r in range(readers)]
        for messages in rounds:
            sent: list[bytes] = []
            room = slots
            for message in messages:
                room -= max(1, -(-len(message) // 32))
                if room < 0:
                    break  # one thread cannot both wait for room and make it
                writer.send(message)
                sent.append(message)
            assert [[end.receive() for _ in sent] for end in ends] == [sent] * readers
        for end in ends:
            end.close()


def test_a_ring_of_other_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 64"):
        RingWriter(1, slots=4, slot_bytes=100)


def test_memory_that_is_no_ring_is_refused() -> None:
    other = shared_memory.SharedMemory(create=True, size=4096)
    try:
        with pytest.raises(TransportError, match="no ring"):
            RingReader(other.name, 0)
    finally:
        other.close()
        other.unlink()
    with closing(RingWriter(1)) as writer, pytest.raises(TransportError, match="no such reader"):
        RingReader(writer.name, 1)


def test_a_slot_with_another_number_is_found() -> None:
    with closing(RingWriter(1, slots=2, slot_bytes=64)) as writer:
        reader = RingReader(writer.name, 0)
        writer.send(b"x")
        writer._layout.words[writer._layout.slot(0)[0]] = 9
        with pytest.raises(TransportError, match="slot 0 holds number 9"):
            reader.receive()
        reader.close()


def test_a_writer_that_waits_asks_whether_to_go_on() -> None:
    """Back-pressure: with a reader that takes nothing, the ring takes what it has slots for, and then waits."""

    def dead() -> None:
        raise InterruptedError("rank 1 is dead")

    with closing(RingWriter(1, slots=3, slot_bytes=64)) as writer:
        reader = RingReader(writer.name, 0)
        for number in range(3):
            writer.send(bytes([number]), dead)
        with pytest.raises(InterruptedError):
            writer.send(b"\3", dead)
        assert [reader.receive() for _ in range(3)] == [b"\0", b"\1", b"\2"]
        writer.send(b"\4", dead)
        assert reader.receive() == b"\4"
        reader.close()


def test_a_reader_that_takes_nothing_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "STALLED", 0.05)
    monkeypatch.setattr(zmq_transport, "STALLED", 0.05)
    with closing(RingWriter(1, slots=1, slot_bytes=64)) as writer, pytest.raises(TransportError, match="no step"):
        for _ in range(2):
            writer.send(b"x")
    with closing(ZmqWriter(1)) as writer, pytest.raises(TransportError, match="no step"):
        writer.send(b"nobody has connected")


def test_the_memory_is_gone_with_its_users() -> None:
    writer = RingWriter(1)
    reader = RingReader(writer.name, 0)
    writer.unlink()
    with pytest.raises(FileNotFoundError):
        RingReader(writer.name, 0)
    writer.send(b"still there")
    assert reader.receive() == b"still there"
    reader.close()
    writer.close()


# --- between processes -----------------------------------------------------------------------------


def messages(seed: int, count: int, largest: int) -> Iterator[bytes]:
    """The same for the same seed: mostly short, some of many slots."""
    draw = random.Random(seed)
    for number in range(count):
        size = draw.choice((0, 1, 40, 500, draw.randrange(largest)))
        yield number.to_bytes(8, "little") + draw.randbytes(size)


def checksum(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def read_all(kind: str, address: str, number: int, bell: Any, count: int, pause: float, found: Any) -> None:
    """A reader's process: what it has received, in order, as a checksum."""
    reader = RingReader(address, number, bell and bell.fileno()) if kind == "ring" else ZmqReader(address)

    def received() -> Iterator[bytes]:
        for at in range(count):
            yield reader.receive()
            if pause and at % 50 == 0:
                time.sleep(pause)

    found.put((number, checksum(received())))
    reader.close()


@pytest.mark.parametrize(("kind", "bells"), [("ring", False), ("ring", True), ("zmq", False)])
def test_processes_get_all_of_many_messages(kind: str, bells: bool) -> None:
    """Two readers, the second slow: around a small ring hundreds of times, with messages larger than the ring."""
    count, largest = 2000, 6000
    pipes = [SPAWN.Pipe(duplex=False) for _ in range(2)] if bells else []
    if kind == "ring":
        ring_writer = RingWriter(2, slots=4, slot_bytes=1024, doorbells=[send.fileno() for _, send in pipes])
        writer, addresses = ring_writer, [ring_writer.name] * 2
    else:
        writer = ZmqWriter(2)
        addresses = writer.addresses
    found = SPAWN.Queue()
    readers = [
        SPAWN.Process(
            target=read_all,
            args=(kind, address, i, pipes[i][0] if bells else None, count, 0.002 * i, found),
            daemon=True,
        )
        for i, address in enumerate(addresses)
    ]
    with closing(writer):
        for reader in readers:
            reader.start()
        for at, message in enumerate(messages(7, count, largest)):
            writer.send(message)
            if at == 1000:
                time.sleep(0.1)  # readers fall asleep
        expected = checksum(messages(7, count, largest))
        assert dict(found.get(timeout=60) for _ in readers) == {0: expected, 1: expected}
        for reader in readers:
            reader.join()


def wait_for_one(name: str, bell: Any, found: Any) -> None:
    reader = RingReader(name, 0, bell.fileno())
    found.put("open")
    begin = time.process_time()
    assert reader.receive() == b"wake"
    found.put((time.monotonic(), time.process_time() - begin))
    reader.close()


def test_a_sleeping_reader_costs_nothing_and_wakes_at_once() -> None:
    receive, send = SPAWN.Pipe(duplex=False)
    os.set_blocking(send.fileno(), False)
    found = SPAWN.Queue()
    with closing(RingWriter(1, doorbells=[send.fileno()])) as writer:
        reader = SPAWN.Process(target=wait_for_one, args=(writer.name, receive, found), daemon=True)
        reader.start()
        assert found.get(timeout=60) == "open"
        time.sleep(1.0)
        sent = time.monotonic()
        writer.send(b"wake")
        woke, used = found.get(timeout=60)
        reader.join()
    assert used < 0.03, "of a second's sleep"
    assert woke - sent < 0.04, "it waited for its own look instead of the bell"


def test_a_zmq_message_out_of_turn_is_found() -> None:
    with closing(ZmqWriter(1)) as writer, closing(ZmqReader(writer.addresses[0])) as reader:
        writer.send(b"a")
        assert reader.receive(lambda: None) == b"a"
        writer._number = 5
        writer.send(b"b")
        with pytest.raises(TransportError, match="message 5 came in place of 1"):
            reader.receive()
