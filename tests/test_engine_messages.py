"""What crosses between front ends and the engine, and that the engine waits for nobody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zmq

from hotplug.core.engine import messages
from hotplug.core.engine.clients import SOCKET_MESSAGES, STATS_INTERVAL, Clients, Outlet
from hotplug.core.engine.endpoints import Endpoints
from hotplug.core.errors import RequestError
from hotplug.core.request import EngineStats, Request, SamplingParams, TokenDelta
from hotplug.core.scheduler.tokens import StepTokens, token_array


def gained(tags: list[int], deltas: list[TokenDelta] | None = None) -> StepTokens:
    ids = np.array([f"r{tag}" for tag in tags], np.object_)
    columns = np.array(tags, np.int64)
    return StepTokens(columns, (columns % 100).astype(np.int32), ids, deltas or [])


def tag(client: int, slot: int) -> int:
    return client << 32 | slot


# --- what is said ---


def test_requests_that_share_a_prompt_send_it_once_and_arrive_whole() -> None:
    shared, other = np.arange(50_000, dtype=np.int32), [7, 8]
    sent = [
        Request(id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=3), tag=number)
        for number, (name, prompt) in enumerate([("a", shared), ("b", shared), ("c", other)])
    ]
    frames, failed = messages.add_frames(sent)
    assert not failed
    assert len(frames) == 3
    context = zmq.Context()
    with context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as two:
        one.bind("inproc://frames")
        two.connect("inproc://frames")
        one.send_multipart(frames, copy=False)
        got = two.recv_multipart(copy=False)
    context.destroy(linger=0)
    add = messages.decode_to_engine(got)
    assert isinstance(add, messages.Add)
    requests = [request for _, request in messages.received(add, got) if isinstance(request, Request)]
    assert [(r.id, r.tag, r.sampling.max_tokens) for r in requests] == [("a", 0, 3), ("b", 1, 3), ("c", 2, 3)]
    prompts = [np.asarray(r.prompt_token_ids) for r in requests]
    assert all(p.dtype == np.int32 for p in prompts)
    assert np.shares_memory(prompts[0], prompts[1])
    assert [p.tolist() for p in prompts] == [shared.tolist(), shared.tolist(), other]


def test_a_step_travels_as_columns() -> None:
    delta = TokenDelta("end", [3, 4], "stop", 4, tag=tag(1, 9))
    step = gained([tag(1, 5), tag(1, 6)], [delta])
    received = messages.decode_from_engine(messages.encode(messages.Outputs.of(step, EngineStats(running=2))))
    assert isinstance(received, messages.Outputs)
    tags, tokens = received.columns()
    assert (tags.tolist(), tokens.tolist()) == (step.tags.tolist(), step.tokens.tolist())
    assert received.deltas == [delta] and received.stats.running == 2


def test_a_step_reads_as_deltas_with_the_ids_of_its_rows() -> None:
    delta = TokenDelta("end", [3, 4], "stop", 4, tag=2)
    step = gained([0, 1], [delta])
    assert list(step) == [TokenDelta("r0", [0], tag=0), TokenDelta("r1", [1], tag=1), delta]
    assert (len(step), step.num_tokens, len(StepTokens())) == (3, 4, 0)


@pytest.mark.parametrize("wrong", [[2**31], [-(2**31) - 1], [2**70], [1.5], ["a"], [[1, 2]], [True]])
def test_what_is_no_token_id_is_refused(wrong: list[object]) -> None:
    with pytest.raises(RequestError):
        token_array(wrong)  # type: ignore[arg-type]


def test_token_ids_become_an_array_once() -> None:
    array = token_array([1, 2])
    assert array.dtype == np.int32 and token_array(array) is array
    assert token_array([]).dtype == np.int32


# --- who is told ---


class FrontEnds:
    """The receiving sockets of all front ends of a link."""

    def __init__(self, folder: Path, count: int, most_bytes: int = 1 << 20) -> None:
        self.link = Endpoints(str(folder), count)
        self.context = zmq.Context()
        self.sockets = [self.open(client) for client in range(count)]
        self.clients = Clients(self.context, self.link, most_bytes)

    def open(self, client: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.PULL)
        socket.set(zmq.RCVHWM, 1)
        socket.bind(self.link.outbox(client))
        return socket

    def read(self, client: int, patience: int = 5000) -> messages.FromEngine | None:
        socket = self.sockets[client]
        return messages.decode_from_engine(socket.recv()) if socket.poll(patience) else None

    def __enter__(self) -> FrontEnds:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)


def test_each_front_end_gets_its_own_rows_and_no_others(tmp_path: Path) -> None:
    with FrontEnds(tmp_path, 2) as ends:
        delta = TokenDelta("x", [1], "stop", 1, tag=tag(1, 7))
        ends.clients.post_step(gained([tag(0, 3), tag(1, 4), tag(0, 5)], [delta]), EngineStats())
        first, second = ends.read(0), ends.read(1)
        assert isinstance(first, messages.Outputs) and isinstance(second, messages.Outputs)
        assert (first.columns()[0].tolist(), first.deltas) == ([tag(0, 3), tag(0, 5)], [])
        assert (second.columns()[0].tolist(), second.deltas) == ([tag(1, 4)], [delta])


def test_statistics_reach_a_front_end_without_tokens_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    with FrontEnds(tmp_path, 2) as ends:
        for step in range(20):
            ends.clients.post_step(gained([tag(0, 1)]), EngineStats(steps=step))
        ends.clients.post_idle(EngineStats(steps=20))
        ends.clients.post_idle(EngineStats(steps=21))
        seen = []
        while isinstance(message := ends.read(1, 200), messages.Outputs):
            assert not len(message.columns()[0])
            seen.append(message.stats.steps)
        assert seen[-1] == 20  # the last word, once
        assert len(seen) <= 3, f"20 steps within {STATS_INTERVAL} s are one message"


def test_a_full_socket_queues_and_what_it_takes_later_comes_in_order(tmp_path: Path) -> None:
    address, context = f"ipc://{tmp_path}/one", zmq.Context()
    outlet = Outlet(context, address, most_bytes=100_000)  # nobody is there
    sent = [b"%05d" % i for i in range(SOCKET_MESSAGES + 500)]
    assert all(outlet.send(data) for data in sent)
    assert outlet.waiting
    with context.socket(zmq.PULL) as reader:
        reader.bind(address)
        received = []
        while len(received) < len(sent):
            assert reader.poll(5000)
            received.append(reader.recv())
            outlet.flush()
    assert received == sent and not outlet.waiting
    outlet.close()
    context.destroy(linger=0)


def test_past_its_bound_a_front_end_is_dropped_and_told_so_and_others_lose_nothing(tmp_path: Path) -> None:
    with FrontEnds(tmp_path, 2, most_bytes=20_000) as ends:
        delta = [TokenDelta("x" * 1000, [1], tag=tag(1, 7))]
        steps = 0
        while not (overrun := ends.clients.take_overrun()):
            ends.clients.post_step(gained([tag(0, steps)], delta), EngineStats())
            read = ends.read(0)
            assert isinstance(read, messages.Outputs) and read.columns()[0].tolist() == [steps]
            steps += 1
        assert overrun == [1] and steps > SOCKET_MESSAGES
        found = ends.read(1)
        while not isinstance(found, messages.Dropped):
            found = ends.read(1)
            assert found is not None
        ends.clients.post_step(gained([tag(1, 1)]), EngineStats())
        again = ends.read(1)
        while isinstance(again, messages.Outputs) and again.deltas:  # what the socket held before it was dropped
            again = ends.read(1)
        assert isinstance(again, messages.Outputs) and again.columns()[0].tolist() == [tag(1, 1)]


def test_word_of_a_death_that_comes_after_its_successor_is_no_matter_to_that(tmp_path: Path) -> None:
    with FrontEnds(tmp_path, 1) as ends:
        assert ends.clients.enter(0, 1)
        assert not ends.clients.leave(0, 0) and not ends.clients.gone(0)
        assert not ends.clients.enter(0, 0)
        assert ends.clients.leave(0, 1) and ends.clients.gone(0)
        assert not ends.clients.leave(0, 1)
        assert ends.clients.enter(0, 2) and not ends.clients.gone(0)


def test_one_that_died_is_told_nothing_and_its_successor_begins_anew(tmp_path: Path) -> None:
    with FrontEnds(tmp_path, 1) as ends:
        ends.clients.post_step(gained([0]), EngineStats())
        assert ends.read(0) is not None
        ends.sockets[0].close(linger=0)
        ends.clients.post_step(gained([1]), EngineStats())
        ends.clients.leave(0)
        assert ends.clients.gone(0) and ends.clients.gone(7)
        ends.clients.post_step(gained([2]), EngineStats())
        ends.clients.post(0, messages.PlanReport({}))
        ends.sockets[0] = ends.open(0)
        ends.clients.enter(0)
        ends.clients.post(0, messages.Ready(1, 2, (3,)))
        assert ends.read(0) == messages.Ready(1, 2, (3,))
