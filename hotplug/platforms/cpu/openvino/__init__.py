"""Whole steps of the CPU platform through OpenVINO (the extra `cpu`): `--exec compile`.

    recipe.py      a step's program as plain data: calls in order (rows.py selects rows early)
    store.py       recipes on disk
    build.py       from a recipe to an OpenVINO model, weights as constants over torch's memory
    operations.py  what each operation becomes; attention.py and packed_constants.py hold the two longest
    compiler.py    the platform's `HasCompile`

Nothing here imports OpenVINO before a step is compiled.
"""

from __future__ import annotations

import importlib.metadata
import re

OLDEST, NEWEST = (2026, 4), 2026
"""Versions that are served: the paged attention of others takes other inputs, and promises no compatibility."""

ARCHS = ("avx2", "avx512", "avx512_bf16", "amx")

INSTALL = "pip install 'hotplug[cpu]'"


def version() -> str | None:
    """Of the installed OpenVINO, without importing it."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None


def refusal(arch: str) -> str:
    """Why whole steps are not compiled on a processor of this architecture; empty where they are."""
    if arch not in ARCHS:
        return f"OpenVINO's paged attention needs a processor with AVX2, this one has {arch}"
    found = version()
    if found is None:
        return f"OpenVINO is not installed ({INSTALL})"
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    wanted = f"{'.'.join(map(str, OLDEST))} or later of {NEWEST}"
    if numbers < OLDEST:
        return f"OpenVINO {found} is too old, {wanted} is needed ({INSTALL})"
    if numbers[0] > NEWEST:
        return f"OpenVINO {found} is too new, {wanted} is needed ({INSTALL})"
    return ""
