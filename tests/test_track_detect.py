"""What moved: effects of paired samples, the threshold at its stated rate, change points of synthetic series."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from track import detect
from track.detect import Floor
from track.records import Against, Record

FIGURES = 16


def samples(draw: np.random.Generator, shift: float, noise: float, quads: int) -> tuple[list[float], list[float]]:
    """Head and base, whose machine drifts by far more than `shift`, alike for both."""
    drift = np.cumsum(draw.normal(0, 0.05, 2 * quads))
    head = np.exp(drift + shift + draw.normal(0, noise, 2 * quads))
    return list(head), list(np.exp(drift + draw.normal(0, noise, 2 * quads)))


def verdict(draw: np.random.Generator, shift: float, floor: Floor, better: str = "lower") -> detect.Finding:
    """Two rounds whose processes differ by the floor's deviation."""
    rounds = [detect.effect(*samples(draw, shift + draw.normal(0, floor.deviation), 0.01, 12)) for _ in range(2)]
    if not detect.passes(rounds[0], floor, FIGURES):
        rounds.pop()
    return detect.judge(rounds, rounds[0], better, floor, FIGURES)


def test_the_effect_is_the_heads_over_the_bases_whatever_the_machine_does_meanwhile() -> None:
    one = detect.effect(*samples(np.random.default_rng(0), math.log(1.05), 0.005, 40))
    assert one.low < math.log(1.05) < one.high
    assert abs(one.ratio - 1.05) < 0.005 and one.high - one.low < 0.02


def test_one_spoilt_quad_moves_no_effect() -> None:
    head, base = samples(np.random.default_rng(1), 0.0, 0.002, 20)
    head[6] *= 30
    assert abs(detect.effect(head, base).log) < 0.005


@given(shift=st.floats(-0.5, 0.5), scale=st.floats(1e-3, 1e6))
@settings(max_examples=30, deadline=None)
def test_the_effect_depends_on_ratios_alone_and_turns_with_the_sides(shift: float, scale: float) -> None:
    head, base = samples(np.random.default_rng(2), shift, 0.01, 8)
    one, other = detect.effect(head, base), detect.effect(base, head)
    scaled = detect.effect([v * scale for v in head], [v * scale for v in base])
    assert one.log == pytest.approx(-other.log) and scaled.log == pytest.approx(one.log)


@pytest.mark.parametrize("runs", [5, 10, 40])
def test_the_threshold_keeps_the_stated_rate_for_all_figures_together(runs: int) -> None:
    """Simulated: floors estimated from so many runs, then two rounds of nothing."""
    draw, trials = np.random.default_rng(3), 400_000
    floor = np.sqrt((draw.normal(size=(trials, runs)) ** 2).mean(axis=1))
    first, second = draw.normal(size=(2, trials))
    least = detect.threshold(runs, FIGURES) * floor
    moved = (np.minimum(first, second) > least) | (np.maximum(first, second) < -least)
    assert FIGURES * moved.mean() == pytest.approx(detect.FALSE_POSITIVES, rel=0.25)


def test_more_runs_of_one_commit_need_less_of_an_effect() -> None:
    assert detect.threshold(40, FIGURES) < detect.threshold(10, FIGURES) < detect.threshold(5, FIGURES) < 5


def test_nothing_moves_in_noise() -> None:
    draw = np.random.default_rng(4)
    assert [verdict(draw, 0.0, Floor(0.008, 10)).verdict for _ in range(150)] == ["same"] * 150


DIRECTIONS = [
    (0.05, "lower", "worse"), (-0.05, "lower", "better"), (0.05, "higher", "better"), (-0.05, "higher", "worse"),
]  # fmt: skip


@pytest.mark.parametrize(("shift", "better", "expected"), DIRECTIONS)
def test_five_percent_is_found_in_its_direction_and_with_its_certainty(
    shift: float, better: str, expected: str
) -> None:
    found = [verdict(np.random.default_rng(seed), shift, Floor(0.008, 10), better) for seed in range(40)]
    assert [one.verdict for one in found].count(expected) >= 38
    assert all(one.certainty is not None and one.certainty >= 0.99 for one in found if one.verdict == expected)


def test_a_round_that_scatters_more_than_the_floor_is_held_to_its_own_scatter() -> None:
    draw = np.random.default_rng(5)
    wild = [detect.effect(*samples(draw, 0.03, 0.3, 12)) for _ in range(30)]
    assert sum(detect.passes(one, Floor(0.002, 10), FIGURES) for one in wild) <= 1


def test_rounds_of_opposite_directions_are_no_move() -> None:
    up, down = (detect.effect(*samples(np.random.default_rng(6), shift, 0.002, 12)) for shift in (0.1, -0.1))
    assert detect.judge([up, down], up, "lower", Floor(0.005, 10), FIGURES).verdict == "same"


def test_without_a_floor_nothing_is_judged() -> None:
    one = detect.effect([1.5] * 4, [1.0] * 4)
    assert detect.judge([one], one, "lower", None, FIGURES).verdict == "not judged"


def noise_record(head: list[float], base: list[float], commit: str = "a", against: str = "a") -> Record:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Record(run="r", machine="m", machine_facts={}, versions={}, at=at, figure="f", unit="s", better="lower",
                  samples=tuple(head), commit=commit, commit_date=at,
                  against=Against(commit=against, samples=tuple(base)))  # fmt: skip


def test_a_floor_is_of_runs_of_one_commit_with_no_more_samples_on_the_same_machine() -> None:
    own = [noise_record([1.0 + 0.01 * (-1) ** i] * 4, [1.0] * 4) for i in range(6)]
    others = [noise_record([2.0] * 4, [1.0] * 4, against="b"), noise_record([2.0] * 8, [1.0] * 8)]
    floor = detect.floors(own + others, "m", {"f": 4})["f"]
    assert floor.runs == 6 and floor.deviation == pytest.approx(0.01, rel=0.02)
    assert detect.floors(own, "another", {"f": 4}) == {} == detect.floors(own[:4], "m", {"f": 4})


@pytest.mark.parametrize("size", [0, 1, 3, 5, 12])
def test_short_series_and_level_ones_have_no_change_points(size: int) -> None:
    assert detect.change_points([2.0] * size) == []


def test_a_step_and_its_return_are_found_where_they_are() -> None:
    values = np.exp(np.random.default_rng(7).normal(0, 0.006, 36))
    values[12:24] *= 1.05
    assert detect.change_points(list(values)) == [12, 24]


def test_a_step_of_six_deviations_is_found_within_a_commit_of_its_place() -> None:
    """In 99 of 100 series at least, wherever it is but for six at either end."""
    missed = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        values, at, up = np.exp(draw.normal(0, 0.01, 30)), int(draw.integers(6, 25)), draw.integers(2)
        values[at:] *= 1.06 if up else 1 / 1.06
        missed += not any(abs(one - at) <= 1 for one in detect.change_points(list(values)))
    assert missed <= 2


def test_noise_has_change_points_at_the_stated_rate() -> None:
    """300 series at a rate of 5 %: more than 27 would come of a right rate once in 1,000 times."""
    draw = np.random.default_rng(8)
    series = [list(np.exp(draw.normal(0, 0.01, 30))) for _ in range(300)]
    assert 2 <= sum(bool(detect.change_points(one, 0.05)) for one in series) <= 27
