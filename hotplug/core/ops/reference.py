"""An op's reference at a call site: its static parameters filled from the site's facts, the others left to the call.

A reference is an ordinary function of all its parameters, which is what defines the op. A parameter is static where it
bears the name of one of the op's facts and its annotation is a number, a string, a boolean or None; `bias` of `linear`
is a tensor, and the fact of this name says whether there is one.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from hotplug.core.ops.registry import Fact, Fn, Op

_STATIC = frozenset({int, float, str, bool, int | None, float | None, str | None, bool | None})


def parameters(op: Op) -> tuple[str, ...]:
    """Names of all parameters of an op's reference, in order."""
    return tuple(inspect.signature(op.reference).parameters)


def static_parameters(op: Op) -> frozenset[str]:
    """Names of those that a call site states as facts."""
    return _static(op.reference, tuple(op.facts))


@cache
def _static(reference: Fn, facts: tuple[str, ...]) -> frozenset[str]:
    named = [name for name in inspect.signature(reference).parameters if name in facts]
    hints = typing.get_type_hints(reference) if named else {}
    return frozenset(name for name in named if hints.get(name) in _STATIC)


def call_parameters(op: Op) -> tuple[str, ...]:
    """Names of those that the callable of a call site takes, in order."""
    static = static_parameters(op)
    return tuple(name for name in parameters(op) if name not in static)


def bound_reference(op: Op, facts: Mapping[str, Fact]) -> Fn:
    """The reference as the callable of a call site with these facts."""
    names, static = parameters(op), static_parameters(op)
    if static and all(name in static for name in names[-len(static) :]):
        return partial(op.reference, **{name: facts[name] for name in static})
    return with_constants(op, op.reference, facts)


def with_constants(op: Op, fn: Fn, facts: Mapping[str, Fact]) -> Fn:
    """The callable of a call site, from `fn`, which takes all parameters of the op; itself where none is static."""
    names, static = parameters(op), static_parameters(op)
    if not static:
        return fn
    template = [facts[name] if name in static else None for name in names]
    places = [i for i, name in enumerate(names) if name not in static]

    def call(*args: Any) -> Any:
        given = list(template)
        for place, arg in zip(places, args, strict=True):
            given[place] = arg
        return fn(*given)

    return call


def without_constants(op: Op, fn: Fn) -> Fn:
    """The opposite: a function of all parameters, which leaves the static ones out, from a site's callable `fn`."""
    static = static_parameters(op)
    if not static:
        return fn
    kept = [i for i, name in enumerate(parameters(op)) if name not in static]

    def call(*args: Any) -> Any:
        return fn(*[args[i] for i in kept])

    return call


def all_arguments(op: Op, args: Sequence[Any], facts: Mapping[str, Fact]) -> tuple[Any, ...]:
    """The arguments of the reference in order, from those of a site's callable; trailing defaults may be left out."""
    static, given = static_parameters(op), iter(args)
    found = []
    for name, parameter in inspect.signature(op.reference).parameters.items():
        found.append(facts[name] if name in static else next(given, parameter.default))
    return tuple(found)
