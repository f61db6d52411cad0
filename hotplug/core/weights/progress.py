"""How a fetch reports what it has done so far."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""Called with bytes done and bytes in total (None while unknown)."""
