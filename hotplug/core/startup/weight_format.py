"""In which format an engine keeps a model's weights: what the user says, else what the platform is best at.

A checkpoint whose matrices are in groups can be served from them or dequantized. Which is better is the platform's to
say (`Limits.quantization`, the first of it), whether its kernels can is theirs, and what the file holds is the file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError
from hotplug.core.extension.points import Extension
from hotplug.core.ops.registry import Fact, OpRegistry, SiteSpec
from hotplug.core.platform.base import Limits
from hotplug.core.quant.packed_scheme import HEAD, PACKED, PackedFormats, PackedScheme, packed_formats
from hotplug.core.quant.scheme import NONE, QuantScheme
from hotplug.core.weights.checkpoint import Checkpoint
from hotplug.core.weights.config import ModelConfig


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What was decided, and why."""

    name: str
    """As `--quantization` has it."""
    reason: str
    scheme: QuantScheme | None = None
    """How linear layers store their weights; None is floating point."""
    table_scheme: PackedScheme | None = None
    """How the embedding and the head store theirs."""
    site_schemes: Mapping[str, PackedScheme | None] = field(default_factory=dict)
    """Of the call sites that differ from these two."""


def asked_format(config: EngineConfig, extension: Extension, checkpoint: Checkpoint) -> WeightFormat | None:
    """What the configuration says, None where it leaves it open. Raises ConfigError."""
    name = config.quantization
    if name is None:
        return None
    if name == NONE:
        return WeightFormat(NONE, "asked for")
    if name == PACKED:
        return _packed("asked for", packed_formats(checkpoint.formats))
    scheme: QuantScheme = extension.find("quantization", name, option="--quantization")
    return WeightFormat(name, "asked for", scheme)


def preferred_format(
    limits: Limits,
    registry: OpRegistry,
    checkpoint: Checkpoint,
    *,
    dtype: str,
    arch: str,
    split_faults: Sequence[str] = (),
) -> WeightFormat:
    """Groups as they are stored where the platform puts that first and its kernels read them, else floating point.

    `split_faults` says why groups cannot be split over the ranks there are.
    """
    if limits.quantization[:1] != (PACKED,):
        return WeightFormat(NONE, "the platform serves floating point unless asked for another format")
    try:
        formats = packed_formats(checkpoint.formats)
    except ConfigError as e:
        return WeightFormat(NONE, ": ".join((e.what, *e.why)))
    refusals = list(split_faults)
    for site in _products(checkpoint.config, formats, dtype, arch):
        refusals += _refusals(registry, site)
    if refusals:
        return WeightFormat(NONE, "; ".join(dict.fromkeys(refusals)))
    names = " and ".join(scheme.name for scheme in formats.all)
    return _packed(f"the platform's kernels read {names} as stored", formats)


def _packed(reason: str, formats: PackedFormats) -> WeightFormat:
    return WeightFormat(PACKED, reason, formats.layers, formats.table, formats.others)


def _products(config: ModelConfig, formats: PackedFormats, dtype: str, arch: str) -> Iterator[SiteSpec]:
    """Call sites that stand for the model's products with groups."""
    hidden = config.hidden_size
    for scheme in formats.all:
        facts: dict[str, Fact] = {"in_features": hidden, "out_features": hidden, "bias": False, "scheme": scheme.name}
        yield SiteSpec(scheme.op.name, "layers", dtype, arch, facts)
    if formats.table is not None:
        facts = {"hidden": hidden, "vocab": config.vocab_size, "bias": False, "scheme": formats.table.name}
        yield SiteSpec("logits_packed", HEAD, dtype, arch, facts)


def _refusals(registry: OpRegistry, site: SiteSpec) -> list[str]:
    """Why no kernel takes the site; nothing where one does."""
    found = []
    for impl in registry.impls(site.op):
        try:
            ok, reason = impl.check(site)
        except Exception as e:  # the plan makes an error of it where the site is bound
            ok, reason = False, f"failed in its check: {type(e).__name__}: {e}"
        if ok:
            return []
        found.append(f"{reason} ({impl.provider})")
    return found or [f"no kernel of the platform serves {site.op}"]
