"""How traced ops are shown: one line an op and kernel, most time first."""

from __future__ import annotations

from typing import Any


def trace_lines(trace: dict[str, Any], limit: int = 20) -> list[str]:
    """The report of `--trace-ops` (`hotplug.core.ops.trace`) as text."""
    lines = [f"{'op':<16} {'kernel':<24} {'sites':>5} {'calls':>7} {'us/step':>10} {'median us':>10} {'share':>6}"]
    for entry in trace["ops"][:limit]:
        lines.append(
            f"{entry['op']:<16} {entry['provider']:<24} {entry['sites']:>5} {entry['calls']:>7} "
            f"{entry['us_per_step']:>10.1f} {entry['median_us']:>10.1f} {entry['share']:>6.1%}"
        )
    lines.append(f"{trace['total_us'] / 1000:.1f} ms in ops over {trace['steps']} steps; shapes by site: --trace-json")
    return lines
