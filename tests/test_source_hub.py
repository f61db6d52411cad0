"""`hf:` sources over a hub on loopback: what is fetched, what is fetched again, and what a failure says."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FILES, Hub, serving

from hotplug.core.errors import SourceError
from hotplug.core.weights import fetch_hub
from hotplug.core.weights.source import resolve

WEIGHTS = FILES["model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the library takes for the real one, with short patience."""
    from huggingface_hub import constants

    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def failure() -> str:
    with pytest.raises(SourceError) as caught:
        resolve("hf:acme/tiny")
    return str(caught.value)


def test_a_snapshot_is_fetched_whole(hub: Hub) -> None:
    folder = resolve("hf:acme/tiny")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES


def test_a_file_that_stalls_halfway_ends_in_an_error_that_says_what_to_do(hub: Hub) -> None:
    def stall(request) -> bool:
        if request.wants_weights:
            request.begin_file(WEIGHTS)
            request.wfile.write(WEIGHTS[:100] if "Range" not in request.headers else b"")
            request.wfile.flush()
            hub.released.wait()
        return request.wants_weights

    hub.misbehave = stall
    said = failure()
    assert said.startswith("cannot fetch hf:acme/tiny: the hub stopped answering (ReadTimeout")
    assert "pull again: what was fetched is kept" in said


def test_a_connection_that_is_reset_in_a_file_is_taken_up_where_it_broke(hub: Hub) -> None:
    def reset_once(request) -> bool:
        if not request.wants_weights or request.headers.get("Range"):
            return False
        request.begin_file(WEIGHTS)
        request.wfile.write(WEIGHTS[:1000])
        request.wfile.flush()
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()
        hub.misbehave = None
        return True

    hub.misbehave = reset_once
    assert (resolve("hf:acme/tiny") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_that_comes_short_is_fetched_again(hub: Hub) -> None:
    def shorten_once(request) -> bool:
        if not request.wants_weights:
            return False
        request.begin_file(WEIGHTS)
        request.wfile.write(WEIGHTS[:1000])
        hub.misbehave = None
        return True

    hub.misbehave = shorten_once
    assert (resolve("hf:acme/tiny") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_hub_that_is_ill_for_a_moment_is_asked_again(hub: Hub) -> None:
    left = [503, 500]

    def ill(request) -> bool:
        if not left:
            return False
        request.answer(b"{}", status=left.pop())
        return True

    hub.misbehave = ill
    assert resolve("hf:acme/tiny").is_dir()


PAGE = b"<html>Please sign in to use this network.</html>"
ANSWERS = [
    ("ill", lambda r: r.answer(b"oops", status=500, kind="text/plain"), "is not well.*500.*Pull again later"),
    ("busy", lambda r: r.answer(b"", status=429), "takes no more requests for now.*Wait"),
    ("login-page", lambda r: r.answer(PAGE, kind="text/html"), "answer cannot be read.*may ask for a login"),
    ("other-json", lambda r: r.answer(b"[1, 2]"), "answer cannot be read.*HF_ENDPOINT"),
    ("half-json", lambda r: r.answer(b'{"id": "acme/ti'), "answer cannot be read"),
    ("circle", lambda r: r.answer(b"", status=302, Location=r.path), "redirects in a circle.*HF_ENDPOINT"),
    ("denied", lambda r: r.answer(b"", status=403), "refuses access.*HF_TOKEN"),
    ("gated", lambda r: r.answer(b"", status=403, **{"X-Error-Code": "GatedRepo"}), "access to the model must be"),
    ("unknown", lambda r: r.answer(b"", status=404, **{"X-Error-Code": "RepoNotFound"}), "no such model"),
]


@pytest.mark.parametrize(("misbehave", "message"), [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS])
def test_an_answer_that_is_no_model_is_one_error_that_says_why(hub: Hub, misbehave, message: str) -> None:
    hub.misbehave = lambda request: misbehave(request) or True
    with pytest.raises(SourceError, match=f"^cannot fetch hf:acme/tiny: .*{message}"):
        resolve("hf:acme/tiny")


@pytest.mark.parametrize(("misbehave", "message"), [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS])
def test_the_same_where_a_single_file_is_asked_for(hub: Hub, misbehave, message: str) -> None:
    hub.misbehave = lambda request: misbehave(request) or True
    with pytest.raises(SourceError, match=r"^cannot fetch hf:acme/tiny/q4\.gguf: "):
        resolve("hf:acme/tiny/q4.gguf")


def test_a_login_page_in_place_of_weights_is_not_kept(hub: Hub) -> None:
    def page(request) -> bool:
        if request.path.endswith(".safetensors"):
            request.answer(PAGE, kind="text/html")
        return request.path.endswith(".safetensors")

    hub.misbehave = page
    assert "cannot fetch hf:acme/tiny" in failure()
    hub.misbehave = None
    assert (resolve("hf:acme/tiny") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_fetched_snapshot_serves_while_the_hub_is_ill(hub: Hub) -> None:
    folder = resolve("hf:acme/tiny")
    hub.misbehave = lambda request: request.answer(b"", status=503) or True
    assert resolve("hf:acme/tiny") == folder


def test_a_full_disk_names_the_folder_and_the_variable_that_moves_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "the disk is full" in failure() and "HF_HOME" in failure()


def test_an_error_is_repeated_only_where_the_library_has_not_done_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2

    monkeypatch.setattr(fetch_hub, "_PAUSE", 0.0)
    calls = []

    def download() -> str:
        calls.append(1)
        raise error

    for error, expected in ((httpx2.ReadTimeout("slow"), 1), (httpx2.ReadError("reset"), 3)):
        calls.clear()
        with pytest.raises(type(error)):
            fetch_hub._persistently(download)
        assert len(calls) == expected
