"""Ops and their kernels: what an op is, what a kernel declares, and the table that holds both.

An op is a function with a plain-PyTorch reference that runs on any torch device. A kernel (`Impl`) claims
an op at the call sites whose static facts it can serve, and is made for each of them. The registry is filled once, at
load; the plan (`hotplug.core.ops.plan`) then freezes it and binds every call site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

from hotplug.core.errors import PlanError, nearest

REFERENCE = "reference"
"""Provider name of every op's plain-PyTorch reference."""

Fact = int | float | str | bool | None
Fn = Callable[..., Any]


class Verdict(NamedTuple):
    """A kernel's answer about a call site. A refusal must say why."""

    ok: bool
    reason: str = ""


class Bucket(NamedTuple):
    """The shape of a step, as far as a kernel may choose by it."""

    num_tokens: int
    max_query_len: int


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """The static facts of one call site: everything that `Impl.check` and `Impl.make` may look at."""

    op: str
    site: str
    """Where in the model, e.g. `layers.3.attn`."""
    dtype: str
    arch: str
    """`DeviceInfo.arch` of the device."""
    facts: Mapping[str, Fact]

    def __getitem__(self, name: str) -> Any:
        try:
            return self.facts[name]
        except KeyError:
            raise PlanError(f"the op {self.op!r} has no fact {name!r}", where=self.site,
                            hint=nearest(name, self.facts)) from None  # fmt: skip


Bind = Callable[..., Fn]
"""`bind(op, part, **facts)`: the planned callable of a part of a fused op."""


@dataclass(frozen=True, slots=True)
class Op:
    """An operation: its reference, the facts that its call sites state, and how it splits if it is fused.

    The reference defines the op, with all its parameters. Those that bear the name of a fact and are a number, a
    string, a boolean or None are static: a call site states them once, and its callable takes the others alone
    (`hotplug.core.ops.reference`).
    `lower(bind, spec)` builds the site's callable from smaller planned ops; the plan uses it where no kernel claims
    the fused op, so that a platform's small kernels are used before the reference is.
    `bucket(*args)` reads the step's shape off the callable's arguments, for kernels that serve only some shapes.
    `functional` is the reference of an op that writes to its arguments, returning new tensors instead: whole-step
    programs use it.
    `outline` answers tensors of the results' shapes and dtypes and computes nothing, where tracing the reference
    through every layer of a whole-step program is slow.
    """

    name: str
    reference: Fn
    facts: tuple[str, ...] = ()
    lower: Callable[[Bind, SiteSpec], Fn] | None = None
    bucket: Callable[..., Bucket] | None = None
    functional: Fn | None = None
    outline: Fn | None = None


Observe = Callable[[Op, SiteSpec, str, Fn], Fn]
"""`observe(op, spec, provider, fn)`: what to bind in place of `fn` to see its calls, or `fn` itself."""


@dataclass(frozen=True, slots=True)
class Impl:
    """A kernel of an op.

    make: builds the callable of a call site from its static facts, once, while the model is built. The callable takes
        the parameters of the op's reference that are not static, in their order. Called where no memory is taken too
        (`hotplug explain`), so what is large is allocated on the first call.
    check: may this call site use it? Sees static facts only.
    accepts: of a site it serves, which step shapes? Others go to the next candidate. None = all.
    rank: the highest ok rank wins; equal ranks at one site are an error. Above 0.
    """

    op: str
    provider: str
    _: KW_ONLY
    make: Callable[[SiteSpec], Fn]
    check: Callable[[SiteSpec], Verdict] = field(default=lambda _: Verdict(True))
    accepts: Callable[[Bucket], bool] | None = None
    rank: int = 1


class OpRegistry:
    """All ops and kernels of one engine. Frozen by the first plan made from it."""

    def __init__(self, ops: Iterable[Op]) -> None:
        self._ops: dict[str, Op] = {}
        self._impls: dict[str, list[Impl]] = {}
        self._frozen = False
        for op in ops:
            self.define(op)

    def define(self, op: Op) -> None:
        """Add an op. Model packages bring ops of their own this way, each with its reference."""
        self._refuse_if_frozen(f"op {op.name!r}")
        if op.name in self._ops:
            raise PlanError(f"the op {op.name!r} is defined twice")
        self._ops[op.name] = op
        self._impls[op.name] = []

    def add(self, impl: Impl) -> None:
        """Register a kernel. Raises PlanError for an unknown op, a duplicate provider or a late call."""
        where = f"kernel {impl.provider} of {impl.op}"
        self._refuse_if_frozen(where)
        if not isinstance(impl, Impl):
            raise PlanError("it is a function that takes constants, as interface 1.x has kernels", where=where,
                            hint="Give Impl a make=; docs/migrating.md shows how.")  # fmt: skip
        if impl.op not in self._ops:
            raise PlanError("there is no such op", where=where, hint=nearest(impl.op, self._ops))
        if impl.provider == REFERENCE or impl.rank < 1:
            raise PlanError("rank 0 and the name 'reference' belong to the op's own reference", where=where)
        if any(other.provider == impl.provider for other in self._impls[impl.op]):
            raise PlanError("this provider already has a kernel for the op", where=where,
                            hint="Give each kernel a provider name of its own, e.g. acme.decode.")  # fmt: skip
        self._impls[impl.op].append(impl)

    def _refuse_if_frozen(self, what: str) -> None:
        if self._frozen:
            raise PlanError("registered too late, the plan is already made", where=what,
                            hint="Register inside Platform.register.")  # fmt: skip

    def freeze(self) -> None:
        self._frozen = True

    def op(self, name: str) -> Op:
        try:
            return self._ops[name]
        except KeyError:
            raise PlanError(f"there is no op {name!r}", hint=nearest(name, self._ops)) from None

    def impls(self, op: str) -> tuple[Impl, ...]:
        """Kernels of an op, highest rank first; the reference is not among them."""
        return tuple(sorted(self._impls[op], key=lambda impl: (-impl.rank, impl.provider)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._ops))

    @property
    def providers(self) -> frozenset[str]:
        return frozenset(i.provider for impls in self._impls.values() for i in impls) | {REFERENCE}
