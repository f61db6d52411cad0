"""Every error hotplug raises on purpose: one hierarchy, one way to word a message.

A message says what went wrong, where, why, and what to do about it. The HTTP layer maps the classes to
status codes; nothing here knows about HTTP.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HotplugError(Exception):
    """Base of all deliberate errors.

    `what` is the failure in one clause; `where` names the place (a file, a call site, a parameter);
    `why` lists the reasons; `hint` tells the reader what to do next.
    """

    def __init__(self, what: str, *, where: str = "", why: str | Iterable[str] = "", hint: str = "") -> None:
        self.what = what
        self.where = where
        self.why: tuple[str, ...] = (why,) if isinstance(why, str) and why else tuple(why)
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if len(self.why) == 1:
            text += f": {self.why[0]}"
        elif self.why:
            text += ":" + "".join(f"\n  - {reason}" for reason in self.why)
        if self.hint:
            text += ("\n" if len(self.why) > 1 else ". ") + self.hint
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(cls: type[HotplugError], state: dict[str, object]) -> HotplugError:
    """Unpickle an error whose constructor takes other arguments than `Exception` remembers."""
    error = cls.__new__(cls)
    error.__dict__.update(state)
    return error


# --- at start -------------------------------------------------------------------------------------


class ConfigError(HotplugError):
    """An unknown key, a value out of range, or a combination that cannot work."""


class PlatformError(HotplugError):
    """A platform plugin is absent, broken, or of an incompatible interface version."""


class FeatureError(ConfigError):
    """The configuration asks for what the platform does not declare; all reasons together."""


class PlanError(HotplugError):
    """No kernel plan can be bound: a rank tie, a duplicate, a late registration, a forced provider."""


class ModelError(HotplugError):
    """The checkpoint cannot become a model."""


class UnsupportedModelError(ModelError):
    """The architecture, or a variant its config asks for, is not built."""


class WeightsError(ModelError):
    """A weight file is truncated, corrupt, or does not hold what the config promises."""


class SourceError(HotplugError):
    """A model source cannot be reached, found, or stored."""


class OutOfMemoryError(HotplugError):
    """What was asked for does not fit; says what was free and which option lowers it."""


# --- in service -----------------------------------------------------------------------------------


class RequestError(HotplugError):
    """A request is malformed or a parameter is out of range; `param` names it."""

    def __init__(self, what: str, *, param: str | None = None, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self.param = param


class PromptTooLongError(RequestError):
    """The prompt does not fit the model's context or the KV cache."""


class UnknownModelError(RequestError):
    """The request names a model this server does not serve."""


class QueueFullError(HotplugError):
    """Too many requests wait; `retry_after` is the advised pause in seconds."""

    def __init__(self, what: str, *, retry_after: int) -> None:
        super().__init__(what, hint=f"Retry after {retry_after} s.")
        self.retry_after = retry_after


class NotReadyError(HotplugError):
    """The engine is still starting."""


class EngineDeadError(HotplugError):
    """The engine process ended; carries its exit code and traceback in the message."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint with the valid name closest to a misspelled one, or the list of valid names."""
    names = sorted(valid)
    match = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {match[0]!r}?" if match else f"Valid names: {', '.join(names)}."
