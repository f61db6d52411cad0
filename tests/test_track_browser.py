"""The performance page in a browser: it asks for nothing, complains of nothing, and does what its controls say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import browser as chromium
import pytest
from browser import Browser, Page
from track import report
from track.records import Record
from track_histories import long_history, middle, record

EVIL = "<script>window.wrong = 1</script><img src=x onerror='window.wrong = 2'>"
COMMITS, FIGURES = 30, 4
LOAD_SECONDS = 40
"""A page of 1,000 commits with 25 figures is loaded in this time; it takes 1."""


def history() -> list[Record]:
    """Four figures, the first and the last slower from commit 15 on, and a second machine class with two commits."""
    made = long_history(COMMITS, FIGURES, samples=30)
    for number in (4, 5):
        made.append(record(number, [], figure="gap", unit="s", better="lower", not_measured=f"no option {EVIL}"))
    made += [record(n, [2.0 + n / 100], figure="gap", unit="s", better="lower", subject=EVIL) for n in (0, 1, 8, 9)]
    made.append(record(None, [3.6, 3.7], figure="loop-0", unit="ms/step", better="lower", peer="vLLM"))
    other = {"machine": "two", "machine_facts": {"cpu": "Another processor", "cores": 8}, "at": -1000}
    made += [record(n, [80.0, 81.0, 82.0], **other) for n in range(2)]
    return made


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("browser"))
    try:
        started.start()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "page.html"
    report.write(history(), middle, report.CHECKOUT, path)
    return path


@pytest.fixture
def page(running, written) -> Iterator[Page]:
    """The page of `history`, opened; what it asks for and complains of is checked after every test."""
    tab = running.page()
    tab.open(written)
    yield tab
    assert tab.complaints() == []
    assert set(tab.requests()) == {written.as_uri()}
    assert tab.evaluate("window.wrong === undefined")
    tab.close()


def seen(tab: Page, selector: str) -> int:
    """How many elements that match take up room."""
    return tab.evaluate(
        f"[...document.querySelectorAll({selector!r})].filter(e => e.getClientRects().length &&"
        " e.getBoundingClientRect().width > 0 && getComputedStyle(e).visibility == 'visible').length"
    )


def box(tab: Page, selector: str, index: int = 0) -> dict[str, float]:
    """Where an element is in the window, after it was scrolled into view."""
    return tab.evaluate(
        "(() => { document.documentElement.style.scrollBehavior = 'auto';"
        f" const e = document.querySelectorAll({selector!r})[{index}]; e.scrollIntoView({{block: 'center'}});"
        " const b = e.getBoundingClientRect(); return {x: b.x, y: b.y, width: b.width, height: b.height}; })()"
    )


def axis(tab: Page) -> list[str]:
    return tab.evaluate("[...document.querySelectorAll('#m0f0 .chart.value .ticks span')].map(s => s.textContent)")


def view_box(tab: Page) -> list[float]:
    return [float(n) for n in tab.evaluate("document.querySelector('#m0f0 svg').getAttribute('viewBox')").split()]


def click(tab: Page, selector: str) -> None:
    place = box(tab, selector)
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    tab.mouse("mousePressed", x, y, held=True)
    tab.mouse("mouseReleased", x, y)


# --- drawing --------------------------------------------------------------------------------------


def test_every_figure_of_the_machine_has_its_chart_drawn(page):
    assert seen(page, ".figure") == FIGURES + 1
    assert seen(page, ".chart.value svg") == FIGURES + 1
    drawn = page.evaluate(
        "[...document.querySelectorAll('#m0 .chart.value .line')].map(p => ({length: p.getTotalLength(),"
        " stroke: getComputedStyle(p).stroke, width: p.getBoundingClientRect().width,"
        " room: p.closest('svg').getBoundingClientRect().width}))"
    )
    assert len(drawn) == FIGURES + 1
    for line in drawn[:FIGURES]:
        assert line["length"] > COMMITS
        assert line["stroke"] != "none"
        assert line["width"] > 0.9 * line["room"]


def test_pixels_of_the_line_are_there(page, tmp_path):
    """A page without its series takes fewer bytes as a picture."""
    box(page, "#m0f0")
    page.screenshot(tmp_path / "with.png")
    page.evaluate("document.querySelectorAll('#m0f0 path').forEach(p => p.remove())")
    page.screenshot(tmp_path / "without.png")
    assert (tmp_path / "with.png").stat().st_size > (tmp_path / "without.png").stat().st_size + 1000


def test_a_change_point_is_marked_with_its_label_at_its_commit(page):
    assert seen(page, "#m0f0 .chart.value .flag") == 1
    label = page.evaluate("document.querySelector('#m0f0 .flag').getAttribute('aria-label')")
    assert re.match(r"Change point 1 at c15: [78]\.\d\s% worse \(3\.\d+\sms/step to 3\.\d+\sms/step\)", label)
    assert page.evaluate("document.querySelector('#m0f0 .flag').textContent") == "1"
    flag, plot = box(page, "#m0f0 .flag"), box(page, "#m0f0 .plot")
    middle_of_flag = flag["x"] + flag["width"] / 2  # on the border between the last commit before and the first after
    assert middle_of_flag == pytest.approx(plot["x"] + plot["width"] * 15 / COMMITS, abs=2)
    line = box(page, "#m0f0 path.change")
    assert line["x"] + line["width"] / 2 == pytest.approx(middle_of_flag, abs=2)
    colours = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('.flag')))")
    assert contrast(*colours) >= 4.5


def test_a_figure_that_did_not_change_has_no_mark(page):
    assert seen(page, "#m0f1 .flag, #m0f1 path.change") == 0


def test_a_peer_is_a_line_with_its_name(page):
    assert page.evaluate("document.querySelector('#m0f0 .peername').textContent") == "vLLM 3.650\xa0ms/step"
    line, name = box(page, "#m0f0 path.peer"), box(page, "#m0f0 .peername")
    plot = box(page, "#m0f0 .plot")
    assert line["width"] >= 0.95 * plot["width"]
    assert plot["y"] <= name["y"] <= plot["y"] + plot["height"]


@pytest.mark.parametrize("width", [400, 1600])
def test_nothing_is_wider_than_the_window(page, written, width):
    page.open(written, width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.clientWidth") > width - 30
    beyond = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll > *, svg, .skip, .hidden') &&"
        " e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML)"
    )
    assert beyond == []
    assert seen(page, "#m0 .chart.value svg") == FIGURES + 1


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours as `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_light_and_dark(page, written, dark):
    page.open(written, dark=dark)
    ground = page.evaluate("getComputedStyle(document.querySelector('.figure')).backgroundColor")
    assert (contrast(ground, "rgb(0, 0, 0)") < 3) == dark
    for selector in (".now", ".figure .note", ".peername", ".changes .worse", ".ticks span"):
        colour = page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).color")
        assert contrast(colour, ground) >= 4.5, selector


# --- controls -------------------------------------------------------------------------------------


def test_the_other_machine_class_is_shown_when_chosen(page):
    assert seen(page, "#m1") == 0
    assert page.evaluate("[...document.querySelector('#machine').options].map(o => o.textContent)") == [
        "A processor, cores 2",
        "Another processor, cores 8",
    ]
    page.evaluate("document.querySelector('#machine').focus()")
    page.press("ArrowDown")
    assert (seen(page, "#m0"), seen(page, "#m1"), seen(page, "#m1 .chart svg")) == (0, 1, 1)
    assert page.evaluate("document.querySelector('#m1 .now').textContent") == "81\xa0tok/s"


def test_ratios_are_shown_where_there_are_any(page):
    click(page, "[value=ratio]")
    assert (seen(page, "#m0 .chart.ratio svg"), seen(page, "#m0 .chart.value svg")) == (FIGURES, 1)
    assert page.evaluate("document.querySelector('#m0f0 .ratio .ticks').textContent").count("%") >= 2
    click(page, "[value=value]")
    assert seen(page, "#m0 .chart.ratio svg") == 0


def row(tab: Page, commit: str) -> list[str]:
    """The cells of a commit in the first figure's table."""
    return tab.evaluate(
        f"[...[...document.querySelectorAll('#m0f0 tbody tr')].find(r => r.firstChild.textContent.trim() == {commit!r})"
        ".children].map(c => c.textContent.trim())"
    )


