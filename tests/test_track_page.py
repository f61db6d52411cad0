"""The performance page as text: geometry of charts, words, escaping, size. `test_track_browser` opens it."""

from __future__ import annotations

import re
import sys
import time
from datetime import UTC, datetime
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import track
from track import kernel_history, page, plot, records, report
from track.kernel_history import Origin, Snapshot
from track.series import Machine, machines
from track.units import MINUS, SPACE
from track_histories import long_history, middle, no_change, record

MADE = datetime(2026, 11, 28, tzinfo=UTC)
SIZE_BOUND = 8_000_000
"""Bytes of the page of 1,000 commits with 25 figures; it has 6 million."""
TIME_BOUND = 40
"""Seconds of a processor to write it; it takes 5."""


def only(history: list[records.Record], change_points=no_change) -> Machine:
    (machine,) = machines(history, change_points)
    return machine


def value_chart(history: list[records.Record], change_points=no_change) -> plot.Chart:
    machine = only(history, change_points)
    return plot.value_chart(machine.series[0], len(machine.commits))


def rendered(history: list[records.Record], change_points=no_change, kernels=()) -> str:
    return page.render(machines(history, change_points), kernels, MADE)


# --- geometry -------------------------------------------------------------------------------------


def numbers(path: str) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", path)]


def test_a_higher_figure_is_drawn_higher_and_inside_the_box():
    chart = value_chart([record(n, [80.0 + n]) for n in range(5)])
    heights = numbers(chart.line)[1::2]
    assert heights == sorted(heights, reverse=True)
    assert all(0 < y < plot.HEIGHT for y in heights)
    assert numbers(chart.line)[::2] == [0, 1, 2, 3, 4]


def test_the_line_and_the_band_stop_where_a_figure_was_not_measured():
    history = [record(n, [80.0, 81.0, 82.0]) for n in (0, 1)]
    history += [record(2, [], not_measured="broken")] + [record(n, [80.0, 81.0, 82.0]) for n in (3, 4)]
    chart = value_chart(history)
    assert (chart.line.count("M"), chart.band.count("M"), chart.dots.count("M")) == (2, 2, 4)
    assert chart.missing.startswith("M2 ")


def test_a_point_between_two_gaps_has_a_dot_and_a_bar_but_no_line():
    history = [record(0, [], not_measured="x"), record(1, [80.0, 81.0]), record(2, [], not_measured="x")]
    chart = value_chart(history)
    assert (chart.line, chart.band) == ("", "")
    assert chart.dots.startswith("M1 ")
    assert chart.bars.startswith("M1 ")


def test_a_commit_without_any_record_breaks_no_line():
    history = [record(n, [1.0], figure="start") for n in range(3)] + [record(n, [80.0]) for n in (0, 2)]
    machine = only(history)
    series = next(s for s in machine.series if s.figure == "cpu-one")
    assert plot.value_chart(series, 3).line.count("M") == 1


def test_noise_of_a_thousandth_is_not_drawn_as_mountains():
    heights = numbers(value_chart([record(n, [80.0 + 0.08 * (n % 2)]) for n in range(6)]).line)[1::2]
    assert max(heights) - min(heights) < plot.HEIGHT / 20


@pytest.mark.parametrize("samples", [[0.0], [5.0], [5.0, 5.0]])
def test_figures_that_are_all_the_same_have_a_range(samples):
    chart = value_chart([record(n, samples) for n in range(3)])
    assert chart.low < samples[0] < chart.high
    assert len(chart.ticks) >= 2


def test_near_peers_are_lines_and_far_ones_are_told():
    history = [record(0, [80.0, 81.0])] + [
        record(None, [v], peer=name) for name, v in {"near": 130.0, "close": 129.0, "far": 20.0}.items()
    ]
    chart = value_chart(history)
    assert [p.label for p in chart.peers] == [f"near 130{SPACE}tok/s", f"close 129{SPACE}tok/s"]
    assert chart.peers[1].name_at - chart.peers[0].name_at >= plot.NAME
    assert chart.beyond == ("far is below the scale",)


def test_peers_alone_are_drawn():
    assert len(value_chart([record(None, [130.0], peer="llama.cpp")]).peers) == 1


def test_the_ratio_chart_is_in_percent_around_zero():
    machine = only([record(n, [1.1, 1.1], base=[1.0, 1.0]) for n in range(2)])
    chart = plot.ratio_chart(machine.series[0], 2)
    assert chart.low < 0 < 10 < chart.high
    assert f"+5{SPACE}%" in [t.label for t in chart.ticks]
    assert "0 %".replace(" ", SPACE) in [t.label for t in chart.ticks]


