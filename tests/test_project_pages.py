"""How people work on hotplug: issue forms and workflows that the hosting site takes, and RFCs that are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hotplug.vendor

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
FORMS = sorted(set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE" / "config.yml"})
RFCS = ROOT / "docs" / "rfcs"
NUMBERED = sorted(RFCS.glob("[0-9][0-9][0-9][0-9]-*.md"))
TEMPLATE = RFCS / "0000-template.md"
STATES = {"proposed", "accepted", "built", "declined", "replaced"}


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Files against a schema that check-jsonschema carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# --- forms and workflows ------------------------------------------------------------------------------


def test_every_kind_of_issue_has_a_form() -> None:
    assert [form.stem for form in FORMS] == ["bug", "feature", "performance", "platform"]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-issue-forms", FORMS),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
        ("github-workflows", sorted((GITHUB / "workflows").glob("*.yml"))),
    ],
)
def test_files_for_the_hosting_site_fit_its_schema(schema: str, files: list[Path]) -> None:
    assert files
    done = check(schema, *files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_form_that_does_not_fit_is_found(tmp_path: Path) -> None:
    form = tmp_path / "bug.yml"
    form.write_text(FORMS[0].read_text().replace("type: textarea", "type: essay", 1))
    done = check("github-issue-forms", form)
    assert done.returncode == 1
    assert "essay" in done.stdout + done.stderr


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_asks_each_question_once(form: Path) -> None:
    """The schema cannot say that ids and labels are unique, which the site wants."""
    for pattern in (r"^ +id: (.+)$", r"^ {6}label: (.+)$"):
        found = re.findall(pattern, form.read_text(), re.MULTILINE)
        assert found and sorted(set(found)) == sorted(found)


def test_a_performance_regression_comes_with_what_bench_printed() -> None:
    text = (GITHUB / "ISSUE_TEMPLATE" / "performance.yml").read_text()
    for name in ("bench_good", "bench_bad"):
        (question,) = re.findall(rf"id: {name}\n(.*?)(?=\n  - type|\Z)", text, re.DOTALL)
        assert "`hotplug bench` output" in question and "required: true" in question


# --- RFCs ---------------------------------------------------------------------------------------------


def headings(page: Path) -> list[str]:
    return re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)


def head(page: Path) -> tuple[str, str, str]:
    """(number, title, state) that an RFC says of itself."""
    text = page.read_text()
    title = re.match(r"# RFC (\d{4}): (.+)\n", text)
    state = re.search(r"^- State: (\w+)", text, re.MULTILINE)
    assert title is not None and state is not None, page.name
    return title[1], title[2], state[1]


@pytest.mark.parametrize("page", NUMBERED, ids=lambda page: page.name)
def test_an_rfc_has_the_sections_of_the_template_and_a_known_state(page: Path) -> None:
    number, _, state = head(page)
    assert headings(page) == headings(TEMPLATE)
    assert page.name.startswith(number)
    assert state in STATES


def test_the_table_of_rfcs_is_what_they_say() -> None:
    table = re.findall(r"^\| \[(\d{4})\]\(([\w.-]+)\) \| (.+) \| (\w+) \|$", (RFCS / "README.md").read_text(), re.M)
    expected = [(page.name, *head(page)) for page in NUMBERED if page != TEMPLATE]
    assert [(file, number, title, state) for number, file, title, state in table] == expected


def test_the_rfc_of_the_platform_interface_speaks_of_the_version_that_is_there() -> None:
    text = (RFCS / "0001-platform-interface.md").read_text()
    assert f"`hotplug.vendor` {hotplug.vendor.API_VERSION}\n" in text
