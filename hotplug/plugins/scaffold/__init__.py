"""The scaffold of a platform package: `hotplug plugin new NAME`."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template

from hotplug.core.errors import ConfigError
from hotplug.core.platform.base import API_VERSION

_NAME = re.compile(r"[A-Za-z0-9]+(?:[-_.][A-Za-z0-9]+)*")
_FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    ".gitignore": "gitignore.txt",
    ".github/workflows/conform.yml": "ci/conform.yml.txt",
    "$package/__init__.py": "package/__init__.py.txt",
    "$package/kernels.py": "package/kernels.py.txt",
    "tests/test_$package.py": "tests/test_package.py.txt",
}
"""Path in the package to template."""


def write_package(name: str, parent: Path) -> Path:
    """Write a platform package called `name` to a new folder of this name in `parent`, and return it.

    Raises ConfigError for a name that no distribution or module can have, and for a folder that is there already.
    """
    words = _names(name)
    folder = parent / name
    if folder.exists():
        raise ConfigError("it is there already", where=str(folder), hint="Choose another name, or another --dir.")
    if not parent.is_dir():
        raise ConfigError("no such folder", where=str(parent))
    templates = files(__package__) / "template"
    rendered = {
        Template(path).substitute(words): Template((templates / source).read_text()).substitute(words)
        for path, source in _FILES.items()
    }
    for path, text in rendered.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def _names(name: str) -> dict[str, str]:
    """What the templates call things, from the distribution's name."""
    package = re.sub(r"[-.]", "_", name).lower()
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a distribution", where="NAME",
                          hint="Use letters, digits and single hyphens, e.g. acme-npu.")  # fmt: skip
    if not package.isidentifier() or keyword.iskeyword(package):
        raise ConfigError(f"{name!r} cannot name a Python module", where="NAME",
                          hint="Begin with a letter, e.g. acme-npu.")  # fmt: skip
    parts = package.split("_")
    return {
        "distribution": name,
        "package": package,
        "platform": package,
        "cls": "".join(part.capitalize() for part in parts),
        "title": " ".join(part.upper() if len(part) < 4 else part.capitalize() for part in parts),
        "variable": package.upper(),
        "api_version": API_VERSION,
    }
