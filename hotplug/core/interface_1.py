"""Interface 1.x, served by a core of 2.0: everything that is kept for platforms that were written for it.

A platform is one of 1.x if its `api_version` is 1.x, or if it has none: 1.x took it for "1.0" then. What differs:

- A kernel was a function of all parameters of its op's reference and was called with the static ones too:
  `Impl(op, provider, fn)`. Sinks and soft cap of `attention` were passed only where a model had one of them.
- `AttentionInputs.prepared` was an attribute for whatever a kernel kept of a step.
- `repack` took and gave one tensor, and was not asked about weights of several.
- `block_copy` had facts of keys and values; a page is bytes since 2.0, so that kernels of 1.x are not asked.
- Four ops and the quantization "packed" had other names; `Impl` had tags and `Limits` an alignment, which nothing read.
- `hotplug.vendor` exported the optional protocols one by one (`PROTOCOLS`).

`hotplug.vendor` has its `Impl`, `Limits` and `CompileLimits` from here, since a module cannot tell who imports it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from hotplug.core.errors import PlanError
from hotplug.core.ops import registry
from hotplug.core.ops.reference import with_constants
from hotplug.core.ops.registry import Bucket, Fn, OpRegistry, SiteSpec, Verdict
from hotplug.core.platform import base
from hotplug.core.platform.base import Platform
from hotplug.core.platform.discovery import declared_version
from hotplug.core.platform.optional import HasWeights

if TYPE_CHECKING:
    from torch import Tensor

    from hotplug.core.ops.attention import AttentionInputs

PROTOCOLS = frozenset({
    "HasCapture", "HasComm", "HasCompile", "HasCompileCheck", "HasDiagnosis", "HasKV", "HasRuntime", "HasShare",
    "HasStepSizes", "HasTuning", "HasWarmup", "HasWeights",
})  # fmt: skip
"""What `hotplug.vendor` exported besides; it is in `hotplug.core.platform.optional`."""
_OPS = {
    "embed_stored": "embed_packed",
    "linear_stored": "linear_packed",
    "linear_stored_silu_mul": "linear_packed_silu_mul",
    "logits_stored": "logits_packed",
}
"""Ops by the names that they had in 1.1."""
_OTHER_FACTS = frozenset({"block_copy"})
"""Ops whose call sites state other facts than in 1.x, so that a check of 1.x cannot judge them."""
_OLD_OPS = {new: old for old, new in _OPS.items()}
_QUANTIZATION = {"stored": "packed"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as 1.x registered it."""

    op: str
    provider: str
    fn: Fn
    check: Callable[[SiteSpec], Verdict] | None = None
    accepts: Callable[[Bucket], bool] | None = None
    rank: int = 1
    tags: frozenset[str] = frozenset()


class Impl(registry.Impl):
    """What `hotplug.vendor.Impl` makes: an `Impl` of 2.0, or a `Kernel` where it is called as in 1.x."""

    def __new__(cls, op: str, provider: str, *args: Any, **options: Any) -> registry.Impl | Kernel:  # type: ignore[misc]
        if args or "fn" in options:
            return Kernel(op, provider, *args, **options)
        return registry.Impl(op, provider, **options)


class Limits(base.Limits):
    """What `hotplug.vendor.Limits` makes: the `Limits` of 2.0, from the arguments of either version."""

    def __new__(cls, *, alignment: int = 1, **fields: Any) -> base.Limits:  # type: ignore[misc]
        return base.Limits(**_renamed(fields))


class CompileLimits(base.CompileLimits):
    """What `hotplug.vendor.CompileLimits` makes, as `Limits` does."""

    def __new__(cls, **fields: Any) -> base.CompileLimits:  # type: ignore[misc]
        return base.CompileLimits(**_renamed(fields))


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    if "quantization" in fields:
        fields["quantization"] = tuple(_QUANTIZATION.get(name, name) for name in fields["quantization"])
    return fields


