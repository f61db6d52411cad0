"""Kernels as `Impl.make` makes them of functions that take facts of a call site as keywords."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hotplug.vendor import SiteSpec


def made(fn: Callable[..., Any], *facts: str) -> Callable[[SiteSpec], Callable[..., Any]]:
    """Makes `fn` with these facts of the call site, as keywords of the same names; `fn` itself where there are none."""
    if not facts:
        return lambda _: fn
    return lambda spec: partial(fn, **{name: spec[name] for name in facts})
