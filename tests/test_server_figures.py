"""Figures of several front ends: rows of one table, summed; and the sockets that the front ends listen at."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from pathlib import Path

import httpx2
import pytest
from fake_llm import FakeLLM
from prometheus_client import generate_latest

from hotplug.core.errors import ConfigError
from hotplug.core.request import EngineStats
from hotplug.server.app import create_app
from hotplug.server.config import ServerConfig
from hotplug.server.figures import FINISH_REASONS, HISTOGRAMS, Figures
from hotplug.server.metrics import EngineMetrics
from hotplug.server.serve import listen, listen_all


def text(metrics: EngineMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_any_front_end_shows_the_sum_of_all(tmp_path):
    table = tmp_path / "figures"
    Figures.create(table, 3).own("restarts")[0] += 2
    both = [EngineMetrics(Figures.attach(table, row)) for row in range(2)]
    for metrics, seconds in zip(both, (0.004, 0.2), strict=True):
        metrics.first_token(seconds)
        metrics.inter_tokens([seconds, 2 * seconds])
        metrics.finished("stop", 1, 1, seconds)
    assert text(both[0]) == text(both[1])
    assert "hotplug_time_to_first_token_seconds_count 2.0" in text(both[0])
    assert "hotplug_time_to_first_token_seconds_sum 0.204" in text(both[0])
    assert 'hotplug_time_to_first_token_seconds_bucket{le="0.005"} 1.0' in text(both[0])
    assert "hotplug_inter_token_latency_seconds_count 4.0" in text(both[0])
    assert 'hotplug_requests_finished_total{reason="stop"} 2.0' in text(both[0])
    assert "hotplug_frontend_restarts_total 2.0" in text(both[0])


def test_a_front_end_goes_on_from_the_row_of_the_one_before(tmp_path):
    table = tmp_path / "figures"
    Figures.create(table, 2)
    for _ in range(2):
        metrics = EngineMetrics(Figures.attach(table, 0))
        metrics.queued(0.1)
        del metrics
    assert "hotplug_queue_time_seconds_count 2.0" in text(EngineMetrics(Figures.attach(table, 0)))


def _count(table: Path, row: int, times: int) -> None:
    metrics = EngineMetrics(Figures.attach(table, row))
    for _ in range(times):
        metrics.queued(0.1)


def test_processes_that_count_at_the_same_time_lose_nothing(tmp_path):
    table = tmp_path / "figures"
    figures = Figures.create(table, 3)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(table, row, 20_000)) for row in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    *counts, _ = figures.total("queue_time")
    assert sum(counts) == 40_000


def test_figures_do_not_share_cells(tmp_path):
    figures = Figures.create(tmp_path / "figures", 1)
    for number, name in enumerate([*HISTOGRAMS, "finished", "restarts"]):
        figures.own(name)[:] += number + 1
    for number, name in enumerate([*HISTOGRAMS, "finished", "restarts"]):
        assert set(figures.total(name)) == {number + 1}
    assert len(figures.total("finished")) == len(FINISH_REASONS)


def test_values_one_by_one_and_together_fall_into_the_same_buckets():
    one, all_ = EngineMetrics(), EngineMetrics()
    values = [0.0005, 0.001, 0.0011, 0.3, 2.5, 9.0]
    for value in values:
        one.inter_token(value, 1)
    all_.inter_tokens(values)
    pick = [line for line in text(one).splitlines() if line.startswith("hotplug_inter_token")]
    assert pick == [line for line in text(all_).splitlines() if line.startswith("hotplug_inter_token")]


def test_a_front_end_that_has_not_heard_the_engines_counters_does_not_show_them_as_zero(tmp_path):
    Figures.create(tmp_path / "figures", 2)
    app = create_app(FakeLLM(), ServerConfig(), figures=Figures.attach(tmp_path / "figures", 0))

    async def scrape() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/metrics")

    assert asyncio.run(scrape()).status_code == 503
    app.state.metrics.stats(EngineStats(generated_tokens=7))
    assert "hotplug_generation_tokens_total 7.0" in asyncio.run(scrape()).text


# --- sockets ----------------------------------------------------------------------------------------


def test_each_front_end_listens_on_the_same_port():
    sockets = listen_all(ServerConfig(port=0, frontends=3))
    assert len({s.getsockname() for s in sockets}) == 1
    assert len({s.fileno() for s in sockets}) == 3
    for each in sockets:
        each.close()


@pytest.mark.parametrize("ours", [1, 2])
@pytest.mark.parametrize("theirs", [1, 2])
def test_a_port_that_another_server_listens_on_is_refused(ours, theirs):
    others = listen_all(ServerConfig(port=0, frontends=theirs))
    with pytest.raises(ConfigError, match="in use"):
        listen_all(ServerConfig(port=others[0].getsockname()[1], frontends=ours))
    for each in others:
        each.close()


def test_connections_are_spread_over_the_sockets():
    sockets = listen_all(ServerConfig(port=0, frontends=2))
    clients = [socket.create_connection(sockets[0].getsockname()) for _ in range(128)]
    taken = []
    for each in sockets:
        each.setblocking(False)
        taken.append(0)
        try:
            while True:
                each.accept()[0].close()
                taken[-1] += 1
        except BlockingIOError:
            pass
    assert sum(taken) == 128
    assert min(taken) > 32  # 64 expected, and 5 times the standard deviation of 5.7 is 28
    for each in [*sockets, *clients]:
        each.close()


@pytest.mark.parametrize("count", [0, 65, "2"])
def test_a_number_of_front_ends_out_of_range_is_refused(count):
    with pytest.raises(ConfigError, match="frontends"):
        ServerConfig(frontends=count)


def test_the_socket_of_one_front_end_is_nobody_elses():
    with listen(ServerConfig(port=0)) as ours, pytest.raises(ConfigError, match="in use"):
        listen(ServerConfig(port=ours.getsockname()[1]), shared=True)