def test_without_a_base_there_is_no_ratio_chart():
    assert plot.ratio_chart(only([record(0, [1.0])]).series[0], 1) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (79.2, 93.7), (-0.031, 0.07), (24000, 26000), (1e-6, 3e-6)])
def test_ticks_are_round_and_few(low, high):
    found = plot.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low <= value <= high for value, _ in found)


def test_neighbouring_change_points_are_in_lanes():
    machine = only(long_history(100, 1), lambda values: [40, 42, 90])
    assert [f.lane for f in plot.value_chart(machine.series[0], 100).flags] == [0, 1, 0]


# --- words ----------------------------------------------------------------------------------------


def test_a_change_says_how_much_which_way_and_from_where():
    text = rendered(long_history(20, 1, samples=40), middle)
    assert re.search(rf"[78]\.\d{SPACE}% worse \(3\.\d+{SPACE}ms/step to 3\.\d+{SPACE}ms/step\)</b>", text)
    assert re.search(r'aria-label="Change point 1 at c10: [78]\.\d', text)


def test_an_improvement_says_better():
    history = [record(n, [80.0 if n < 8 else 90.0]) for n in range(16)]
    assert f"12.5{SPACE}% better" in rendered(history, middle)


def test_a_change_of_ratios_says_so():
    history = [record(n, [80.0 if n < 8 else 90.0], base=[80.0]) for n in range(16)]
    assert f"0.0{SPACE}% to +12.5{SPACE}% against the base" in rendered(history, middle)


def test_what_was_not_measured_is_told_with_its_reason():
    history = [record(0, [80.0]), record(1, [], not_measured="no option <x>")]
    history.append(record(None, [], peer="SGLang", not_measured="no wheel"))
    text = rendered(history)
    assert "not measured: no option &lt;x&gt;" in text
    assert "SGLang not measured: no wheel" in re.sub(r"<[^>]+>", "", text)
    assert "<small>at c0</small>" in text  # the latest figure is not of the latest commit


@pytest.mark.parametrize(("better", "lead"), [("higher", "0.50x"), ("lower", "2.00x")])
def test_a_peer_tells_where_hotplug_stands(better, lead):
    history = [record(0, [50.0], better=better), record(None, [100.0], peer="p", better=better)]
    assert f"(hotplug {lead})" in rendered(history)


def test_the_best_of_the_peers_comes_first():
    history = [record(None, [v], peer=f"p{v}", figure="start", unit="s", better="lower") for v in (3.0, 1.0, 2.0)]
    (view,) = page.MachineView(only(history), 0).figures
    assert [name for name, _, _ in view.peers] == ["p1.0", "p2.0", "p3.0"]


def test_machines_are_called_by_their_facts():
    facts = {"cpu": "A processor", "isa": ["avx2", "fma"], "cores": 2, "memory_gib": 24, "gpus": []}
    view = page.MachineView(only([record(0, [1.0], machine_facts=facts)]), 0)
    assert view.title == f"A processor, cores 2, memory 24{SPACE}GiB"
    assert dict(view.facts)["isa"] == "avx2, fma"
    assert dict(view.facts)["gpus"] == "none"
    assert page.MachineView(only([record(0, [1.0], machine_facts={})]), 0).title == "one"


# --- the file -------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Which elements a page has, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


EVIL = '<script>alert("x")</script>"\'><img src=x onerror=alert(1)>'


def test_text_of_commits_machines_and_peers_stays_text():
    history = [
        record(0, [1.0], subject=EVIL, machine=EVIL, machine_facts={EVIL: EVIL}, versions={EVIL: EVIL}, plan_hash=EVIL),
        record(1, [], machine=EVIL, not_measured=EVIL),
        record(None, [1.0], peer=EVIL, machine=EVIL),
    ]
    history.append(record(2, [1.0], machine=EVIL, figure=EVIL, unit=EVIL, commit=EVIL))
    origin = Origin(EVIL, MADE, EVIL)
    kernels = kernel_history.histories([Snapshot(origin, "3.7.1", {EVIL: {EVIL: {EVIL: {"registers": 1}}}})])
    text = rendered(history, lambda values: list(range(1, len(values))), kernels)
    elements = Elements(text).found
    assert [tag for tag, _ in elements].count("script") == 1
    assert not [tag for tag, attributes in elements if tag == "img" or "onerror" in attributes]
    assert text.count("&lt;script&gt;") >= 10


