"""Whether a platform can compile a model's steps, asked before weights load (`HasCompileCheck`)."""

from __future__ import annotations

from collections.abc import Sequence

from hotplug.core.errors import PlatformError
from hotplug.core.ops.plan import Choice
from hotplug.core.platform.base import Platform
from hotplug.core.platform.optional import HasCompileCheck


def check_compiled(platform: Platform, choices: Sequence[Choice]) -> None:
    """Raise PlatformError with every reason, and where it holds, if a site of the model cannot be compiled.

    A fused op is as good as its parts: a program has either.
    """
    if not isinstance(platform, HasCompileCheck):
        return
    reasons = {c.spec.site: "" if (v := platform.check_compile(c.spec)).ok else v.reason for c in choices}
    parts: dict[str, list[str]] = {}
    for choice in choices:
        if choice.part_of:
            parts.setdefault(choice.part_of, []).append(choice.spec.site)
    faults: dict[str, list[str]] = {}
    for choice in choices:
        site = choice.spec.site
        split = parts.get(site)
        if not choice.part_of and reasons[site] and (split is None or any(reasons[part] for part in split)):
            faults.setdefault(reasons[site], []).append(site)
    if faults:
        why = [f"{sites[0]}{f' and {len(sites) - 1} more' if len(sites) > 1 else ''}: {reason}"
               for reason, sites in faults.items()]  # fmt: skip
        raise PlatformError("it cannot compile this model's steps", where=f"platform {platform.name}", why=why,
                            hint="Use --exec eager.")  # fmt: skip
