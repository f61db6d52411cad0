"""The options of `pytest -p hotplug.plugins.conformance.pytest_plugin --pyargs hotplug.plugins.conformance`.

A pytest plugin and not a conftest.py, which pytest reads too late for its options to be known. It is loaded on request
only: other projects' runs of pytest have nothing to do with it.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hotplug conformance")
    group.addoption("--hotplug-platform", metavar="NAME", help="the installed platform to examine")
    group.addoption("--hotplug-quick", action="store_true", help="fewer cases of everything")
    group.addoption("--hotplug-model", metavar="MODEL", help="a model for the end-to-end check besides the small one")
    group.addoption("--hotplug-absent", action="append", default=[], metavar="NAME=VALUE",
                    help="a variable under which the device is absent; repeatable")  # fmt: skip