def register(platform: Platform, ops: OpRegistry) -> None:
    """Let a platform of either version add its kernels to `ops`. Raises what `OpRegistry.add` raises."""
    platform.register(_Adapter(ops) if _is_old(platform) else ops)  # type: ignore[arg-type]


def repacker(platform: HasWeights) -> Callable[[Sequence[Tensor], SiteSpec, str], Sequence[Tensor]]:
    """`platform.repack` as 2.0 has it, of a platform of either version."""
    if not _is_old(platform):
        return platform.repack
    repack_one: Callable[[Tensor, SiteSpec, str], Tensor] = platform.repack  # type: ignore[assignment]

    def repack(weight: Sequence[Tensor], spec: SiteSpec, provider: str) -> Sequence[Tensor]:
        return [repack_one(weight[0], _as_named(spec), provider)] if len(weight) == 1 else weight

    return repack


def _is_old(platform: object) -> bool:
    return declared_version(platform).startswith("1.")


class _Adapter:
    """The `OpRegistry` that a platform of 1.x is given."""

    def __init__(self, ops: OpRegistry) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted((*self._ops.names, *_OPS)))

    def op(self, name: str) -> registry.Op:
        return self._ops.op(_OPS.get(name, name))

    def add(self, kernel: Kernel) -> None:
        """`OpRegistry.add` of 1.x. Raises PlanError for a kernel of 2.0 too."""
        if not isinstance(kernel, Kernel):
            raise PlanError(
                "it has a make=, as interface 2.0 has kernels, and its platform does not say that it is for 2.0",
                where=f"kernel {kernel.provider} of {kernel.op}",
                hint='Give the platform api_version = "2.0".',
            )
        name, check = _OPS.get(kernel.op, kernel.op), kernel.check

        def make(spec: SiteSpec) -> Fn:
            return self._with_constants(kernel.fn, spec)

        self._ops.add(registry.Impl(
            name, kernel.provider, make=make, accepts=kernel.accepts, rank=kernel.rank,
            check=_other_facts if name in _OTHER_FACTS else _always if check is None
            else lambda spec: check(_as_named(spec)),
        ))  # fmt: skip

    def _with_constants(self, fn: Fn, spec: SiteSpec) -> Fn:
        """The callable of a site, from a function that takes the static parameters in their places too."""
        if spec.op == "attention":
            return _attention(fn, spec)
        return with_constants(self._ops.op(spec.op), fn, spec.facts)


def _always(_: SiteSpec) -> Verdict:
    return Verdict(True)


def _other_facts(spec: SiteSpec) -> Verdict:
    return Verdict(False, f"written for interface 1.x, in which {spec.op} had other facts")


def _as_named(spec: SiteSpec) -> SiteSpec:
    """`spec` with the name that its op had."""
    return dataclasses.replace(spec, op=_OLD_OPS[spec.op]) if spec.op in _OLD_OPS else spec


def _attention(fn: Fn, spec: SiteSpec) -> Fn:
    """Kernels written for 1.0 know of no sinks and no soft cap, which came with 1.1."""
    constants, soft_cap = (spec["scale"], spec["window"], spec["layout"]), spec["soft_cap"]

    def plain(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: None) -> Tensor:
        result: Tensor = fn(q, k_cache, v_cache, step.once(_with_prepared), *constants)
        return result

    def whole(q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionInputs, sinks: Tensor | None) -> Tensor:
        result: Tensor = fn(q, k_cache, v_cache, step.once(_with_prepared), *constants, sinks, soft_cap)
        return result

    return plain if soft_cap is None and not spec["sinks"] else whole


def _with_prepared(step: AttentionInputs) -> AttentionInputs:
    """`step` with the attribute `prepared`: the same for all layers of the step."""
    fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step) if field.init}
    made: AttentionInputs = _inputs_type()(**fields)
    return made


@cache
def _inputs_type() -> Callable[..., Any]:
    from hotplug.core.ops.attention import AttentionInputs  # torch, which describing a device needs not

    @dataclass(slots=True)
    class Inputs(AttentionInputs):
        prepared: Any = None

    return Inputs
