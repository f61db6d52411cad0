"""Checksums of fetched models: the manifest beside unpacked files, and what the hub's own cache records."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hotplug.core.errors import SourceError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """What was fetched: files by relative path, each with its SHA-256 (hex) and size in bytes."""

    source: str
    archive: str
    files: dict[str, tuple[str, int]]

    def write(self, folder: Path) -> None:
        document = {
            "source": self.source,
            "archive": self.archive,
            "files": {name: {"sha256": digest, "size": size} for name, (digest, size) in self.files.items()},
        }
        (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, None where there is none that can be read."""
        try:
            document = json.loads((folder / MANIFEST).read_bytes())
            files = {name: (f["sha256"], f["size"]) for name, f in document["files"].items()}
            return cls(document["source"], document["archive"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def complete(self, folder: Path) -> bool:
        """Whether every file is there in its size. Reads no contents: `verify_manifest` does."""
        return all(
            (folder / name).is_file() and (folder / name).stat().st_size == size
            for name, (_, size) in self.files.items()
        )


def verify_manifest(path: Path) -> int:
    """Files checked against the manifest of `path` or of a folder above it; 0 without one. Raises SourceError."""
    for folder in (path, *path.parents)[:4]:
        manifest = Manifest.read(folder) if folder.is_dir() else None
        if manifest is not None:
            bad = [name for name, (digest, _) in manifest.files.items() if _sha256(folder / name) != digest]
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
def storing(where: Path) -> Iterator[None]:
    """Turn an OSError of writing below `where` into a SourceError that says what to do."""
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
            hint=f"{hint}, or set HOTPLUG_CACHE to another folder.",
        ) from e


def _refuse(bad: list[str], where: Path) -> None:
    if bad:
        raise SourceError(
            f"{len(bad)} files differ from their recorded checksum", where=str(where),
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
