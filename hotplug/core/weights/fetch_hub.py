"""`hf:org/name`: a checkpoint of the Hugging Face hub, in the hub library's own cache (HF_HOME)."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from hotplug.core.errors import SourceError
from hotplug.core.weights.manifest import storing
from hotplug.core.weights.progress import Progress

_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?:/([\w./-]+\.gguf))?")
_ALLOW = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_IGNORE = ["original/*", "consolidated*", "onnx/*"]
"""The same weights again, in formats that are not read."""


def fetch_hub(name: str, progress: Progress) -> Path:
    """The snapshot folder of `org/name[@revision]`, or the one file of `org/name/file.gguf`.

    The hub library resumes, checks and caches; a cached snapshot serves when the hub cannot be reached.
    Raises SourceError.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise SourceError(f"cannot read {name!r} as a hub model",
                          hint="Write hf:org/name, hf:org/name@revision, or hf:org/name/file.gguf.")  # fmt: skip
    # Imported here: the hub library takes most of a second.
    import httpx
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision, file = match.groups()
    what, bar = f"cannot fetch hf:{name}", _bar_class(progress)
    hub = huggingface_hub
    with storing(Path(HF_HUB_CACHE)):  # outside: the hub's own errors are OSErrors, too
        try:
            if file:
                return Path(hub.hf_hub_download(repository, file, revision=revision, tqdm_class=bar))
            return Path(
                hub.snapshot_download(
                    repository, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE, tqdm_class=bar
                )
            )
        except GatedRepoError as e:
            raise SourceError(what, why="access to the model must be granted",
                              hint="Accept its terms on the hub and set HF_TOKEN.") from e  # fmt: skip
        except (RepositoryNotFoundError, RevisionNotFoundError) as e:
            raise SourceError(what, why="the hub has no such model or revision",
                              hint="Check the name; for a private model set HF_TOKEN.") from e  # fmt: skip
        except LocalEntryNotFoundError as e:
            raise SourceError(what, why="the hub does not answer and the cache does not hold the model",
                              hint="Check the network, or give a local path.") from e  # fmt: skip
        except EntryNotFoundError as e:
            raise SourceError(what, why=f"the repository has no file {file}") from e
        except (HfHubHTTPError, httpx.HTTPError) as e:
            raise SourceError(what, why=f"the hub does not answer ({e})", hint="Check the network.") from e


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
