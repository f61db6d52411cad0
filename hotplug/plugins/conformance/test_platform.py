"""Every check of the conformance kit as a test."""

from __future__ import annotations

import pytest

from hotplug.plugins.conformance.report import Check, run_check
from hotplug.plugins.conformance.suite import CHECKS
from hotplug.plugins.conformance.target import Options, Target, find_target


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The platform that the options name."""
    given = request.config.getoption
    if not given("--hotplug-platform", default=None):
        pytest.exit("give -p hotplug.plugins.conformance.pytest_plugin and --hotplug-platform NAME", returncode=4)
    options = Options(quick=given("--hotplug-quick"), model=given("--hotplug-model"),
                      absent=tuple(given("--hotplug-absent")))  # fmt: skip
    return find_target(given("--hotplug-platform"), options, tmp_path_factory.mktemp("conform"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_conformance(check: Check, target: Target) -> None:
    result = run_check(check, target)
    if result.outcome == "skipped":
        pytest.skip("; ".join(result.notes))
    assert not result.failures, "\n".join(result.failures)
