"""The options of `pytest --pyargs hotplug.plugins.conformance`.

A pytest plugin (entry point group `pytest11`) and not a conftest.py, which pytest reads too late for its options to be
known. It is loaded by every run of pytest where hotplug is installed, so it does nothing but add them.
"""

from __future__ import annotations

import contextlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hotplug conformance")
    with contextlib.suppress(ValueError):  # another plugin's option of this name gives the same value
        group.addoption("--platform", help="the installed platform to examine")
    group.addoption("--conform-quick", action="store_true", help="fewer cases of everything")
    group.addoption("--conform-model", help="a model for the end-to-end check besides the small one")
    group.addoption("--conform-absent", action="append", default=[], metavar="NAME=VALUE",
                    help="a variable under which the device is absent; repeatable")  # fmt: skip
