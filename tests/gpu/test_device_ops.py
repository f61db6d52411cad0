"""Every op on the device: the platform's kernels, and the references that serve where it has none."""

from __future__ import annotations

from pathlib import Path

from hotplug.core.ops.collective import OPS as COLLECTIVES
from hotplug.platforms.cuda import CudaPlatform
from hotplug.plugins.conformance.check_ops import ops
from hotplug.plugins.conformance.report import Report
from hotplug.plugins.conformance.target import Options, Target


def test_every_op_equals_its_reference_on_the_host(tmp_path: Path, poisoned: None) -> None:
    platform, report = CudaPlatform(), Report()
    target = Target(platform, platform.probe()[0], CudaPlatform, Options(quick=True), tmp_path)
    ops(target, report)
    assert report.failures == []
    ran = report.data["cases"]
    names = set(target.registry.names) - {op.name for op in COLLECTIVES}
    assert [name for name in sorted(names) if not ran.get(f"{name} -> reference")] == []
