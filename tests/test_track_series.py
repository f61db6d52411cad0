"""What the performance page shows, before it is drawn: order of commits, intervals, gaps, machine classes, changes."""

from __future__ import annotations

import random
import statistics
from datetime import timedelta

import numpy as np
import pytest
from track.records import Record
from track.series import Machine, interval, machines, ratio
from track.units import MINUS, SPACE, number, percent, quantity
from track_histories import START, no_change, record


def only(records: list[Record], change_points=no_change) -> Machine:
    (machine,) = machines(records, change_points)
    return machine


# --- intervals ------------------------------------------------------------------------------------


def test_one_sample_has_no_interval():
    assert interval([3.0]) == interval([3.0])
    assert (interval([3.0]).middle, interval([3.0]).low, interval([3.0]).high) == (3.0, None, None)


@pytest.mark.parametrize("count", [2, 9, 10, 31])
def test_an_interval_is_the_bootstrap_of_the_median(count):
    generator = np.random.default_rng(count)
    samples = generator.lognormal(0, 0.1, count)
    found = interval(samples)
    medians = np.median(generator.choice(samples, (40_000, count)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    assert found.middle == pytest.approx(np.median(samples))
    tolerance = (high - low) / 8
    assert found.low == pytest.approx(low, abs=tolerance)
    assert found.high == pytest.approx(high, abs=tolerance)


def test_an_interval_covers_the_median_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = [i.low <= 1 <= i.high for i in (interval(generator.lognormal(0, 0.05, 25)) for _ in range(400))]
    assert 0.90 <= statistics.mean(covered) <= 0.99


def test_a_ratio_is_paired():
    """The machine's state moves both samples of a pair, and cancels."""
    state = [1.0, 2.0, 4.0, 3.0, 1.5]
    found = ratio([(1.05 * s, s) for s in state])
    assert found.middle == pytest.approx(1.05)
    assert found.high - found.low < 1e-9


def test_there_is_no_ratio_to_zero():
    assert ratio([(1.0, 2.0), (0.0, 1.0)]) is None
    assert ratio([]) is None


# --- series ---------------------------------------------------------------------------------------


def test_an_empty_history_has_no_machine():
    assert machines([], no_change) == []


def test_one_commit_is_a_series_of_one_point():
    machine = only([record(0, [80, 82, 81])])
    (series,) = machine.series
    assert series.points[0].value.middle == 81
    assert series.changes == ()
    assert [c.subject for c in machine.commits] == ["Change 0"]


def test_parents_come_before_children_whatever_the_dates_and_the_order_of_records():
    records = [record(n, [80.0, 81.0]) for n in range(6)]
    records[3] = record(3, [80.0, 81.0], commit_date=START - timedelta(days=1))  # a clock that was wrong
    random.Random(0).shuffle(records)
    assert [c.id for c in only(records).commits] == [f"c{n}" for n in range(6)]


def test_a_figure_that_was_not_measured_is_a_gap_with_its_reason():
    records = [record(0, [1.0]), record(1, [], not_measured="no such option"), record(2, [2.0])]
    records += [record(n, [5.0], figure="start", unit="s", better="lower") for n in (0, 2)]
    one, start = only(records).series
    assert [p.not_measured for p in one.points] == [None, "no such option", None]
    assert [p.position for p in one.measured] == [0, 2]
    assert [p.position for p in start.points] == [0, 2]  # a commit without a record has no point


def test_machine_classes_stay_apart_and_the_latest_comes_first():
    records = [record(0, [80.0]), record(1, [81.0]), record(1, [160.0], machine="two", at=5)]
    first, second = machines(records, no_change)
    assert (first.id, second.id) == ("two", "one")
    assert [c.id for c in first.commits] == ["c1"]
    assert first.series[0].points[0].value.middle == 160
    assert [p.value.middle for p in second.series[0].points] == [80, 81]


def test_runs_of_a_commit_are_pooled_and_ratios_of_one_commit_are_to_the_latest_base():
    runs = [
        record(1, [10.0, 10.0], base=[5.0, 5.0], base_of="old", at=0),
        record(1, [12.0, 12.0], base=[10.0, 10.0], base_of="new", at=1),
        record(1, [14.0, 14.0], base=[10.0, 10.0], base_of="new", at=2),
    ]
    (point,) = only(runs).series[0].points
    assert (point.value.middle, point.samples, point.runs, point.base) == (12, 6, 3, "new")
    assert point.ratio.middle == pytest.approx((1.2 * 1.4) ** 0.5)


def test_a_commit_beside_itself_is_no_ratio():
    runs = [
        record(1, [12.0, 12.0], base=[10.0, 10.0], base_of="c0", at=0),
        record(1, [12.0, 12.0], base=[12.0, 12.0], base_of="c1", at=1),
    ]
    (point,) = only(runs).series[0].points
    assert (point.samples, point.base) == (4, "c0")
    assert point.ratio.middle == pytest.approx(1.2)
    assert only(runs[1:]).series[0].points[0].ratio is None


def test_ratios_are_to_the_commit_that_most_were_measured_beside():
    """As a filled history has it: all beside the first, that one beside itself, and some beside others since."""
    runs = [record(n, [10.0 + n] * 2, base=[10.0, 10.0], base_of="c0") for n in range(4)]
    runs += [record(3, [13.0, 13.0], base=[12.0, 12.0], base_of="c2", at=1)]
    (series,) = only(runs, step_at(3)).series
    assert [p.base for p in series.points] == ["c0"] * 4
    assert [p.ratio.middle for p in series.points] == pytest.approx([1.0, 1.1, 1.2, 1.3])
    assert series.changes[0].of_ratio
    (series,) = only([*runs[1:], record(0, [10.0])], step_at(3)).series  # the first was not measured beside itself
    assert series.points[0].ratio.middle == 1 and series.changes[0].of_ratio


def test_a_later_run_that_failed_hides_no_figure():
    (point,) = only([record(1, [10.0]), record(1, [], not_measured="killed", at=1)]).series[0].points
    assert point.value.middle == 10


def test_peers_are_lines_of_their_latest_run():
    peer = {"peer": "llama.cpp", "versions": {"llama.cpp": "0.3.36"}}
    machine = only(
        [
            record(0, [80.0]),
            record(None, [130.0, 132.0, 131.0], at=1, **peer),
            record(None, [90.0], at=0, **peer),
            record(None, [], at=0, peer="vLLM", not_measured="no wheel"),
        ]
    )
    (series,) = machine.series
    assert [c.id for c in machine.commits] == ["c0"]
    peers = {p.name: p for p in series.peers}
    assert (peers["llama.cpp"].value.middle, peers["llama.cpp"].version) == (131, "0.3.36")
    assert (peers["vLLM"].value, peers["vLLM"].not_measured) == (None, "no wheel")


# --- change points --------------------------------------------------------------------------------


def step_at(index: int):
    def change_points(values: list[float]) -> list[int]:
        return [index]

    return change_points


@pytest.mark.parametrize(("better", "worse"), [("higher", False), ("lower", True)])
def test_a_change_tells_both_levels_and_its_direction(better, worse):
    records = [record(n, [100.0 if n < 4 else 110.0], better=better) for n in range(8)]
    (change,) = only(records, step_at(4)).series[0].changes
    assert (change.position, change.before, change.after, change.worse) == (4, 100, 110, worse)
    assert change.share == pytest.approx(0.1)
    assert not change.of_ratio


def test_a_change_after_a_gap_is_at_its_commit():
    records = [record(0, [1.0]), record(1, [], not_measured="broken"), record(2, [1.0]), record(3, [2.0])]
    (change,) = only(records, step_at(2)).series[0].changes
    assert change.position == 3


def test_changes_are_sought_in_ratios_to_one_base():
    seen = []

    def change_points(values: list[float]) -> list[int]:
        seen.append(values)
        return [1]

    one_base = [record(n, [50.0 * (n + 1)], base=[50.0]) for n in range(2)]
    assert only(one_base, change_points).series[0].changes[0].of_ratio
    parents = [record(n, [50.0 * (n + 1)], base=[50.0], base_of=f"c{n - 1}") for n in range(3)]
    assert not only(parents, change_points).series[0].changes[0].of_ratio
    assert seen == [pytest.approx([1, 2]), [50, 100, 150]]


@pytest.mark.parametrize("wrong", [[0], [3], [2, 1], [1, 1]])
def test_indices_that_begin_no_level_are_an_error(wrong):
    with pytest.raises(ValueError, match="ascending indices from 1 to 2"):
        only([record(n, [1.0]) for n in range(3)], lambda values: wrong)


def test_figures_that_were_zero_have_no_change_points():
    assert only([record(n, [float(n)]) for n in range(3)], step_at(1)).series[0].changes == ()


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (31.4159, "31.42"),
        (0.27, "0.2700"),
        (0.002714, "0.002714"),
        (999.96, "1,000.0"),
        (24897.4, "24,897"),
        (1024, "1,024"),
        (-3.5, f"{MINUS}3.500"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_numbers_have_units():
    assert quantity(12.5, "us") == f"12.50{SPACE}\N{MICRO SIGN}s"
    assert [percent(s) for s in (0.031, -0.05, 0.0001)] == [f"+3.1{SPACE}%", f"{MINUS}5.0{SPACE}%", f"0.0{SPACE}%"]
