"""The life of a server: configuration, taking the port, readiness, an engine that fails."""

from __future__ import annotations

import socket

import pytest
from fake_llm import FakeLLM

from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError, EngineDeadError, ModelError
from hotplug.server.config import ServerConfig
from hotplug.server.serve import listen, run, serve


def test_unknown_option_comes_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'prot'.*'port'"):
        ServerConfig.from_mapping({"prot": 1})


@pytest.mark.parametrize(
    "option",
    [{"port": 70000}, {"port": "80"}, {"api_key": ("",)}, {"api_key": "k"}, {"max_body_size": "x"},
     {"max_body_size": 10}, {"shutdown_grace": -1}],
)  # fmt: skip
def test_option_out_of_range_is_refused(option):
    with pytest.raises(ConfigError):
        ServerConfig(**option)


def test_options_come_from_the_server_table(tmp_path):
    file = tmp_path / "hotplug.toml"
    file.write_text('[engine]\nmodel = "m"\n[server]\nport = 9000\napi_key = ["a", "b"]\n')
    config = ServerConfig.from_file(file, host="0.0.0.0")
    assert (config.port, config.api_key, config.host) == (9000, ("a", "b"), "0.0.0.0")


def test_port_in_use_is_refused_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            run(EngineConfig(model="no-such-model"), ServerConfig(port=port))


def test_port_is_ours_from_the_start():
    with listen(ServerConfig(port=0)) as ours, pytest.raises(ConfigError, match="in use"):
        listen(ServerConfig(port=ours.getsockname()[1]))


def test_host_that_is_not_ours_is_refused():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):  # an address for documentation (RFC 5737)
        listen(ServerConfig(host="192.0.2.1", port=0))


def test_engine_that_cannot_start_ends_the_server_with_its_error():
    class Broken(FakeLLM):
        async def wait_ready(self) -> None:
            raise ModelError("no such model")

    llm, config = Broken(), ServerConfig(port=0)
    with listen(config) as sock, pytest.raises(ModelError, match="no such model"):
        serve(llm, config, sock, lambda url: None)
    assert llm.closed.is_set()


def test_engine_that_refuses_to_start_ends_the_server_with_its_error():
    class Broken(FakeLLM):
        async def start(self) -> None:
            raise ModelError("no such model")

    config = ServerConfig(port=0)
    with listen(config) as sock, pytest.raises(ModelError, match="no such model"):
        serve(Broken(), config, sock, lambda url: None)


def test_engine_that_dies_ends_the_server_with_its_failure():
    llm, config = FakeLLM(), ServerConfig(port=0)
    urls = []

    def die(url: str) -> None:
        urls.append(url)
        llm.die("exit code 9")

    with listen(config) as sock, pytest.raises(EngineDeadError, match="exit code 9"):
        serve(llm, config, sock, die)
    assert urls == [f"http://127.0.0.1:{sock_port(urls[0])}"]


def sock_port(url: str) -> int:
    return int(url.rsplit(":", 1)[1])
