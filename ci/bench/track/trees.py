"""Trees to measure: a commit, or the work tree, laid out in a folder of its own with its native library built.

A tree is an archive of the commit, so the repository's own state (branches, worktrees, index) is untouched. The native
library is built by the tree's own builder and kept under a hash of what it is made from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

NATIVE = Path("hotplug") / "platforms" / "cpu" / "native"
LIBRARY = "libhotplug_cpu.so"
WORK_TREE = "worktree"
"""Stands for the files as they are in the checkout, committed or not."""


class TreeError(Exception):
    """A commit that cannot be laid out or built; the message says why."""


@dataclass(frozen=True)
class Commit:
    id: str
    date: datetime
    subject: str
    parent: str | None
    """The first one."""


@dataclass(frozen=True)
class Tree:
    path: Path
    commit: Commit
    native: str
    """Hash of the native library's sources and compiler; "" where there are no such sources."""


def git(root: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """What git prints. Raises TreeError with what it said."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False,
                          env=environment and {**os.environ, **environment})  # fmt: skip
    if done.returncode:
        raise TreeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def find_commit(root: Path, name: str) -> Commit:
    """The commit that `name` (a branch, an id, `worktree`) stands for. Raises TreeError."""
    if name == WORK_TREE:
        name = work_tree(root)
    try:
        found = git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except TreeError as e:
        raise TreeError(f"there is no commit {name!r} in {root}") from e
    return _commit(root, found)


def _commit(root: Path, commit: str) -> Commit:
    identity, date, parents, subject = git(root, "log", "-1", "--format=%H%n%cI%n%P%n%s", commit).split("\n", 3)
    return Commit(identity, datetime.fromisoformat(date), subject, parents.split()[0] if parents else None)


def work_tree(root: Path) -> str:
    """A commit of the files as they are, those that git ignores left out; HEAD itself where nothing is changed.

    It is on no branch, and made with an index of its own, so the checkout's index stays as it is.
    """
    if not git(root, "status", "--porcelain"):
        return git(root, "rev-parse", "HEAD")
    with tempfile.TemporaryDirectory() as folder:
        own = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git(root, "read-tree", "HEAD", environment=own)
        git(root, "add", "-A", environment=own)
        tree = git(root, "write-tree", environment=own)
    names = {"GIT_AUTHOR_NAME": "track", "GIT_AUTHOR_EMAIL": "track@localhost",
             "GIT_COMMITTER_NAME": "track", "GIT_COMMITTER_EMAIL": "track@localhost"}  # fmt: skip
    return git(root, "commit-tree", tree, "-p", "HEAD", "-m", "the work tree, not committed", environment=names)


def last_commits(root: Path, head: str, count: int) -> list[Commit]:
    """The last `count` states of a branch up to `head`, oldest first: first parents only."""
    listed = git(root, "rev-list", "--first-parent", f"--max-count={count}", head).split()
    return [_commit(root, commit) for commit in reversed(listed)]


@contextmanager
def laid_out(root: Path, cache: Path, commit: Commit, role: str) -> Iterator[Tree]:
    """The commit's files below `cache`, with its native library, until the context ends. Raises TreeError.

    Trees of one commit in two roles are two folders, with paths of equal length for roles of equal length.
    """
    (cache / "trees").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{role}-{commit.id[:12]}-", dir=cache / "trees"))
    try:
        _extract(root, commit, folder)
        yield Tree(folder, commit, provide_native(folder, cache / "native"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _extract(root: Path, commit: Commit, folder: Path) -> None:
    with subprocess.Popen(["git", "-C", str(root), "archive", commit.id], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            archive.extractall(folder, filter="data")
    if process.returncode:
        raise TreeError(f"git archive {commit.id} ended with {process.returncode}")


def provide_native(tree: Path, cache: Path) -> str:
    """Put the tree's native library in its place, built or from the cache; returns its hash. Raises TreeError."""
    sources = tree / NATIVE / "src"
    if not sources.is_dir():
        return ""
    kind = native_hash(tree)
    kept = cache / f"{kind}.so"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"building the native library {kind}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, str(tree / NATIVE / "build.py"), "--force", "--output", str(kept)],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode:
            raise TreeError(f"the native library does not build: {done.stderr.strip()[-500:]}")
    shutil.copyfile(kept, tree / NATIVE / LIBRARY)
    return kind


def native_hash(tree: Path) -> str:
    """Of the sources, the builder and the compiler."""
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout if compiler else b""
    digest = hashlib.sha256(version)
    for path in sorted([*(tree / NATIVE / "src").iterdir(), tree / NATIVE / "build.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
