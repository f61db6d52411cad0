#!/usr/bin/env python3
"""Whether every commit of a range is signed off by its author: the Developer Certificate of Origin, CONTRIBUTING.md.

    python ci/sign_off.py origin/main..HEAD

Merges are not asked, since what they bring has been. Exit code 1: commits lack it, and are named; 2: git does not know
the range. Nothing but Python's own library, so that it runs on a bare machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass

FIELD, RECORD = "\x1f", "\x1e"
FORMAT = "%x1f".join(("%h", "%ae", "%s", "%(trailers:key=Signed-off-by,valueonly,unfold)")) + "%x1e"
_PERSON = re.compile(r"\S.*<([^<>\s]+@[^<>\s]+)>")


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit and the mail addresses that sign it off."""

    short_hash: str
    author: str
    """The author's mail address."""
    subject: str
    signers: tuple[str, ...]

    def signed_off(self) -> bool:
        """Whether its author is among those who sign."""
        return self.author.lower() in (signer.lower() for signer in self.signers)


def commits(git_range: str) -> list[Commit]:
    """The commits of a range, such as `origin/main..HEAD`, without merges. Raises CalledProcessError."""
    log = ["git", "log", "--no-merges", f"--format={FORMAT}", "--end-of-options", git_range, "--"]
    shown = subprocess.run(log, capture_output=True, text=True, check=True).stdout
    return [_commit(record.strip("\n")) for record in shown.split(RECORD) if record.strip()]


def _commit(record: str) -> Commit:
    short_hash, author, subject, trailers = record.split(FIELD)
    people = (_PERSON.fullmatch(line.strip()) for line in trailers.splitlines())
    return Commit(short_hash, author, subject, tuple(person[1] for person in people if person))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or ".." not in arguments[0]:
        print("usage: ci/sign_off.py BASE..HEAD", file=sys.stderr)
        return 2
    try:
        found = commits(arguments[0])
    except subprocess.CalledProcessError as e:
        print(e.stderr.strip(), file=sys.stderr)
        return 2
    lacking = [commit for commit in found if not commit.signed_off()]
    for commit in lacking:
        print(f"{commit.short_hash} {commit.subject}: no Signed-off-by of its author, {commit.author}")
    if lacking:
        print("Sign them off with `git rebase --signoff BASE`; CONTRIBUTING.md says what that means.")
    else:
        print(f"{len(found)} commits, all signed off")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
