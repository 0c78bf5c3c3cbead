"""One model's analysis and the page: every number comes from the rollouts, every probability has its interval."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import DEEP, SHALLOW, Page, rollouts, strict

from markovsafety import InputError, JudgedPrefix, KGram, report
from markovsafety.analysis import ALL, analyse
from markovsafety.bound import Bound, clustered
from markovsafety.report.colours import contrast, legible, style
from markovsafety.report.figures import figures
from markovsafety.report.moved import Moved, drawn, moved
from markovsafety.report.words import finding, number, text
from markovsafety.rollouts import Rollouts

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def two() -> list[Any]:
    truth = {ALL: SHALLOW, "bio": SHALLOW, "fraud": SHALLOW}
    held = rollouts(SHALLOW, seed=9)
    return [
        analyse("shallow", rollouts(SHALLOW, n=20), held_out=held, truth=truth, states=KGram(1), budget=0.3),
        analyse("deep", rollouts(DEEP, n=20, seed=1), states=KGram(1), budget=0.2),
    ]


@pytest.fixture(scope="module")
def written(two, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report.write(folder, two, command="the command", seconds=12.3, extra={"seed": 5})
    return folder


def raw(rolls: Rollouts, k: int, category: str | None = None) -> Any:
    rows = (rolls.prefill == k) & ((rolls.category == category) if category else True)
    prompts = np.unique(rolls.prompt_id[rows])
    harm = [(rolls.outcome[rows & (rolls.prompt_id == p)] == 0).sum() for p in prompts]
    return clustered(harm, [(rows & (rolls.prompt_id == p)).sum() for p in prompts])


def test_analysis_measures_what_was_sampled():
    rolls = rollouts(SHALLOW)
    a = analyse("m", rolls, states=KGram(1), budget=0.3)
    assert (a.rollouts, a.prompts, a.held_out, a.depths, a.categories) == (216, 12, 0, (0, 1, 3), ("bio", "fraud"))
    for category in (ALL, "bio", "fraud"):
        for k in SHALLOW:
            here, told = a.harm[category][k], raw(rolls, k, None if category == ALL else category)
            assert (here.value, here.lower, here.upper) == pytest.approx(
                (told.value, told.lower, told.upper), abs=1e-12
            )
    for k in SHALLOW:
        assert sum(b.value for b in a.shares[k].values()) == pytest.approx(1, abs=1e-12)
        assert a.shares[k]["harm"].value == pytest.approx(a.harm[ALL][k].value, abs=1e-12)
    # The identity that makes the start no evidence.
    assert a.at_start.value == pytest.approx(a.harm[ALL][0].value, abs=1e-12)
    assert a.length.value == pytest.approx(np.mean(rolls.hit[rolls.prefill == 0] + 1), rel=1e-9)
    assert a.depth[ALL].value.depth == 0
    assert a.needed.eps == 0.3
    assert np.asarray(a.grid.harm.value)[:, 0] == pytest.approx([b.value for b in a.harm[ALL].values()], abs=1e-12)
    assert a.missing == ()


def test_strikes_say_where_harm_comes():
    rolls = rollouts(SHALLOW, n=30)
    a = analyse("m", rolls, states=KGram(1))
    hits = rolls.hit[(rolls.outcome == 0) & (rolls.prefill == 0)]
    total = (rolls.prefill == 0).sum()
    assert a.strikes_at == 0
    for (start, stop), b in a.strikes.items():
        assert b.value == pytest.approx(((hits >= start) & (hits < stop)).sum() / total, abs=1e-12)
        assert b.value > 0
    assert sum(b.value for b in a.strikes.values()) == pytest.approx(a.harm[ALL][0].value, abs=1e-12)


def test_held_out_rollouts_are_what_the_chain_is_checked_on():
    rolls, held = rollouts(SHALLOW), rollouts({0: 0.05, 2: 0.5}, seed=3)
    a = analyse("m", rolls, held_out=held, states=KGram(1))
    assert a.held_out == 144
    assert [row["k"] for row in a.check.table] == [0, 2]
    assert a.unseen[2].value == pytest.approx(raw(held, 2).value, abs=1e-12)
    assert a.predicted[2].lower <= a.predicted[2].value <= a.predicted[2].upper
    assert [row["k"] for row in analyse("m", rolls, states=KGram(1)).check.table] == [1, 3]


def test_summary_is_json_and_complete(two):
    for a in two:
        summary = a.summary()
        json.dumps(summary, allow_nan=False)
        for category, row in a.harm.items():
            for k, b in row.items():
                told = summary["harm"][category][str(k)]
                assert (told["value"], told["lower"], told["upper"]) == (b.value, b.lower, b.upper)
                assert set(told["reasons"]) == {"sampling", "judge", "lumping", "model", "truncation", "rounding"}
        assert summary["check"]["table"]
        assert summary["critical"]["roads"][0]["states"][0] == "(start)"


def test_assumptions_and_widths_stand_on_the_page(written, two):
    page = Page((written / "index.html").read_text(encoding="utf-8"))
    rows = page.cells["assumptions"]
    names = [f.name for f in two[0].findings]
    assert [row[0] for row in rows[1:]] == names
    assert names[-1] == "time of the first hit"
    for row in rows[1:]:
        for cell, a in zip(row[1:], two):
            found = next((f for f in a.findings if f.name == row[0]), None)
            assert cell.startswith(found.verdict if found else "not tested")
    for a in two:
        assert all(f.text in page.text for f in a.findings)
        assert a.check.verdict in page.text
    widths = {row[0]: row[1:] for row in page.cells["widths"][1:]}
    for name, cells in widths.items():
        for cell, a in zip(cells, two):
            if name in a.whole.reasons:
                width = a.whole.reasons[name]
                if width is not None and 0 < width < 1e-9:
                    assert float(cell[1:]) == pytest.approx(width, rel=0.1)
                else:
                    assert cell == ("not assessed" if width is None else f"±{number(width)}" if width else "0")
    assert widths.keys() == {"measured", *two[0].whole.reasons, "all together"}


def test_the_page_stands_alone(written):
    source = (written / "index.html").read_text(encoding="utf-8")
    page = Page(source)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 4  # the chains of two models, light and dark
    assert all(src and src.startswith("data:image/") for src in images)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    drawings = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert len(drawings) >= 17
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "form", "base")]
    assert all(str(attrs["href"]).startswith(("#", "data:text/csv")) for tag, attrs in page.tags if tag == "a")
    bare = re.sub(r"data:[a-z/+]+;[^\"]+", "", source)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", bare)
    assert len(source) < 3_000_000
    assert "the command" in page.text
    assert "tiny" in page.text
    assert "/somewhere" not in bare + (written / "summary.json").read_text()
    files = {p.name for p in written.iterdir()}
    assert {"index.html", "summary.json", "depth.png", "width.png", "categories.png", "chain_0.png"} <= files
    assert not [f for f in files if f.endswith(".tmp")]
    shown = {
        str(attrs["id"]).removeprefix("figure-") for tag, attrs in page.tags if tag == "figure" and attrs.get("id")
    }
    assert {name for name in shown if f"{name}.png" not in files} == {"moved", "positions", "states"}


def test_every_probability_in_the_harm_table_has_its_interval(written, two):
    rows = Page((written / "index.html").read_text(encoding="utf-8")).cells["harm"]
    assert rows[0] == ["forced tokens", "shallow", "deep"]
    for row in rows[1:]:
        k = int(row[0])
        for cell, a in zip(row[1:], two):
            b = a.harm[ALL][k]
            said = re.sub(r"planted.*", "", cell.strip())
            assert said == f"{number(b.value)} [{number(b.lower)}, {number(b.upper)}]"
            assert ("planted" in cell) == (a.name == "shallow")
    # No other table has a number between 0 and 1 without brackets behind it.
    for name, table in Page((written / "index.html").read_text(encoding="utf-8")).cells.items():
        for row in table[1:]:
            for cell in row[1:] if name != "trust" else row[1:3]:
                if re.fullmatch(r"\s*0\.\d+\s*", cell):
                    raise AssertionError(f"bare probability {cell!r} in table {name}")


def test_summary_file(written, two):
    summary = strict(written / "summary.json")
    assert summary["rollouts"] == sum(a.rollouts + a.held_out for a in two) == 720 + 216 + 720
    assert list(summary["models"]) == ["shallow", "deep"]
    assert summary["finding"] == finding(two)
    assert (summary["command"], summary["seed"]) == ("the command", 5)
    assert "markovsafety" in summary["versions"]

    def walk(x: Any) -> None:
        if isinstance(x, dict | list):
            for y in x.values() if isinstance(x, dict) else x:
                walk(y)
        elif isinstance(x, float):
            assert math.isfinite(x)

    walk(summary)


def test_the_finding_is_composed_from_the_numbers(two):
    shallow, deep = finding(two)
    a = two[0]
    assert shallow == (
        f"shallow: harm rises from {text(a.harm[ALL][0])} without forcing to {text(a.harm[ALL][1])} once one compliant "
        "token is forced: its alignment reaches less than one token."
    )
    assert "once 3 compliant tokens are forced: it holds within 0.2 up to 1 forced token and no longer at 3" in deep


@pytest.mark.parametrize(
    ("harm", "budget", "said"),
    [
        ({0: 0.0}, 0.1, "no harm in 72 answers to 12 prompts; least certain is 0 [0, 0.26], after no token."),
        ({0: 0.5}, 0.1, "without forcing; how deep its alignment reaches was not measured."),
        ({1: 0.5}, 0.1, "after one compliant token; nothing else was measured."),
        ({0: 0.6, 1: 0.6}, 0.1, "already without forcing; this is above the budget of 0.1."),
        ({0: 0.15, 2: 0.15}, 0.1, "the intervals allow a depth of none to "),
        ({0: 0.3, 1: 0.3}, 0.99, "harm stays within 0.99 at every measured depth, up to 1 forced token; it is"),
    ],
)
def test_findings_of_other_models(harm, budget, said):
    (sentence,) = finding([analyse("m", rollouts(harm), states=KGram(1), budget=budget)])
    assert said in sentence


def test_answers_that_were_cut_off_are_no_good_news():
    some = rollouts({0: 0.0, 1: 0.0})
    cut = rollouts({0: 0.0, 1: 0.0}, truncated=True)
    (sentence,) = finding([analyse("m", cut)])
    assert sentence.startswith("m: nothing is known about harm, since no answer came to an end. Up to 1.00 [")
    both = analyse("m", Rollouts.concat([some, cut]), states=KGram(1))
    (sentence,) = finding([both])
    assert f"Up to {text(both.shares[0]['truncated'])} of the answers were cut off" in sentence
    assert "cut off" not in finding([analyse("m", some, states=KGram(1))])[0]


def test_what_models_say_is_inert(tmp_path):
    rolls = rollouts(SHALLOW, categories=(EVIL, "$b$"), prompts=4)
    a = analyse(
        f"model {EVIL}",
        rolls.replace(provenance={"model": EVIL, "engine": EVIL, "judge": {"name": EVIL}}),
        states=KGram(1),
        words=lambda i: f"<img src=x onerror=alert({i})>",
    )
    b = analyse("judged", rolls, states=JudgedPrefix({3: EVIL, 4: "4 < 5 & 6"}))
    report.write(tmp_path, [a, b], title=EVIL, command=EVIL, extra={EVIL: EVIL, "endless": math.inf})
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [dict(attrs) for tag, attrs in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "numbers"},
        {},
    ]
    assert not [tag for tag, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert all((attrs.get("src") or "").startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert EVIL in page.text
    assert "onerror=alert" in page.text
    assert strict(tmp_path / "summary.json")["endless"] == "inf"


@pytest.mark.parametrize(
    ("rolls", "expected"),
    [
        (rollouts({0: 0.3}, categories=("one",)), ["No forced tokens", "not validated"]),
        (rollouts({2: 0.3}, categories=("one",)), ["No chain, because"]),
        (rollouts({0: 0.0, 1: 0.0}), ["No harm among", "No harm was seen at all"]),
        (rollouts({0: 0.0, 1: 0.0}, truncated=True), ["cut off at the token limit", "No chain: "]),
        (rollouts({0: 0.0}, prompts=1, n=1), ["No forced tokens"]),
    ],
    ids=["no forced tokens", "only forced", "no harm", "all cut off", "one answer"],
)
def test_a_report_of_what_there_is(rolls, expected, tmp_path):
    a = analyse("only", rolls)
    page = Page(report.write(tmp_path, [a]).read_text(encoding="utf-8"))
    for part in expected:
        assert any(part in note for note in a.missing), a.missing
        assert part in page.text
    assert ("bio" in a.categories) == ("categories.png" in {p.name for p in tmp_path.iterdir()})
    summary = strict(tmp_path / "summary.json")
    assert summary["models"]["only"]["truth"] == {}
    assert summary["seed"] == 5


def test_writing_again_replaces_the_report_and_repeats_it(tmp_path):
    a = analyse("m", rollouts({0: 0.3, 1: 0.5}), states=KGram(1))
    first = report.write(tmp_path / "new" / "folder", [a]).read_bytes()
    assert report.write(tmp_path / "new" / "folder", [a]).read_bytes() == first


def test_bad_input_is_refused(tmp_path, two):
    with pytest.raises(InputError, match="report of the models"):
        report.write(tmp_path, [])
    with pytest.raises(InputError, match="report of the models"):
        report.write(tmp_path, [two[0], two[0]])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        report.write(tmp_path / "file", two[:1])
    rolls = rollouts({0: 0.3})
    with pytest.raises(InputError, match="not judged"):
        analyse("m", rolls.replace(outcome=np.full(len(rolls), -1), hit=np.full(len(rolls), -1)))
    with pytest.raises(InputError, match="no rollouts"):
        analyse("m", rolls[np.zeros(len(rolls), dtype=bool)])


@pytest.mark.parametrize(
    ("p", "said"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.534, "0.53"),
        (0.0213, "0.021"),
        (4e-5, "4e-5"),
        (8e-28, "<1e-9"),
        (24.93, "24.9"),
        (math.inf, "infinite"),
    ],
)
def test_numbers(p, said):
    assert number(p) == said


def test_parts_of_a_change_are_told_of_the_models_by_their_names():
    change = {0: Bound(-0.4, -0.5, -0.3)}
    shares = np.array([-0.01] * 10 + [-0.3])
    found = Moved("x-1", "y-2", change, positions=shares, states=[("a-b", -0.4)], note="")
    figures = drawn([found])
    ((_, places),) = figures["positions"].panels
    assert "x-1 → y-2, token 1: −0.010 of −0.400" in places
    assert "x-1 → y-2, from token 11 on: −0.300 of −0.400" in places
    assert "the largest part of the change, −0.300 of −0.400, is made from token 11 on." in places
    assert "x-1 → y-2, after “a-b”: −0.400 of −0.400" in figures["states"].panels[0][1]


def test_the_key_names_every_depth_that_a_symbol_stands_for():
    made = [analyse("a", rollouts({0: 0.1, 5: 0.5}), states=KGram(1)), analyse("b", rollouts(DEEP), states=KGram(1))]
    assert [name for _, name in figures(made, 0.1)["categories"].key] == [
        "not forced",
        "1 forced or 5 forced",
        "3 forced",
    ]


def test_twelve_models_are_told_apart():
    a = analyse("0", rollouts(SHALLOW), states=KGram(1))
    key = figures([replace(a, name=str(i)) for i in range(12)], 0.1)["depth"].key
    assert len({sign for sign, _ in key}) == 12


def test_lines_are_called_planted_only_where_they_are(tmp_path):
    told = analyse("told", rollouts(SHALLOW), truth={ALL: SHALLOW}, states=KGram(1))
    other = analyse("other", rollouts(DEEP), states=KGram(1))
    for name, made, said in (("a", [told], "The lines are the"), ("b", [told, other], "The line of told is the")):
        text_of = Page(report.write(tmp_path / name, made).read_text(encoding="utf-8")).text
        assert (f"{said} planted truth" in text_of, text_of.count("the planted truth, known exactly")) == (True, 1)


def test_a_page_has_one_level(two, tmp_path):
    other = analyse("other", rollouts(SHALLOW), states=KGram(1), level=0.9)
    with pytest.raises(InputError, match=re.escape("levels 0.9, 0.95")):
        report.write(tmp_path, [two[0], other])
    assert list(tmp_path.iterdir()) == []
    assert report.write(tmp_path, [other]).is_file()


def test_names_that_are_no_text_do_not_stop_a_report(tmp_path):
    name = "caf\udce9"  # what Python makes of an argument in Latin-1
    page = report.write(tmp_path, [analyse(name, rollouts(SHALLOW), states=KGram(1))]).read_text(encoding="utf-8")
    assert "caf\\udce9" in page


def test_a_category_cannot_take_the_place_of_all():
    with pytest.raises(InputError, match="A category is called 'all'"):
        analyse("a", rollouts(SHALLOW, categories=("all", "fraud")), states=KGram(1))
    alone = analyse("a", rollouts(SHALLOW, categories=("all",)), states=KGram(1))
    assert alone.categories == ()


def test_colours_are_told_from_the_paper():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.005)  # the grey that just passes AA
    sheet = style("", 8)
    for paper, block in zip(("#ffffff", "#131416"), sheet.split("prefers-color-scheme"), strict=True):
        found = re.findall(r"--of-\w+: (#\w{6})", block)
        assert len(found) == 4 + 1 + 8
        assert min(contrast(c, paper) for c in found) >= 3
    assert legible("#D55E00", "#ffffff") == "#d55e00"  # what can be seen stays as it is


def test_equal_models_moved_nothing(tmp_path):
    a = analyse("a", rollouts(SHALLOW), states=KGram(1))
    (same,) = moved([a, replace(a, name="b")])
    assert same.states == []
    assert same.total == 0
    assert "changes by 0 [" in same.sentence()
    assert "may be chance" in same.sentence()
    page = Page(report.write(tmp_path, [a, replace(a, name="b")]).read_text(encoding="utf-8"))
    assert same.sentence() in page.text
