"""The JSON lines of the performance history: what is read is checked, and what is wrong is named."""

from __future__ import annotations

import json

import msgspec
import pytest
from track.records import Record, RecordError, decode, encode, read, write

LINE = {
    "run": "r1",
    "commit": "30baed9",
    "commit_date": "2026-11-28T21:09:34+00:00",
    "subject": "Tests of the merged tree",
    "parent": "44e45f9",
    "machine": "abc",
    "machine_facts": {"cpu": "a processor", "cores": 2},
    "versions": {"python": "3.11.7"},
    "plan_hash": "0123",
    "at": "2026-11-28T22:00:00Z",
    "figure": "cpu-one",
    "unit": "tok/s",
    "better": "higher",
    "samples": [80, 81.5],
    "against": {"commit": "44e45f9", "samples": [80.5, 81]},
    "not_measured": None,
}


def line(**changes: object) -> str:
    return json.dumps({k: v for k, v in (LINE | changes).items() if v != "absent"})


def test_a_line_is_a_record_and_a_record_the_line():
    record = decode(line())
    assert record.samples == (80.0, 81.5)
    assert record.against.commit == "44e45f9"
    assert record.commit_date.isoformat() == "2026-11-28T21:09:34+00:00"
    assert decode(encode(record)) == record


def test_a_peer_stands_in_place_of_a_commit():
    record = decode(line(commit="absent", commit_date="absent", against=None, peer="llama.cpp"))
    assert (record.peer, record.commit, record.subject) == ("llama.cpp", None, "Tests of the merged tree")


def test_what_was_not_measured_says_why():
    assert decode(line(samples=[], against=None, not_measured="no such option")).not_measured == "no such option"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"figure": "absent"}, "figure"),
        ({"samples": ["fast"]}, "samples"),
        ({"better": "more"}, "better"),
        ({"at": "2026-11-28T22:00:00"}, "timezone"),
        ({"againts": None}, "againts"),
        ({"peer": "vLLM"}, "`commit` and `peer`"),
        ({"commit": None}, "`commit` and `peer`"),
        ({"commit_date": None}, "commit_date"),
        ({"samples": [], "against": None}, "`samples` and `not_measured`"),
        ({"not_measured": "broken"}, "`samples` and `not_measured`"),
        ({"samples": [80, -1]}, "-1"),
        ({"samples": [80]}, "paired"),
        ({"against": {"commit": "44e45f9", "samples": [80, -0.5]}}, "against.samples"),
    ],
)
def test_what_is_no_record_is_refused_by_name(changes, why):
    with pytest.raises(RecordError, match=why):
        decode(line(**changes))


def test_numbers_without_end_are_refused_when_written():
    with pytest.raises(RecordError, match="inf"):
        encode(msgspec.structs.replace(decode(line()), samples=(float("inf"), 1.0)))


def test_a_file_is_read_as_it_was_written(tmp_path):
    records = [decode(line()), decode(line(figure="start", unit="s", better="lower"))]
    write(records, tmp_path / "history.jsonl")
    assert read(tmp_path / "history.jsonl") == records


def test_the_number_of_a_wrong_line_is_told(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(line() + "\n\n" + line(unit=3) + "\n")
    with pytest.raises(RecordError, match=r"history\.jsonl, line 3: .*unit"):
        read(path)


def test_an_empty_file_is_an_empty_history(tmp_path):
    (tmp_path / "none.jsonl").touch()
    assert read(tmp_path / "none.jsonl") == []


def test_every_field_is_in_the_line():
    assert set(json.loads(encode(decode(line())))) == {f.name for f in msgspec.structs.fields(Record)}
