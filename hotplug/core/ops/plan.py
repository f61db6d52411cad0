"""The plan: which kernel serves each call site, chosen once while the model is built, with reasons.

A layer calls `plan.bind(...)` in its constructor and keeps the callable it gets; a step makes no lookup.
What a plan cannot bind is collected and raised together by `finish`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hotplug.core.errors import PlanError, nearest
from hotplug.core.ops.reference import bound_reference
from hotplug.core.ops.registry import REFERENCE, Bucket, Fact, Fn, Impl, Observe, Op, OpRegistry, SiteSpec, Verdict

COMPOSED = "composed"
"""Provider shown for a fused op that was lowered to its parts."""


@dataclass(frozen=True, slots=True)
class Rejected:
    provider: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One bound call site."""

    spec: SiteSpec
    provider: str
    reason: str
    """Why this one, e.g. "rank 10", "forced", "no kernel claims it"."""
    rejected: tuple[Rejected, ...]
    part_of: str = ""
    """The fused site that this one was lowered from."""


@dataclass(frozen=True, slots=True)
class _Force:
    pattern: str
    provider: str

    def covers(self, spec: SiteSpec) -> bool:
        return self.pattern == spec.op or fnmatch.fnmatchcase(spec.site, self.pattern)


class Plan:
    """Binds call sites to kernels.

    `force` entries are `op=provider` or `site-pattern=provider` (shell wildcards). `accelerator` says
    whether a reference op is worth a warning: on the host it is often the best there is. `observe` may put a
    callable of its own in front of each that is bound; without it, what is bound is the kernel itself.
    """

    def __init__(
        self,
        registry: OpRegistry,
        *,
        arch: str,
        force: Sequence[str] = (),
        accelerator: bool = False,
        observe: Observe | None = None,
    ) -> None:
        registry.freeze()
        self.registry = registry
        self._observe = observe
        self._arch = arch
        self._force = [_Force(*entry.split("=")) for entry in force]
        self._unused_force = set(self._force)
        self._faults: dict[str, list[str]] = {}  # what is wrong -> at which sites
        self._sites: set[str] = set()
        self._made: dict[tuple[str, str], Fn] = {}
        self.accelerator = accelerator
        self.choices: list[Choice] = []

    def bind(self, op: str, site: str, dtype: str, **facts: Fact) -> Fn:
        """The callable that serves `op` at `site`. Facts must be exactly those that the op declares."""
        return self._bind(op, site, dtype, facts, part_of="")

    def _bind(self, name: str, site: str, dtype: str, facts: dict[str, Fact], part_of: str) -> Fn:
        op = self.registry.op(name)
        if set(facts) != set(op.facts):
            raise PlanError(f"the op {name!r} takes the facts {sorted(op.facts)}, got {sorted(facts)}", where=site)
        if site in self._sites:
            raise PlanError("two call sites have the same name", where=site)
        self._sites.add(site)
        spec = SiteSpec(name, site, dtype, self._arch, facts)
        forced = self._forced(spec)
        if forced is not None:
            return self._bind_forced(op, spec, forced, part_of)
        return self._bind_best(op, spec, part_of)

    def _forced(self, spec: SiteSpec) -> str | None:
        matching = [f for f in self._force if f.covers(spec)]
        self._unused_force.difference_update(matching)
        providers = {f.provider for f in matching}
        if len(providers) > 1:
            self._fault(f"forced to several providers: {', '.join(sorted(providers))}", spec.site)
        return matching[0].provider if matching else None

    def _bind_forced(self, op: Op, spec: SiteSpec, provider: str, part_of: str) -> Fn:
        if provider == REFERENCE:
            self.choices.append(Choice(spec, REFERENCE, "forced", (), part_of))
            return self._reference(op, spec)
        impl = next((i for i in self.registry.impls(op.name) if i.provider == provider), None)
        if impl is None:
            known = {i.provider for i in self.registry.impls(op.name)} | {REFERENCE}
            self._fault(
                f"forced provider {provider!r} has no kernel for {op.name}; {nearest(provider, known)}", spec.site
            )
            return bound_reference(op, spec.facts)
        verdict = self._ask(impl, spec)
        if not verdict.ok:
            self._fault(f"forced provider {provider!r} cannot serve it: {verdict.reason}", spec.site)
            return bound_reference(op, spec.facts)
        if impl.accepts is None:
            self.choices.append(Choice(spec, provider, "forced", (), part_of))
            return self._observed(op, spec, provider, self._make(op, impl, spec))
        return self._bind_best(op, spec, part_of, forced=impl)

    def _ask(self, impl: Impl, spec: SiteSpec) -> Verdict:
        """The kernel's verdict; one that cannot be had is an error of the plan."""
        try:
            ok, reason = impl.check(spec)
        except Exception as e:
            reason = f"its check failed: {type(e).__name__}: {e}"
            self._fault(f"kernel {impl.provider}: {reason}", spec.site)
            return Verdict(False, reason)
        if not ok and not reason:
            self._fault(f"kernel {impl.provider} refused without a reason", spec.site)
        return Verdict(ok, reason)

    def _make(self, op: Op, impl: Impl, spec: SiteSpec) -> Fn:
        """The kernel's callable for a site; one that cannot be made is an error of the plan."""
        try:
            fn = impl.make(spec)
        except Exception as e:
            self._fault(f"kernel {impl.provider} cannot be made: {type(e).__name__}: {e}", spec.site)
            return bound_reference(op, spec.facts)
        if not callable(fn):
            self._fault(f"kernel {impl.provider}: its make gives {type(fn).__name__}, no function", spec.site)
        self._made[spec.site, impl.provider] = fn
        return fn

    def kernel(self, site: str, provider: str) -> Fn:
        """The callable that was made of a bound kernel. Raises KeyError for one that is not bound at the site."""
        return self._made[site, provider]

    def _bind_best(self, op: Op, spec: SiteSpec, part_of: str, forced: Impl | None = None) -> Fn:
        """The best by rank; before them `forced`, a kernel for some step shapes."""
        able: list[Impl] = []
        rejected: list[Rejected] = []
        for impl in self.registry.impls(op.name):
            if impl is forced:
                continue
            verdict = self._ask(impl, spec)
            if verdict.ok:
                able.append(impl)
            else:
                rejected.append(Rejected(impl.provider, verdict.reason))
        if forced is not None:
            able.insert(0, forced)
        chain: list[Impl] = []  # candidates that may be called: all up to the first that takes every shape
        for impl in able:
            chain.append(impl)
            if impl.accepts is None:
                break
        for first, second in itertools.pairwise(able[: len(chain) + 1]):
            if first.rank == second.rank and first is not forced:
                self._fault(
                    f"kernels {first.provider} and {second.provider} of {op.name} tie at rank {first.rank}; "
                    "one must yield, or use --force",
                    spec.site,
                )
        rejected += [Rejected(i.provider, f"outranked by {chain[-1].provider}") for i in able[len(chain) :]]
        whole = bool(chain) and chain[-1].accepts is None
        fallback = _fallback(op)
        if not chain:
            reason = "no kernel claims it" if op.lower is None else "no kernel claims the fused op"
        elif forced is None:
            reason = f"rank {chain[0].rank}" + ("" if whole else f", other shapes to {_FALLBACKS[fallback]}")
        else:
            reason = "forced, other shapes " + ("by rank" if len(chain) > 1 else f"to {_FALLBACKS[fallback]}")
        provider = "+".join([i.provider for i in chain] + ([] if whole else [fallback]))
        self.choices.append(Choice(spec, provider, reason, tuple(rejected), part_of))
        made = [self._observed(op, spec, impl.provider, self._make(op, impl, spec)) for impl in chain]
        fn = made[-1] if whole else self._without_kernel(op, spec)
        partial = len(chain) - 1 if whole else len(chain)
        for i in reversed(range(partial)):
            fn = self._by_shape(op, chain[i], made[i], fn)
        return fn

    def _by_shape(self, op: Op, impl: Impl, fn: Fn, otherwise: Fn) -> Fn:
        """A callable that takes `fn`, of `impl`, for the step shapes it accepts. In a captured step it runs once."""
        accepts = impl.accepts
        assert accepts is not None
        bucket = op.bucket or _rows

        def choose(*args: Any) -> Any:
            return fn(*args) if accepts(bucket(*args)) else otherwise(*args)

        return choose

    def _observed(self, op: Op, spec: SiteSpec, provider: str, fn: Fn) -> Fn:
        return fn if self._observe is None else self._observe(op, spec, provider, fn)

    def _without_kernel(self, op: Op, spec: SiteSpec) -> Fn:
        """What serves a site where no kernel of the op itself does: its parts, or its reference."""
        if op.lower is None:
            return self._reference(op, spec)
        return self._observed(op, spec, COMPOSED, self._lowered(op, spec))

    def _reference(self, op: Op, spec: SiteSpec) -> Fn:
        return self._observed(op, spec, REFERENCE, bound_reference(op, spec.facts))

    def _lowered(self, op: Op, spec: SiteSpec) -> Fn:
        assert op.lower is not None

        def bind_part(name: str, part: str, **facts: Fact) -> Fn:
            return self._bind(name, f"{spec.site}.{part}", spec.dtype, facts, part_of=spec.site)

        return op.lower(bind_part, spec)

    def finish(self) -> None:
        """Raise PlanError with everything that could not be bound."""
        for force in sorted(self._unused_force, key=str):
            known = {c.spec.op for c in self.choices} | self._sites
            self._fault(
                f"matches no call site; {nearest(force.pattern, known)}", f"--force {force.pattern}={force.provider}"
            )
        if self._faults:
            reasons = [f"{_some(sites)}: {fault}" for fault, sites in self._faults.items()]
            raise PlanError("the kernel plan cannot be made", why=reasons,
                            hint="`hotplug explain MODEL` shows the candidates of every site.")  # fmt: skip

    def _fault(self, what: str, site: str) -> None:
        self._faults.setdefault(what, []).append(site)

    @property
    def reference_sites(self) -> list[Choice]:
        """Sites that run a plain-PyTorch reference."""
        return [c for c in self.choices if REFERENCE in c.provider.split("+")]

    @property
    def hash(self) -> str:
        """Identifies the bound plan: part of compile-cache keys and of benchmark output."""
        lines = sorted(
            f"{c.spec.site}:{c.spec.op}:{c.spec.dtype}:{sorted(c.spec.facts.items())}:{c.provider}"
            for c in self.choices
        )
        return hashlib.sha256("\n".join([self._arch, *lines]).encode()).hexdigest()[:16]

    def report(self) -> list[dict[str, Any]]:
        """The plan as plain data, one entry a site, in the order of the model."""
        return [
            {
                "site": c.spec.site,
                "op": c.spec.op,
                "dtype": c.spec.dtype,
                "facts": dict(c.spec.facts),
                "provider": c.provider,
                "reason": c.reason,
                "part_of": c.part_of,
                "rejected": [{"provider": r.provider, "reason": r.reason} for r in c.rejected],
            }
            for c in self.choices
        ]


_FALLBACKS = {COMPOSED: "its parts", REFERENCE: "the reference"}


def _fallback(op: Op) -> str:
    """What serves the shapes of an op that no kernel takes."""
    return REFERENCE if op.lower is None else COMPOSED


def _some(sites: Sequence[str]) -> str:
    """The first of the sites, and how many more."""
    return sites[0] if len(sites) == 1 else f"{sites[0]} and {len(sites) - 1} more"


def _rows(x: Any, *_: Any) -> Bucket:
    return Bucket(x.shape[0], x.shape[0])