def test_hovering_tells_the_commit_under_the_pointer(page):
    plot = box(page, "#m0f0 .plot")
    page.mouse("mouseMoved", plot["x"] + plot["width"] * 20.5 / COMMITS, plot["y"] + 20)
    told = page.evaluate("document.querySelector('#tip').innerText")
    cells = row(page, "c20")
    assert seen(page, "#tip") == 1
    assert f"{cells[1]} ms/step" in told
    assert cells[2] in told
    assert "c20, 01 Nov 2026\nChange 20" in told
    page.mouse("mouseMoved", 1, 1)
    assert seen(page, "#tip") == 0


def test_the_keyboard_reads_values_and_says_them(page):
    page.evaluate("document.querySelector('#m0f0 .plot').focus()")
    for pressed, commit in [("ArrowLeft", "c28"), ("ArrowLeft", "c27"), ("Home", "c0"), ("ArrowRight", "c1")]:
        page.press(pressed)
        said = page.evaluate("document.querySelector('#m0f0 .plot').getAttribute('aria-valuetext')")
        assert said.startswith(f"{commit}, ")
        assert row(page, commit)[1] in said


def test_a_commit_that_was_not_measured_says_why(page):
    page.evaluate("document.querySelector('#m0 .figure:not(.both) .plot').focus()")
    for pressed in ["Home", *["ArrowRight"] * 4]:
        page.press(pressed)
    said = page.evaluate("document.querySelector('#m0 .figure:not(.both) .plot').getAttribute('aria-valuetext')")
    assert "not measured: no option <script>" in said


