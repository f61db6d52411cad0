"""Checksums of fetched models: the manifest beside unpacked files, and what the hub's own cache records."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hotplug.core.errors import SourceError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A fetched file: SHA-256 (hex), size in bytes, and its modification time when its content was last checked."""

    sha256: str
    size: int
    mtime_ns: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What was fetched: entries by relative path."""

    source: str
    archive: str
    files: dict[str, Entry]

    def write(self, folder: Path) -> None:
        """Replace the manifest of `folder` at once: a reader sees the one before or this one."""
        document = {
            "source": self.source,
            "archive": self.archive,
            "files": {name: dataclasses.asdict(entry) for name, entry in self.files.items()},
        }
        partial = folder / f"{MANIFEST}.{os.getpid()}"
        partial.write_text(json.dumps(document, indent=2) + "\n")
        partial.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, None where there is none that can be read."""
        try:
            document = json.loads((folder / MANIFEST).read_bytes())
            files = {name: Entry(f["sha256"], f["size"], f.get("mtime_ns")) for name, f in document["files"].items()}
            return cls(document["source"], document["archive"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def damaged(self, folder: Path) -> list[str]:
        """Files that are not there as they were fetched.

        A file is read where its size is right and its modification time is new: once, since the time is then noted.
        What changes a file's bytes and keeps both is found by `verify` only, as `hotplug pull` runs it.
        """
        bad, checked = [], {}
        for name, entry in self.files.items():
            try:
                status = (folder / name).stat()
            except OSError:
                bad.append(name)
                continue
            if status.st_size != entry.size:
                bad.append(name)
            elif status.st_mtime_ns != entry.mtime_ns:
                if _sha256(folder / name) == entry.sha256:
                    checked[name] = dataclasses.replace(entry, mtime_ns=status.st_mtime_ns)
                else:
                    bad.append(name)
        if checked and not bad:
            with contextlib.suppress(OSError):  # a cache that cannot be written is checked each time
                dataclasses.replace(self, files=self.files | checked).write(folder)
        return bad


def verify_manifest(path: Path) -> int:
    """Files checked against the manifest of `path` or of a folder above it; 0 without one. Raises SourceError."""
    for folder in reversed((path, *path.parents)[:4]):  # a model may have a manifest.json of its own deeper down
        manifest = Manifest.read(folder) if folder.is_dir() else None
        if manifest is not None:
            bad = [name for name, entry in manifest.files.items() if _sha256(folder / name) != entry.sha256]
            _refuse(bad, folder)
            return len(manifest.files)
    return 0


def verify_hub_snapshot(path: Path) -> int:
    """Files of a hub snapshot whose blob is named by its SHA-256 (the large ones). Raises SourceError."""
    links = [path] if path.is_symlink() else [f for f in path.rglob("*") if f.is_symlink()]
    blobs = {link: link.resolve() for link in links}
    named = {link: blob for link, blob in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", blob.name)}
    _refuse([link.name for link, blob in named.items() if _sha256(blob) != blob.name], path)
    return len(named)


@contextmanager
def storing(where: Path, *, variable: str = "HOTPLUG_CACHE") -> Iterator[None]:
    """Turn an OSError of writing below `where`, which `variable` sets, into a SourceError that says what to do."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        denied = e.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = "Free some space" if full else "Make it writable" if denied else "Check the path"
        raise SourceError(
            "the disk is full" if full else "cannot store the model",
            where=str(where),
            why="" if full else f"{e.strerror or e}",
            hint=f"{hint}, or set {variable} to another folder.",
        ) from e


def _refuse(bad: list[str], where: Path) -> None:
    if bad:
        files = "1 file differs from its" if len(bad) == 1 else f"{len(bad)} files differ from their"
        raise SourceError(
            f"{files} recorded checksum", where=str(where),
            why=", ".join(sorted(bad)), hint="Delete the folder and pull the model again.",
        )  # fmt: skip


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return "unreadable"
    return digest.hexdigest()
