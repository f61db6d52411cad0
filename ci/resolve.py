#!/usr/bin/env python3
"""Shows that hotplug's requirements resolve from a package index alone, for every Python that it supports.

pip resolves without installing anything, as a machine does that has neither wheels at hand nor constraints of its own:
of this machine's pip configuration only the way to the index is kept. Says so and ends with 0 where no index answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "ci" / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("cpu", "cuda", "dev")
"""What `make` installs."""
KEPT = ("index-url", "cert", "client-cert", "proxy", "trusted-host", "timeout")
"""Options of pip that lead to the index; what adds to it (find-links, extra-index-url, constraint) is left out."""


def configured() -> dict[str, str]:
    """This machine's KEPT options as environment variables of pip."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = {}
    for line in shown.stdout.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in KEPT:
            found[f"PIP_{option.upper().replace('-', '_')}"] = value.strip("'")
    return found


def own_pip(folder: Path, environment: dict[str, str]) -> str:
    """A Python whose pip reads the metadata of wheels without fetching them; older ones fetch gigabytes."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "pip>=25"], env=environment, check=True)
    return python


def pip(python: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pip install --dry-run` in an environment of nothing else."""
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main() -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = {**clean, **configured(), "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    reached = pip(sys.executable, environment, "--no-deps", "--retries", "0", "packaging")
    if reached.returncode:
        print(f"not shown: no package index answers ({(reached.stderr.strip().splitlines() or ['?'])[-1]})")
        return 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        own = own_pip(Path(folder, "pip"), environment)
        requirements = Path(folder, "requirements.txt")
        requirements.write_text("\n".join(lines))

        def resolve(python: str, *constraints: str) -> subprocess.CompletedProcess[str]:
            return pip(own, environment, "--python-version", python, "--only-binary", ":all:", "--target", folder,
                       "--requirement", str(requirements), *constraints)  # fmt: skip

        runs = {f"Python {python}, ci/constraints.txt": pool.submit(resolve, python, "--constraint", str(CONSTRAINTS))
                for python in PYTHONS}  # fmt: skip
        runs[f"Python {PYTHONS[-1]}, newest versions"] = pool.submit(resolve, PYTHONS[-1])
        failed = 0
        for name, run in runs.items():
            outcome = run.result()
            failed += outcome.returncode != 0
            print(f"{name}: {'does not resolve' if outcome.returncode else 'resolves'}")
            if outcome.returncode:
                print(outcome.stderr.strip())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