def test_the_page_names_no_other_address():
    text = rendered(long_history(5, 2), middle, kernel_history.histories(kernel_history.read(report.CHECKOUT)))
    held = [value for _, attributes in Elements(text).found for name, value in attributes.items()
            if name in ("src", "href", "action", "data")]  # fmt: skip
    assert held
    assert all(value.startswith(("#", "data:")) for value in held)
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest", text)


def test_ids_are_unique_and_every_link_leads_to_one():
    elements = Elements(rendered(long_history(20, 3), middle)).found
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in elements if tag == "a"} <= set(ids)


def test_an_empty_history_says_what_to_do():
    text = rendered([])
    assert "hotplug bench track" in text
    assert "<select" not in text


def test_one_commit_is_a_page():
    text = rendered([record(0, [80.0, 81.0])])
    assert "1 commit, 01 Nov 2026" in text


def test_kernels_tell_registers_spills_and_what_they_were():
    def kernels(registers: int, spilled: int) -> kernel_history.Kernels:
        return {"_attention": {"bf16": {"sm_90": {"registers": registers, "spilled": spilled, "shared": 16}}}}

    snapshots = [
        Snapshot(Origin("a" * 40, MADE, "First"), "3.7.1", kernels(200, 0)),
        Snapshot(Origin("b" * 40, MADE, "Larger tiles"), "3.7.1", kernels(255, 12)),
    ]
    text = re.sub(r"<[^>]+>", " ", rendered([], kernels=kernel_history.histories(snapshots)))
    assert f"255, 12{SPACE}spilled" in text
    assert "was 200" in text
    assert "255 a program, 12 spilled in 1" in text
    assert re.search(r"bbbbbbb\s+28 Nov 2026\s+Larger tiles", text)


def test_a_thousand_commits_of_25_figures_are_bounded_in_size_and_time(tmp_path):
    history = long_history(1000, 25)
    began = time.process_time()
    report.write(history, middle, report.CHECKOUT, tmp_path / "page.html")
    assert time.process_time() - began < TIME_BOUND
    assert (tmp_path / "page.html").stat().st_size < SIZE_BOUND


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def detector(monkeypatch):
    """Stands in for the detector and the suite, which are tested by themselves."""
    loop = SimpleNamespace(figures=[SimpleNamespace(name="loop-0", title="a loop of requests")])
    for name, module in {
        "detect": SimpleNamespace(change_points=middle),
        "suite": SimpleNamespace(PROBES=[loop]),
    }.items():
        monkeypatch.setitem(sys.modules, f"track.{name}", module)
        monkeypatch.setattr(track, name, module, raising=False)


def test_the_command_writes_the_page_of_a_file_of_lines(tmp_path, detector, capsys):
    records.write(long_history(20, 2), tmp_path / "history.jsonl")
    out = tmp_path / "new" / "page.html"
    assert report.main(["--history", str(tmp_path / "history.jsonl"), "--out", str(out)]) == 0
    assert "Change point 1 at c10" in out.read_text()
    assert '<p class="title">a loop of requests</p>' in out.read_text()
    assert "40 records" in capsys.readouterr().out


def test_a_history_that_is_not_there_says_what_makes_one(tmp_path, detector, capsys):
    assert report.main(["--history", str(tmp_path / "none.sqlite"), "--out", str(tmp_path / "page.html")]) == 1
    assert "hotplug bench track" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_wrong_line_is_told_with_its_number(tmp_path, detector, capsys):
    (tmp_path / "history.jsonl").write_text("{}\n")
    assert report.main(["--history", str(tmp_path / "history.jsonl"), "--out", str(tmp_path / "page.html")]) == 1
    assert "line 1" in capsys.readouterr().err


def test_minus_is_a_minus_sign():
    machine = only([record(n, [0.9, 0.9], base=[1.0, 1.0]) for n in range(2)])
    assert any(t.label.startswith(MINUS) for t in plot.ratio_chart(machine.series[0], 2).ticks)


def test_the_command_reads_the_history_that_the_tracker_keeps(tmp_path, detector):
    from track import store

    made = long_history(20, 2)
    kept = store.History(tmp_path / "history.sqlite")
    kept.add(made)
    kept.close()
    assert report.read(tmp_path / "history.sqlite") == made
    asked = ["--history", str(tmp_path / "history.sqlite"), "--out", str(tmp_path / "page.html")]
    assert report.main(asked) == 0
    assert "Change point 1 at c10" in (tmp_path / "page.html").read_text()