def test_dragging_shows_those_commits_and_escape_all(page):
    whole, labels = view_box(page), axis(page)
    plot = box(page, "#m0f0 .plot")

    def across(commit: float) -> float:
        return plot["x"] + plot["width"] * (commit + 0.5) / COMMITS

    page.mouse("mousePressed", across(16), plot["y"] + 50, held=True)
    page.mouse("mouseMoved", across(20), plot["y"] + 50, held=True)
    assert seen(page, "#m0f0 .chosen") == 1
    page.mouse("mouseMoved", across(25), plot["y"] + 50, held=True)
    page.mouse("mouseReleased", across(25), plot["y"] + 50)
    zoomed = view_box(page)
    assert (zoomed[0], zoomed[2]) == (15.5, 10)
    assert zoomed[3] < whole[3] / 1.5  # heights fit the commits that are left, all of the slower level
    assert axis(page) != labels
    assert seen(page, "#m0f0 .flag") == 0
    named = page.evaluate("document.querySelector('#m0f0 .commits-axis').innerText")
    assert "c16" in named
    assert "c25" in named
    assert page.evaluate("document.querySelector('#m0f1 svg').getAttribute('viewBox')").startswith("15.5 ")
    page.evaluate("document.querySelector('#m0f0 .plot').focus()")
    page.press("Escape")
    assert (view_box(page), axis(page)) == (whole, labels)


def test_the_last_commits_are_shown_by_a_button(page):
    click(page, "[data-last='10']")
    assert view_box(page)[::2] == [19.5, 10]
    assert page.evaluate("document.querySelector('[data-last=\"10\"]').getAttribute('aria-pressed')") == "true"
    click(page, "[data-last='0']")
    assert view_box(page)[::2] == [-0.5, COMMITS]


def test_the_script_draws_all_commits_as_the_file_does(page, written):
    """Round numbers, places and words are computed in two places, and must be the same."""
    selectors = ".chart.value .flag, .chart.value .ticks span, .peername, .chart.value .commits-axis span, path.change"
    places = (
        f"[...document.querySelectorAll('#m0 :is({selectors})')].map(e => {{ const b = e.getBoundingClientRect();"
        " return [e.textContent, Math.round(b.x), Math.round(b.y + scrollY), e.className.baseVal ?? e.className]; })"
    )
    assert page.evaluate("document.body.dataset.ready") == "yes"
    by_script = page.evaluate(places)
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(written)
    page.evaluate("document.querySelector('.controls').hidden = false")
    by_file = page.evaluate(places)
    assert len(by_script) > 30
    assert by_file == by_script


# --- other pages ----------------------------------------------------------------------------------


def test_without_its_script_the_page_shows_every_machine(page, written):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(written)
    assert (seen(page, ".machine"), seen(page, ".controls"), seen(page, ".chart.value svg")) == (2, 0, FIGURES + 2)


@pytest.mark.parametrize("made", [[], [record(0, [80.0, 81.0])]], ids=["empty", "one commit"])
def test_small_histories_open(running, tmp_path, made):
    report.write(made, middle, report.CHECKOUT, tmp_path / "page.html")
    tab = running.page()
    tab.open(tmp_path / "page.html", width=400)
    assert tab.complaints() == []
    assert seen(tab, ".chart svg") == len(made)
    assert seen(tab, ".kernels table") >= 1
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    tab.close()


def test_a_thousand_commits_of_25_figures_open_and_zoom(running, tmp_path, monkeypatch):
    monkeypatch.setattr(chromium, "START_SECONDS", LOAD_SECONDS)
    report.write(long_history(1000, 25), middle, report.CHECKOUT, tmp_path / "page.html")
    tab = running.page()
    tab.open(tmp_path / "page.html")
    assert seen(tab, ".chart.value svg") == 25
    click(tab, "[data-last='100']")
    assert view_box(tab)[::2] == [899.5, 100]
    assert tab.complaints() == []
    tab.close()
