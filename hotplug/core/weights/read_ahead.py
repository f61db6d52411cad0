"""Reading a checkpoint's files ahead: the system fetches them while the model is still being built."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path


def read_ahead(files: Sequence[Path]) -> None:
    """Have the system read `files` into its page cache, and return at once. What cannot be read is found out later."""
    if hasattr(os, "posix_fadvise"):  # not on every system
        threading.Thread(target=_advise, args=(files,), name="hotplug-read-ahead", daemon=True).start()


def _advise(files: Sequence[Path]) -> None:
    for file in files:
        try:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError:
            return
