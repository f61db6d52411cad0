"""The documentation keeps its promises: the example platform works, and the tables leave nothing out."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

import hotplug.vendor
from hotplug.core.ops.registry import Impl
from hotplug.core.platform.base import Limits

DOCS = Path(__file__).parent.parent / "docs"
PLATFORMS = (DOCS / "platforms.md").read_text()
FILES = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", PLATFORMS, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", [f.name for f in (*dataclasses.fields(Limits), *dataclasses.fields(Impl))])
def test_every_field_of_limits_and_impl_is_explained(name: str) -> None:
    assert re.search(rf"^\| `{name}(\(\w+\))?` \|", PLATFORMS, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(hotplug.vendor.__all__))
def test_every_name_of_the_vendor_interface_is_mentioned(name: str) -> None:
    assert re.search(rf"`{name}\b", PLATFORMS) or re.search(rf"\b{name}\b", "".join(FILES.values()))


def test_every_export_is_in_the_table_of_exports() -> None:
    table = PLATFORMS[PLATFORMS.index("## What `hotplug.vendor` exports") : PLATFORMS.index("## Versions")]
    assert set(hotplug.vendor.__all__) <= set(re.findall(r"`(\w+)`", table))
    for kind in (hotplug.vendor.Feature, hotplug.vendor.ExecMode, hotplug.vendor.KVLayout):
        assert {member.name for member in kind} <= set(re.findall(r"`(\w+)`", table))


def test_the_page_of_operations_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("docs_ops", DOCS.parent / "ci" / "docs" / "ops.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `make docs`"
