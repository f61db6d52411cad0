"""`ci/sign_off.py`: which commits of a range lack their author's sign-off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "ci" / "sign_off.py"
AUTHOR = "Ada <ada@example.org>"


class Repository:
    """A git repository with one commit that is not signed off: what was there before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit("Begin")
        self.git("tag", "base")

    def git(self, *arguments: str) -> None:
        person = {"NAME": "Ada", "EMAIL": "ada@example.org"}
        own = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in person.items()}
        environment = {**os.environ, **own, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(["git", *arguments], cwd=self.folder, env=environment, check=True, capture_output=True)

    def commit(self, message: str) -> None:
        self.git("commit", "--quiet", "--allow-empty", "-m", message)

    def check(self, git_range: str = "base..HEAD") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), git_range]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.mark.parametrize(
    "trailers",
    [
        f"Signed-off-by: {AUTHOR}",
        "signed-off-by: Ada L. <ADA@example.org>",
        f"Co-authored-by: Bob <bob@example.org>\nSigned-off-by: Bob <bob@example.org>\nSigned-off-by: {AUTHOR}",
    ],
)
def test_a_commit_that_its_author_signed_off_passes(repository: Repository, trailers: str) -> None:
    repository.commit(f"Change\n\nWhy.\n\n{trailers}")
    done = repository.check()
    assert (done.returncode, done.stdout) == (0, "1 commits, all signed off\n")


@pytest.mark.parametrize(
    "message",
    [
        "Change",
        "Change\n\nSigned-off-by: Bob <bob@example.org>",
        "Change\n\nSigned-off-by: ada",
        f"Change\n\nSigned-off-by: {AUTHOR}\n\nA paragraph after it: it is no trailer.",
    ],
)
def test_a_commit_without_it_is_named(repository: Repository, message: str) -> None:
    repository.commit(f"Good\n\nSigned-off-by: {AUTHOR}")
    repository.commit(message)
    done = repository.check()
    assert done.returncode == 1
    assert "Change: no Signed-off-by of its author, ada@example.org" in done.stdout
    assert "Good" not in done.stdout
    assert "git rebase --signoff" in done.stdout


def test_commits_before_the_range_and_merges_are_not_asked(repository: Repository) -> None:
    repository.git("checkout", "--quiet", "-b", "topic")
    repository.commit(f"Topic\n\nSigned-off-by: {AUTHOR}")
    repository.git("checkout", "--quiet", "main")
    repository.commit(f"Main\n\nSigned-off-by: {AUTHOR}")
    repository.git("merge", "--quiet", "--no-ff", "-m", "Merge topic", "topic")
    assert repository.check().returncode == 0
    assert repository.check("base..base").returncode == 0


@pytest.mark.parametrize("git_range", ["none..HEAD", "HEAD", "--all..HEAD"])
def test_what_is_no_range_is_an_error_of_its_own(repository: Repository, git_range: str) -> None:
    done = repository.check(git_range)
    assert done.returncode == 2
    assert done.stderr
