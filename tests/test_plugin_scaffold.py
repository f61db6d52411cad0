"""`hotplug plugin new`: names that it takes, and what it refuses without leaving anything half written."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hotplug.cli.main import app
from hotplug.core.errors import ConfigError
from hotplug.plugins.scaffold import write_package


@pytest.mark.parametrize(
    ("name", "package", "cls"),
    [("acme-npu", "acme_npu", "AcmeNpu"), ("Acme.Wave", "acme_wave", "AcmeWave"), ("x1", "x1", "X1")],
)
def test_names_follow_from_the_distributions(tmp_path, name, package, cls):
    folder = write_package(name, tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == name
    assert project["entry-points"]["hotplug.platforms"] == {package: f"{package}:{cls}"}
    for file in folder.rglob("*.py"):
        compile(file.read_text(), str(file), "exec")
    assert "$" not in "".join(p.read_text() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("name", "words"),
    [("acme npu", "cannot name a distribution"), ("-npu", "cannot name a distribution"), ("", "cannot name"),
     ("1npu", "cannot name a Python module"), ("class", "cannot name a Python module"), ("../npu", "cannot name")],
)  # fmt: skip
def test_a_name_that_nothing_can_have_is_refused(tmp_path, name, words):
    with pytest.raises(ConfigError, match=words):
        write_package(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "acme-npu").mkdir()
    with pytest.raises(ConfigError, match="it is there already"):
        write_package("acme-npu", tmp_path)
    assert list((tmp_path / "acme-npu").iterdir()) == []


def test_the_command_reports_what_it_wrote_and_fails_in_words(tmp_path: Path):
    result = CliRunner().invoke(app, ["plugin", "new", "acme-npu", "--dir", str(tmp_path)])
    assert result.exit_code == 0
    assert "acme-npu/acme_npu/kernels.py" in result.stdout
    again = CliRunner().invoke(app, ["plugin", "new", "acme-npu", "--dir", str(tmp_path)])
    assert again.exit_code == 2
    assert "Choose another name" in again.stderr
    nowhere = CliRunner().invoke(app, ["plugin", "new", "acme-npu", "--dir", str(tmp_path / "none")])
    assert "no such folder" in nowhere.stderr
