"""Whether a platform can compile a model's steps, asked before weights load (`HasCompileCheck`)."""

from __future__ import annotations

from collections.abc import Sequence

from hotplug.core.errors import PlatformError
from hotplug.core.ops.plan import Choice
from hotplug.core.platform.base import Platform
from hotplug.core.platform.optional import HasCompileCheck


def compiled_by(platform: Platform, choices: Sequence[Choice]) -> dict[str, str]:
    """What computes each site of a model in compiled steps, as far as the platform says.

    Raises PlatformError with every reason, and where it holds, if a site cannot be compiled. A fused op is as good as
    its parts: a program has either.
    """
    if not isinstance(platform, HasCompileCheck):
        return {}
    verdicts = {c.spec.site: platform.check_compile(c.spec) for c in choices}
    reasons = {site: "" if verdict.ok else verdict.reason for site, verdict in verdicts.items()}
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
    return {site: verdict.reason for site, verdict in verdicts.items() if verdict.ok}
