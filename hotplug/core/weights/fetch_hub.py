"""`hf:org/name`: a checkpoint of the Hugging Face hub, in the hub library's own cache (HF_HOME)."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hotplug.core.errors import SourceError
from hotplug.core.weights.manifest import storing
from hotplug.core.weights.progress import Progress

_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?:/([\w./-]+\.gguf))?")
_ALLOW = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_IGNORE = ["original/*", "consolidated*", "onnx/*"]
"""The same weights again, in formats that are not read."""
_ATTEMPTS, _PAUSE = 3, 1.0
"""Calls of the hub library where the hub breaks off, and seconds before the second, doubled each time."""
_AGAIN = "Check the network, then pull again: what was fetched is kept."


def fetch_hub(name: str, progress: Progress) -> Path:
    """The snapshot folder of `org/name[@revision]`, or the one file of `org/name/file.gguf`.

    The hub library resumes, checks and caches; a cached snapshot serves when the hub cannot be reached.
    Raises SourceError.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise SourceError(f"cannot read {name!r} as a hub model",
                          hint="Write hf:org/name, hf:org/name@revision, or hf:org/name/file.gguf.")  # fmt: skip
    import huggingface_hub as hub  # here: it takes most of a second
    from huggingface_hub.constants import HF_HUB_CACHE

    repository, revision, file = match.groups()
    bar = _bar_class(progress)

    def download() -> str:
        if file:
            return hub.hf_hub_download(repository, file, revision=revision, tqdm_class=bar)
        return hub.snapshot_download(
            repository, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE, tqdm_class=bar
        )

    with storing(Path(HF_HUB_CACHE), variable="HF_HOME"):
        try:
            return Path(_persistently(download))
        except Exception as e:  # on an answer that is not the hub's, its library fails in any way
            if isinstance(e, OSError) and e.errno is not None:
                raise  # the disk's; the library's own errors are OSErrors without a number
            raise _explained(_cause(e), name, file) from e


def _persistently(download: Callable[[], str]) -> str:
    """Call `download`, again where the hub broke off in a way that the hub library does not repeat by itself."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return download()
        except Exception as e:
            if attempt == _ATTEMPTS or not _broke_off(e):
                raise
            time.sleep(_PAUSE * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _broke_off(error: Exception) -> bool:
    """Whether `error` is a connection that was reset, a file that came short, or a hub that is busy or ill."""
    import httpx2

    error = _cause(error)
    if status := _status(error):
        return status == 429 or status >= 500
    short = isinstance(error, OSError) and error.errno is None and "Consistency check failed" in str(error)
    return short or isinstance(error, httpx2.ReadError | httpx2.WriteError)


def _cause(error: Exception) -> Exception:
    """The hub's refusal behind the library's error that the cache does not hold the model; else the error itself."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return error.__cause__
    return error


def _status(error: Any) -> int:
    """The status of the hub's answer, 0 where there is none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _explained(error: Exception, name: str, file: str | None) -> SourceError:
    """What an error of the hub library means, and what to do about it."""
    import httpx2
    from huggingface_hub import errors

    what, said = f"cannot fetch hf:{name}", f"{type(error).__name__}: {error}".strip().splitlines()[0]
    status = _status(error)
    match error:
        case errors.GatedRepoError():
            return SourceError(what, why="access to the model must be granted",
                               hint="Accept its terms on the hub and set HF_TOKEN.")  # fmt: skip
        case errors.RepositoryNotFoundError() | errors.RevisionNotFoundError():
            return SourceError(what, why="the hub has no such model or revision",
                               hint="Check the name; for a private model set HF_TOKEN.")  # fmt: skip
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return SourceError(what, why="the hub does not answer and the cache does not hold the model",
                               hint="Check the network and HF_HUB_OFFLINE, or give a local path.")  # fmt: skip
        case errors.EntryNotFoundError():
            return SourceError(what, why=f"the repository has no file {file}" if file else said)
        case errors.HFValidationError():
            return SourceError(what, why=said, hint="Write hf:org/name.")
        case _ if status in (401, 403):
            return SourceError(what, why=f"the hub refuses access ({said})", hint="Check HF_TOKEN.")
        case _ if status == 429:
            return SourceError(what, why=f"the hub takes no more requests for now ({said})",
                               hint="Wait a few minutes, or set HF_TOKEN.")  # fmt: skip
        case _ if status >= 500:
            return SourceError(what, why=f"the hub is not well ({said})", hint="Pull again later.")
        case httpx2.TooManyRedirects():
            return SourceError(what, why="the hub redirects in a circle", hint="Check HF_ENDPOINT and the proxy.")
        case httpx2.TimeoutException():
            return SourceError(what, why=f"the hub stopped answering ({said})", hint=_AGAIN)
        case httpx2.TransportError():
            return SourceError(what, why=f"the connection to the hub failed ({said})", hint=_AGAIN)
        case OSError() if "Consistency check failed" in str(error):
            return SourceError(what, why="a file came in another size than announced", hint=_AGAIN)
        case _:
            return SourceError(what, why=f"its answer cannot be read ({said})",
                               hint="Check HF_ENDPOINT and the proxy; the network may ask for a login.")  # fmt: skip


def _bar_class(progress: Progress) -> type:
    """A tqdm class that draws nothing and tells `progress` of the bars that count bytes."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False, "mininterval": 0})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B":
                progress(int(self.n), int(self.total) if self.total else None)
            return bool(shown)

    return Bar
