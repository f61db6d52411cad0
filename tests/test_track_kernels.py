"""Registers and spills over commits, read from a repository of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from track.kernel_history import FOLDER, OLD_FILE, histories, read

FILE = f"{FOLDER}/3.7.1.json"


def taken(registers: int, spilled: int = 0) -> dict[str, int]:
    return {"registers": registers, "spilled": spilled, "shared": 16}


class Checkout:
    """A repository with the records of kernels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout

    def write(self, path: str, triton: str, **kernels: dict[str, int]) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        held = {name: {"bf16": {"sm_90": figures}} for name, figures in kernels.items()}
        target.write_text(json.dumps({"triton": triton, "kernels": held}))

    def commit(self, subject: str) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", subject)
        return self.git("rev-parse", "HEAD").strip()


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_a_kernel_has_a_step_for_each_commit_that_changed_what_it_takes(checkout):
    checkout.write(FILE, "3.7.1", norm=taken(39), attention=taken(200))
    first = checkout.commit("Kernels")
    checkout.write(FILE, "3.7.1", norm=taken(39), attention=taken(255, 12))
    second = checkout.commit("Attention by larger tiles")
    (history,) = histories(read(checkout.folder))
    steps = history.steps["attention", "bf16", "sm_90"]
    assert [(s.origin.commit, s.registers, s.spilled) for s in steps] == [(first, 200, 0), (second, 255, 12)]
    assert steps[1].origin.subject == "Attention by larger tiles"
    assert len(history.steps["norm", "bf16", "sm_90"]) == 1


def test_what_no_commit_has_yet_is_the_working_tree(checkout):
    checkout.write(FILE, "3.7.1", norm=taken(39))
    checkout.commit("Kernels")
    checkout.write(FILE, "3.7.1", norm=taken(40))
    steps = histories(read(checkout.folder))[0].steps["norm", "bf16", "sm_90"]
    assert [(s.registers, bool(s.origin.commit)) for s in steps] == [(39, True), (40, False)]


def test_versions_of_triton_are_apart_the_newest_first_and_one_given_up_is_left_out(checkout):
    checkout.write(OLD_FILE, "3.6.0", norm=taken(38))
    first = checkout.commit("One file")
    (checkout.folder / OLD_FILE).unlink()
    for version in ("3.5.0", "3.6.0", "3.10.0"):
        checkout.write(f"{FOLDER}/{version}.json", version, norm=taken(39))
    checkout.commit("A file for each version")
    (checkout.folder / FOLDER / "3.5.0.json").unlink()
    checkout.commit("No 3.5 any more")
    newest, older = histories(read(checkout.folder))
    assert (newest.triton, older.triton) == ("3.10.0", "3.6.0")
    assert older.steps["norm", "bf16", "sm_90"][0].origin.commit == first


def test_a_kernel_that_is_gone_has_no_steps(checkout):
    checkout.write(FILE, "3.7.1", norm=taken(39), old=taken(10))
    checkout.commit("Two")
    checkout.write(FILE, "3.7.1", norm=taken(39))
    checkout.commit("One")
    assert list(histories(read(checkout.folder))[0].steps) == [("norm", "bf16", "sm_90")]


def test_without_a_repository_the_files_stand_alone(tmp_path):
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FILE).write_text(json.dumps({"triton": "3.7.1", "kernels": {"norm": {"bf16": {"sm_90": taken(39)}}}}))
    (snapshot,) = read(tmp_path)
    assert snapshot.origin.commit == ""


def test_a_folder_without_records_has_no_history(tmp_path):
    assert histories(read(tmp_path)) == []


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / FOLDER).mkdir(parents=True)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"3\.7\.1\.json is no record of kernels"):
        read(tmp_path)


def test_amd_registers_and_both_kinds_of_spills_are_read(checkout):
    amd = {"vgprs": 125, "sgprs": 106, "spilled": 3, "sgprs_spilled": 62, "shared": 16384}
    checkout.write(FILE, "3.7.1", down=amd)
    step = histories(read(checkout.folder))[0].latest["down", "bf16", "sm_90"]
    assert (step.registers, step.spilled) == (125, 65)
