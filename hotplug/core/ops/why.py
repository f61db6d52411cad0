"""Why a call site got its kernel: every candidate asked again, with its verdict and what became of it.

The plan keeps the choice and the refusals; this is the whole table, made when somebody asks.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from hotplug.core.errors import ConfigError, nearest
from hotplug.core.ops.plan import COMPOSED, Choice, Plan
from hotplug.core.ops.registry import REFERENCE, Impl, SiteSpec


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel that could serve a site, or not."""

    provider: str
    rank: int
    ok: bool
    """Whether its check says yes."""
    shapes: str
    """"all", or "some" where the kernel chooses by the shape of a step."""
    outcome: str
    """"bound", "refused", "outranked", or "set aside" by a forced provider or in favour of a fused op's parts."""
    reason: str


def sites_like(plan: Plan, pattern: str) -> list[Choice]:
    """The bound sites that a name or a pattern with shell wildcards means. Raises ConfigError where there is none."""
    found = [c for c in plan.choices if pattern == c.spec.site or fnmatch.fnmatchcase(c.spec.site, pattern)]
    if not found:
        sites = [c.spec.site for c in plan.choices]
        hint = nearest(pattern, sites) if len(sites) < 20 else _hint(pattern, sites)
        raise ConfigError(f"no call site matches {pattern!r}", where="--why", hint=hint)
    return found


def candidates(plan: Plan, choice: Choice) -> list[Candidate]:
    """Every candidate of a bound site, by rank, the reference last."""
    bound = choice.provider.split("+")
    forced = choice.reason.startswith("forced")
    table = []
    for impl in plan.registry.impls(choice.spec.op):
        ok, why = _verdict(impl, choice.spec)
        shapes = "all" if impl.accepts is None else "some"
        if impl.provider in bound:
            outcome, why = "bound", choice.reason
        elif not ok:
            outcome = "refused"
        elif forced:
            outcome, why = "set aside", f"{bound[0]} is forced"
        else:
            outcome, why = "outranked", f"{bound[-1]} takes every shape that reaches it"
        table.append(Candidate(impl.provider, impl.rank, ok, shapes, outcome, why))
    return [*table, _reference(choice, bound)]


def _reference(choice: Choice, bound: list[str]) -> Candidate:
    if bound[-1] == COMPOSED:
        outcome, reason = "set aside", "the op is lowered to its parts, which are bound in turn"
    elif bound == [REFERENCE]:
        outcome, reason = "bound", choice.reason
    elif REFERENCE in bound:
        outcome, reason = "bound", "step shapes that no kernel accepts"
    else:
        outcome, reason = "outranked", f"{bound[-1]} takes every shape that reaches it"
    return Candidate(REFERENCE, 0, True, "all", outcome, reason)


def _verdict(impl: Impl, spec: SiteSpec) -> tuple[bool, str]:
    try:
        ok, reason = impl.check(spec)
    except Exception as e:
        return False, f"its check failed: {type(e).__name__}: {e}"
    return bool(ok), reason


def _hint(pattern: str, sites: list[str]) -> str:
    close = nearest(pattern, sites)
    return close if close.startswith("Did") else f"Sites are called like {', '.join(sites[:8])}; wildcards are allowed."
