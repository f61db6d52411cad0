"""Files of what `hotplug tune` measured, as the next start reads them: by their types and bounds, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from hotplug.core.errors import ConfigError

T = TypeVar("T")

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(gt=0, le=1 << 53)]


def read_measured(path: Path, kind: type[T], what: str, command: str) -> T:
    """The contents of a JSON file as `kind`. Raises ConfigError where it is damaged: it names the file, why, and the
    `command` that writes it anew."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ConfigError(f"the record of measured {what} is damaged", where=str(path), why=str(e),
                          hint=f"Delete it, or write it anew with `hotplug tune {command}`.") from e  # fmt: skip
