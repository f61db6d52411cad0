"""Where compiled steps are kept: a folder whose name says everything that an artifact depends on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def artifact_folder(root: Path, facts: Mapping[str, Any]) -> Path:
    """The folder for artifacts of a program that `facts` describe, made if need be; facts.json in it says them.

    Equal facts give the same folder, in every process and on every start.
    """
    text = json.dumps(facts, indent=1, sort_keys=True, default=str)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"facts.json.{os.getpid()}"
    part.write_text(text)
    part.replace(folder / "facts.json")
    return folder


def source_hash(modules: Iterable[str]) -> str:
    """Changes when the source of one of the imported modules does: what a program was traced from."""
    digest = hashlib.sha256()
    for name in sorted(set(modules)):
        file = getattr(sys.modules.get(name), "__file__", None)
        digest.update(name.encode())
        if file is not None and Path(file).exists():
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]
