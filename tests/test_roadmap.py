"""ROADMAP.md: it says what docs/features.toml says, and what is called done is shown by something that exists."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from hotplug.cli.main import app

ROOT = Path(__file__).parent.parent
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ROW = '[[feature]]\narea = "Server"\nname = "API keys"\nstate = "done"\nshown = ["tests/test_cli.py"]\n'


def script(name: str) -> ModuleType:
    """A module of ci/docs."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "ci" / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


roadmap = script("roadmap")
FEATURES = roadmap.read_features(roadmap.TABLE.read_text())


def exists(shown: str) -> bool:
    """Whether a test file, a command or a make target is there."""
    kind, *words = shown.split()
    if kind == "make":
        return len(words) == 1 and words[0] in TARGETS
    if kind == "hotplug":
        return bool(words) and _is_command(words)
    return not words and re.fullmatch(r"tests/(gpu/)?test_\w+\.py", shown) is not None and (ROOT / shown).is_file()


def _is_command(words: list[str]) -> bool:
    command = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return False
    return True


def test_the_roadmap_is_what_the_table_says() -> None:
    assert roadmap.page(FEATURES) == roadmap.PAGE.read_text(), "run `make docs`"


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_what_shows_a_feature_exists(feature) -> None:
    assert [what for what in feature.shown if not exists(what)] == []


@pytest.mark.parametrize(
    "shown",
    ["tests/test_none.py", "tests/conftest.py", "docs/cpu.md", "hotplug", "hotplug none", "hotplug bench none",
     "hotplug serve none", "make", "make none", "make test now"],
)  # fmt: skip
def test_what_does_not_exist_is_found(shown: str) -> None:
    assert not exists(shown)


def test_what_exists_is_found() -> None:
    assert exists("tests/test_roadmap.py") and exists("hotplug bench serve") and exists("make test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROW.replace('"done"', '"soon"'), "API keys: the state 'soon' is none of done, partly, planned, refused"),
        (ROW.replace('shown = ["tests/test_cli.py"]', ""), "API keys: a row that is done needs shown"),
        (ROW.replace('"done"', '"partly"'), "API keys: a row that is partly needs note"),
        (ROW.replace('"done"', '"planned"'), "API keys: a row that is planned needs note"),
        (ROW.replace('"done"', '"refused"'), "API keys: a row that is refused needs note"),
        (ROW + "since = 1\n", "API keys: unknown keys since"),
        (ROW.replace('area = "Server"', ""), "API keys: lacks area"),
        (ROW + ROW, "feature twice: API keys"),
        (ROW + ROW.replace("Server", "Other").replace("API", "No") + ROW.replace("API", "More"),
         "area in two places: Server"),
    ],
)  # fmt: skip
def test_a_row_that_says_too_little_is_an_error_that_names_it(text: str, message: str) -> None:
    with pytest.raises(roadmap.TableError) as caught:
        roadmap.read_features(text)
    assert str(caught.value) == message
