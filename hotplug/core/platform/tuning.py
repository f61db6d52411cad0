"""What `hotplug tune` and a platform that tunes its kernels say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResult:
    """One kernel at one shape: what it ran with before, and what is fastest. Times in microseconds."""

    kernel: str
    dtype: str
    shape: Mapping[str, int]
    before: Mapping[str, Any]
    """The configuration in use: an earlier measurement's or the kernel's own default."""
    after: Mapping[str, Any]
    """The fastest that computes the right values; `before` where none is clearly faster."""
    before_us: float | None
    """None where `before` fails."""
    after_us: float
    candidates: int
    """Configurations that were measured."""
    rejected: tuple[str, ...] = ()
    """Configurations that failed or computed wrong values, and how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSummary:
    """What a tuning run left."""

    file: Path
    """Where the configurations are, for this device; the platform reads it at its next start."""
    measured: int
    left: int
    """Kernels and shapes that the time did not suffice for; they keep what they have."""
