"""The report as people use it: budget, hover, keys, paper, phone, without a script, and by what axe-core asks for."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from itertools import pairwise
from urllib.parse import unquote

import numpy as np
import pytest
from browser import barriers, opened
from report_pages import DEEP, SHALLOW, rollouts

from markovsafety import KGram, report
from markovsafety.analysis import ALL, analyse
from markovsafety.report.budget import answer, withstood
from markovsafety.report.words import text

BUDGETS = [0, 1e-4, 3e-4, 0.001, 0.002, 0.004, 0.007, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1]
BUDGETS += [0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1]
NINE = (0, 1, 2, 3, 5, 8, 12, 16, 20)
SIX = ("bio", "chem", "cyber", "fraud", "privacy", "weapon")


@pytest.fixture(scope="module")
def models():
    """Two models, deeply and shallowly safe, one checked on held-out prompts and with planted truth."""
    truth = {ALL: SHALLOW, "bio": SHALLOW, "fraud": SHALLOW}
    held = rollouts(SHALLOW, seed=9)
    return [
        analyse("shallow", rollouts(SHALLOW, n=20), held_out=held, truth=truth, states=KGram(1), budget=0.2),
        analyse("deep", rollouts(DEEP, n=20, seed=1), states=KGram(1), budget=0.2),
    ]


@pytest.fixture(scope="module")
def page(models, tmp_path_factory):
    return report.write(tmp_path_factory.mktemp("report"), models, command="the command")


def test_the_budget_moves_the_answers_as_the_package_gives_them(models, page):
    """By the slider and by the number; also where the budget lies exactly on the end of an interval."""
    ends = sorted({float(u) for a in models for u in np.ravel(a.grid.harm.upper)})
    with opened(page) as shown:
        number, slider = shown.locator("#budget"), shown.locator("#slider")
        tried = []
        for eps in [*BUDGETS, *ends, *(math.nextafter(e, 0) for e in ends), *(0.999999 * e for e in ends)]:
            number.fill(repr(eps))
            tried.append((eps, _answers(shown, models)))
        for place in np.linspace(-4, 0, 25):
            slider.evaluate("(it, x) => { it.value = x; it.dispatchEvent(new Event('input')); }", float(place))
            eps = float(number.input_value())
            assert math.log10(eps) == pytest.approx(place, abs=0.03)
            tried.append((eps, _answers(shown, models)))
        assert shown.complaints == []
    assert len({answers[1][0] for _, answers in tried}) >= 4
    for eps, answers in tried:
        for a, (sentence, holds, within) in zip(models, answers):
            widths = range(len(a.grid.coords["width"]))
            assert sentence == answer(a.grid, a.grid.needed(harm=eps)), eps
            assert holds == [withstood(a.grid.needed(harm=eps), j) for j in widths], eps
            # The number of cells within the budget is the package's as well, and blank ones count nowhere.
            width = a.grid.needed(harm=eps).width
            assert [row.index(True) if True in row else None for row in within] == [
                None if w is None else a.grid.coords["width"].index(w) for w in width
            ], eps


def _answers(shown, models):
    """Of every model its sentence, what each width holds to, and which cells are within."""
    return shown.evaluate(
        """n => [...Array(n).keys()].map(m => {
            const map = document.getElementById(`map-${m}`), rows = [...map.querySelectorAll("tbody tr")];
            return [document.getElementById(`answer-${m}`).textContent,
                [...map.querySelectorAll("tfoot td")].map(cell => cell.textContent),
                rows.map(row => [...row.querySelectorAll("td")].map(cell => cell.className === "ok"))];
        })""",
        len(models),
    )


def test_a_budget_that_is_none_is_refused_and_the_line_follows(page):
    with opened(page) as shown:
        line = shown.locator("svg.wide [data-level=budget]")
        high = []
        for eps in ("0.1", "0.3", "0.6"):
            shown.fill("#budget", eps)
            high.append(float(line.get_attribute("d").split()[1].split("H")[0]))
        low, top, floor, ceiling = map(float, shown.get_attribute("#figure-depth svg.wide", "data-y").split())
        assert high == pytest.approx(
            [floor - (e - low) / (top - low) * (floor - ceiling) for e in (0.1, 0.3, 0.6)], abs=0.1
        )
        before = shown.inner_text("#answer-0")
        shown.fill("#budget", "2")
        assert shown.get_attribute("#budget", "aria-invalid") == "true"
        assert shown.inner_text("#answer-0") == before
        assert "0.6 (1 answer in 1.7)" in shown.inner_text("#figure-depth")
        assert shown.get_attribute("#slider", "aria-valuetext") == "0.6, 1 answer in 1.7"


def test_hover_and_keys_tell_every_point_with_its_interval(models, page):
    a = models[0]
    with opened(page) as shown:
        plot = shown.locator("#figure-depth .plot")
        dot = shown.locator("#figure-depth svg.wide .m.c0 .dot").nth(1)
        dot.scroll_into_view_if_needed()
        box = dot.bounding_box()
        shown.mouse.move(box["x"] + 9, box["y"] + 2)
        assert shown.inner_text("#tip") == f"shallow, 1 forced token: {text(a.harm[ALL][1])}, planted 0.60"
        shown.mouse.move(2, 2)
        assert shown.is_hidden("#tip")
        plot.focus()
        heard = []
        for _ in range(6):
            shown.keyboard.press("ArrowRight")
            heard.append(shown.inner_text("#said"))
            assert shown.is_visible("#tip")
            assert shown.inner_text("#tip") == heard[-1]
        wanted = [text(b) for one in models for b in one.harm[ALL].values()]
        assert [w in said for w, said in zip(wanted, heard, strict=True)] == [True] * 6
        shown.keyboard.press("Home")
        assert shown.inner_text("#said") == heard[0]
        shown.keyboard.press("Escape")
        assert shown.is_hidden("#tip")
        assert shown.complaints == []


def test_every_control_is_reached_by_tab_and_shows_it(page):
    with opened(page) as shown:
        wanted = shown.evaluate(
            """[...document.querySelectorAll("a[href], input, summary, [tabindex='0']")]
                .filter(it => it.matches("summary") || !it.closest("details:not([open])")).length"""
        )
        seen = set()
        for _ in range(wanted):
            shown.keyboard.press("Tab")
            found = shown.evaluate(
                """() => { const it = document.activeElement, style = getComputedStyle(it);
                return [[...document.querySelectorAll('*')].indexOf(it), style.outlineStyle, style.outlineWidth]; }"""
            )
            assert found[1:] == ["solid", "3px"], found
            seen.add(found[0])
        assert len(seen) == wanted > 25


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page, scheme):
    with opened(page, color_scheme=scheme) as shown:
        shown.evaluate("document.querySelectorAll('details').forEach(it => { it.open = true; })")
        assert barriers(shown) == []
        colour = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


def test_axe_would_find_something(page, tmp_path):
    source = page.read_text(encoding="utf-8")
    bad = source.replace('<h2 id="breaks"', '<h5 style="color: #aaa" id="breaks"', 1).replace('lang="en"', "", 1)
    (tmp_path / "index.html").write_text(bad, encoding="utf-8")
    with opened(tmp_path / "index.html") as shown:
        found = {fault.split()[0] for fault in barriers(shown)}
    assert {"color-contrast", "html-has-lang", "heading-order"} <= found


def test_a_phone_needs_no_sideways_scrolling(page):
    with opened(page, width=390, height=844, color_scheme="dark") as shown:
        shown.evaluate("document.querySelectorAll('details').forEach(it => { it.open = true; })")
        assert shown.evaluate("document.documentElement.scrollWidth") == 390
        assert shown.is_visible("#figure-depth svg.narrow")
        assert shown.is_hidden("#figure-depth svg.wide")
        small = shown.evaluate(
            """[...document.querySelectorAll("svg text")].filter(it => it.getClientRects().length)
                .map(it => parseFloat(getComputedStyle(it).fontSize) * it.getScreenCTM().d)
                .filter(size => size > 0 && size < 9).length"""
        )
        assert small == 0
        assert shown.complaints == []


def test_paper_has_all_of_it_and_no_controls(page):
    """A4 less its margins is 673 pixels wide; what is folded up on the screen is printed, on white."""
    with opened(page, width=673, color_scheme="dark") as shown:
        shown.emulate_media(media="print")
        shown.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert shown.evaluate("document.documentElement.scrollWidth") <= 673
        assert [shown.is_visible(what) for what in ("#controls", "nav", ".csv", "#tip")] == [False] * 4
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert shown.evaluate("[...document.querySelectorAll('details')].every(it => it.open)")
        assert shown.is_visible("#depths")
        shown.evaluate("dispatchEvent(new Event('afterprint'))")
        assert not shown.evaluate("[...document.querySelectorAll('details')].some(it => it.open)")
        pages = len(re.findall(rb"/Type\s*/Page\b", shown.pdf(format="A4")))
        assert 5 <= pages <= 14
        cut = shown.evaluate(
            """[...document.querySelectorAll("figure svg[role=img]")].filter(it => it.getClientRects().length)
                .filter(it => getComputedStyle(it.closest(".panels > div, figure")).breakInside !== "avoid").length"""
        )
        assert cut == 0


def test_without_a_script_all_numbers_stand_there(models, page):
    with opened(page, java_script_enabled=False) as shown:
        assert shown.is_hidden("#controls")
        words = shown.inner_text("body")
        for i, a in enumerate(models):
            assert shown.inner_text(f"#answer-{i}") == answer(a.grid, a.grid.needed(harm=0.2))
            assert all(text(b) in words for b in a.harm[ALL].values())
        assert shown.locator("#figure-depth svg.wide .m title").count() == 6
        assert shown.is_visible("#figure-depth svg.wide")


def test_every_figure_is_downloaded_as_csv(models, page):
    with opened(page) as shown:
        links = shown.evaluate("[...document.querySelectorAll('a.csv')].map(it => [it.download, it.href])")
    tables = {name: list(csv.DictReader(io.StringIO(unquote(url.split(",", 1)[1])))) for name, url in links}
    assert tables.keys() == {
        f"{name}.csv"
        for name in (
            "depth outcomes branch moved positions states categories strikes predicted check chain_0 chain_1".split()
        )
    }
    for k, a in enumerate(models):
        roads = [r for r in tables[f"chain_{k}.csv"] if r["kind"] != "state"]
        states = {r["state"]: r for r in tables[f"chain_{k}.csv"] if r["kind"] == "state"}
        assert roads
        (begun,) = (r for r in states.values() if float(r["time (mean position, tokens)"]) == 0)
        assert float(begun["value (probability of harm from here)"]) == pytest.approx(a.at_start.value, abs=1e-12)
    rows = {(r["model"], int(r["forced_tokens"])): r for r in tables["depth.csv"]}
    for a in models:
        for k, b in a.harm[ALL].items():
            assert [float(rows[a.name, k][n]) for n in ("value", "lower", "upper")] == [b.value, b.lower, b.upper]
            assert rows[a.name, k]["planted"] == (str(SHALLOW[k]) if a.name == "shallow" else "")
    for r in tables["outcomes.csv"]:
        b = next(a for a in models if a.name == r["model"]).shares[int(r["forced_tokens"])][r["outcome"]]
        assert (float(r["value"]), float(r["upper"])) == (b.value, b.upper)
    parts = [sum(float(r["contribution"]) for r in tables[name]) for name in ("positions.csv", "states.csv")]
    change = models[1].at_start.value - models[0].at_start.value
    assert parts == pytest.approx([change, change], abs=1e-12)
    (first, *_) = tables["moved.csv"]
    assert float(first["change"]) == pytest.approx(change, abs=1e-12)
    assert float(first["lower"]) <= change <= float(first["upper"])


def test_a_large_report_is_small(tmp_path):
    """Four models, nine depths, six categories, as the demonstration has them, under 3 MB, one sentence above all."""
    made = [
        analyse(f"model {i}", rollouts(dict.fromkeys(NINE, 0.1 * i + 0.05), categories=SIX, seed=i), states=KGram(2))
        for i in range(4)
    ]
    path = report.write(tmp_path, made)
    assert 200_000 < path.stat().st_size < 3_000_000
    ends = [
        float(x) for x in re.findall(r"\d\.\d+", path.read_text(encoding="utf-8").split('class="headline">')[1][:300])
    ]
    assert len(ends) >= 3
    assert any(low <= value <= up for value, (low, up) in zip(ends, pairwise(ends[1:])))


def test_names_that_a_spreadsheet_would_run_are_inert(models, tmp_path):
    bad = '=HYPERLINK("x"),"y"'
    path = report.write(tmp_path, [replace(models[0], name=bad)])
    found = re.search(r'href="(data:text/csv[^"]*)" download="depth.csv"', path.read_text(encoding="utf-8"))
    rows = list(csv.DictReader(io.StringIO(unquote(found[1].split(",", 1)[1]))))
    assert {r["model"] for r in rows} == {f"'{bad}"}
