"""Configurations of kernels, measured on a device and kept as data: one JSON file for each kind of device.

A kernel asks `tuned(device).lookup(...)` and falls back to a default of its own. What may be tuned, each kernel module
says itself, with a `Tunable`. `hotplug tune` measures; see docs/tuning.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hotplug.vendor import PlatformError, SiteSpec, cache_folder

Config = Mapping[str, Any]
"""Compile-time constants and launch options of a kernel: `{"BLOCK": 1024, "num_warps": 4}`."""

SHIPPED = Path(__file__).parent / "configs"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Key:
    """What a configuration was measured for. `shape` holds "tokens", a power of two, where the kernel depends on it."""

    kernel: str
    dtype: str
    """By name: "bfloat16"."""
    shape: tuple[tuple[str, int], ...]
    """Names and sizes, sorted."""

    @classmethod
    def of(cls, kernel: str, dtype: str, shape: Mapping[str, int]) -> Key:
        return cls(kernel, dtype, tuple(sorted(shape.items())))

    def __getitem__(self, name: str) -> int:
        return dict(self.shape)[name]


@dataclass(frozen=True, slots=True)
class Case:
    """One set of inputs of a kernel, made for a key."""

    run: Callable[[Config], Any]
    """Launches the kernel with a configuration; the answer is its result, a tensor or a tuple of them."""
    reference: Callable[[], Any]
    """The same computed in plain PyTorch."""
    num_bytes: int
    """Read and written by a run; decides how many sets are needed to leave the L2 cache behind."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """A kernel with configurations to choose from.

    shape: the sizes that its configuration depends on at a call site, tokens left out; None = does not serve it.
    tokens: token counts to measure at; () where the configuration does not depend on them.
    default: what the kernel uses where nothing was measured.
    """

    kernel: str
    op: str
    shape: Callable[[SiteSpec], Mapping[str, int] | None]
    default: Callable[[Key], Config]
    candidates: Callable[[Key], Iterable[Config]]
    make: Callable[[Key, torch.device], Case]
    tokens: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)

    def keys(self, sites: Iterable[SiteSpec]) -> list[Key]:
        """Everything to measure for call sites, each once, fewest tokens first."""
        found: dict[Key, None] = {}
        for tokens in self.tokens or (None,):
            for site in sites:
                shape = self.shape(site) if site.op == self.op else None
                if shape is not None:
                    sizes = dict(shape) if tokens is None else {**shape, "tokens": tokens}
                    found[Key.of(self.kernel, site.dtype, sizes)] = None
        return list(found)


@dataclass(slots=True)
class Tuned:
    """The configurations measured for one kind of device."""

    entries: dict[Key, Config] = field(default_factory=dict)
    _found: dict[tuple[Any, ...], Config | None] = field(default_factory=dict)

    @classmethod
    def load(cls, device_name: str, shipped: Path = SHIPPED, own: Path | None = None) -> Tuned:
        """What is shipped for the device, and over it what the user measured (`own`; default: the cache folder).

        Raises PlatformError for a file that is not one of ours.
        """
        name = file_name(device_name)
        entries: dict[Key, Config] = {}
        for folder in (shipped, own_folder() if own is None else own):
            if (folder / name).exists():
                entries.update(read(folder / name))
        return cls(entries)

    def lookup(self, kernel: str, dtype: str, **shape: int) -> Config | None:
        """The configuration for a shape, or None. `tokens` need not match: the next larger count that was measured
        serves it, above all of them the largest. A hot path: remembered for each power of two of tokens.
        """
        if "tokens" in shape:
            shape["tokens"] = bucket(shape["tokens"])
        asked = (kernel, dtype, *shape.items())
        if asked not in self._found:
            self._found[asked] = self._nearest(Key.of(kernel, dtype, shape))
        return self._found[asked]

    def _nearest(self, key: Key) -> Config | None:
        if key in self.entries or "tokens" not in dict(key.shape):
            return self.entries.get(key)
        alike = {k["tokens"]: config for k, config in self.entries.items()
                 if (k.kernel, k.dtype) == (key.kernel, key.dtype) and "tokens" in dict(k.shape)
                 and {**dict(k.shape), "tokens": 0} == {**dict(key.shape), "tokens": 0}}  # fmt: skip
        if not alike:
            return None
        return alike[min((n for n in alike if n >= key["tokens"]), default=max(alike))]


@cache
def tuned(device: torch.device) -> Tuned:
    """The configurations for a torch device; none for the host, where kernels are only interpreted."""
    return Tuned.load(torch.cuda.get_device_name(device)) if device.type == "cuda" else Tuned()


def bucket(tokens: int) -> int:
    """The next power of two."""
    return 1 << max(tokens - 1, 0).bit_length()


def own_folder() -> Path:
    """Where the user's measurements are."""
    return cache_folder() / "tuned"


def file_name(device_name: str) -> str:
    """`NVIDIA_H200.json`."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device_name).strip("_") + ".json"


def read(path: Path) -> dict[Key, Config]:
    """The entries of a file. Raises PlatformError where it is not one of ours."""
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise PlatformError(f"schema {document['schema']} is not {SCHEMA}", where=str(path),
                                hint="Run `hotplug tune` again.")  # fmt: skip
        return {Key.of(e["kernel"], e["dtype"], e["shape"]): e["config"] for e in document["entries"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise PlatformError("not a file of kernel configurations", where=str(path), why=f"{type(e).__name__}: {e}",
                            hint="Delete it, or run `hotplug tune` again.") from e  # fmt: skip


def write(path: Path, device_name: str, entries: Mapping[Key, Config]) -> None:
    """Write a file so that another process sees all of it or nothing. Entries are sorted, so that a change shows."""
    rows = sorted(entries.items(), key=lambda item: (item[0].kernel, item[0].dtype, item[0].shape))
    lines = [json.dumps({"kernel": k.kernel, "dtype": k.dtype, "shape": dict(k.shape), "config": dict(c)})
             for k, c in rows]  # fmt: skip
    body = ",\n".join(f"  {line}" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(f'{{"schema": {SCHEMA}, "device": {json.dumps(device_name)}, "entries": [\n{body}\n]}}\n')
    part.replace(path)


def wrong(result: Any, expected: Any, dtype: str) -> str:
    """How a result differs from its reference beyond the rounding of `dtype`; "" where it does not."""
    tolerance = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-4}[dtype]
    pairs: Sequence[tuple[Tensor, Tensor]] = (
        [(result, expected)] if isinstance(result, Tensor) else list(zip(result, expected, strict=True))
    )
    for got, want in pairs:
        if got.shape != want.shape:
            return f"shape {list(got.shape)} instead of {list(want.shape)}"
        got, want = got.float(), want.float()
        error = (got - want).abs().max() / want.abs().max().clamp(min=1e-6)
        if not error <= tolerance:  # NaN too
            return f"relative error {error.item():.1e}"
    return ""
