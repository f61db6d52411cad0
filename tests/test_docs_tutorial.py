"""docs/platforms.md's tutorial, run as it stands: every command in order, and what it prints."""

from __future__ import annotations

import ast
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import hotplug.vendor
from hotplug.plugins.scaffold import write_package

PAGE = (Path(__file__).parent.parent / "docs" / "platforms.md").read_text()
TUTORIAL = PAGE[PAGE.index("## From nothing to a kernel") : PAGE.index("## The six members")]
BLOCKS = re.findall(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
MOST_LINES, MOST_SYMBOLS = 120, 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has all that this one has, where pip may install, and its shell's folder."""
    folder = tmp_path_factory.mktemp("tutorial")
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    packages = next(folder.glob("venv/lib/*/site-packages"))
    for bundled in ("setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth"):
        for found in packages.glob(f"{bundled}*"):  # of Python's own age; the newer one builds the packages
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (packages / "parent.pth").write_text("\n".join(lines) + "\n")
    command = folder / "venv/bin/hotplug"
    command.write_text(f'#!/bin/sh\nexec {folder}/venv/bin/python -m hotplug.cli "$@"\n')
    command.chmod(0o755)
    return folder


def shell(place: Path, command: str) -> str:
    """What a command prints, warnings of references and progress left out."""
    environment = {
        **os.environ,
        "PATH": f"{place}/venv/bin:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(place / "cache"),
        "HOTPLUG_CACHE": os.environ.get("HOTPLUG_CACHE") or str(_models()),
        "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONWARNINGS": "ignore", "COLUMNS": "200",
    }  # fmt: skip
    done = subprocess.run(
        command, shell=True, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    return done.stdout


def _models() -> Path:
    from hotplug.core.weights.source import cache_folder

    return cache_folder()


def matches(expected: str, printed: str) -> bool:
    """Whether output is as the page has it: `...` alone stands for any lines, within a line for any text."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line.rstrip()).replace(r"\.\.\.", ".*") + r" *\n"
        for line in expected.splitlines()
    )
    return re.fullmatch(pattern, printed if printed.endswith("\n") or not printed else printed + "\n") is not None


def test_every_command_prints_what_the_page_says(place: Path, smollm2_path: Path) -> None:
    commands = 0
    for kind, file, text in BLOCKS:
        if file:
            (place / "acme-npu" / file).write_text(text)
            continue
        assert kind == "console"
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            printed = shell(place, command)
            assert matches(expected, printed), f"$ {command}\n{printed}\n--- expected\n{expected}"
            commands += 1
    assert commands == len(re.findall(r"^\$ ", TUTORIAL, re.MULTILINE))


def test_uninstalling_leaves_no_trace(place: Path) -> None:
    packages = next(place.glob("venv/lib/*/site-packages"))
    before = {p.name for p in packages.iterdir()}
    write_package("other-npu", place)
    assert shell(place, "pip install -q ./other-npu") == ""
    assert {p.name for p in packages.iterdir()} - before == {"other_npu", "other_npu-0.1.0.dist-info"}
    assert '"other_npu"' in shell(place, "hotplug devices --json")
    assert shell(place, "pip uninstall -q -y other-npu") == ""
    assert {p.name for p in packages.iterdir()} == before
    assert '"other_npu"' not in shell(place, "hotplug devices --json")


def test_a_generated_package_passes_its_own_tests(place: Path) -> None:
    write_package("third-npu", place)
    shell(place, "pip install -q ./third-npu")
    printed = shell(place, "python -m pytest -q -p no:cacheprovider third-npu")
    assert "13 passed" in printed, printed


def test_the_page_counts_lines_and_symbols_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_package("acme-npu", tmp_path)

    def lines(*paths: str) -> int:
        return sum(1 for path in paths for line in (folder / path).read_text().splitlines() if line.strip())

    first, kernel = lines("pyproject.toml", "acme_npu/__init__.py"), lines("acme_npu/kernels.py")
    files = [folder / "acme_npu" / name for name in ("__init__.py", "kernels.py")]
    imports = [n for f in files for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.ImportFrom)]
    symbols = {alias.name for n in imports if n.module == "hotplug.vendor" for alias in n.names}
    with capsys.disabled():
        print(f"\nscaffold: {first} lines from nothing to a first token, {kernel} more with a kernel, "
              f"{len(symbols)} of {len(hotplug.vendor.__all__)} vendor symbols, 0 patches")  # fmt: skip
    assert first + kernel < MOST_LINES
    assert len(symbols) <= MOST_SYMBOLS
    assert f"{first} lines" in " ".join(TUTORIAL.split())
    assert f"one kernel in {kernel} lines more" in " ".join(TUTORIAL.split())


def test_nothing_of_the_environment_is_shared_with_this_one(place: Path) -> None:
    assert str(place) in shell(place, "python -c 'import sys; print(sys.prefix)'")
    assert sys.prefix not in shell(place, "python -c 'import sys; print(sys.prefix)'")
