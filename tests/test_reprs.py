"""What a notebook shows on the last line of a cell: true, escaped, without scripts, short however large the object."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import rich
from markovsafety.bound import clustered

HOSTILE = '<script>alert("x")</script><img src=x onerror=y>&amp;'
LARGE = 6000  # characters that no table comes near, unless it grows with its object
VOID = {"path", "rect"}


class Page(HTMLParser):
    """Elements of a fragment, which must close what they open; its text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells, self.text = [], set(), set(), [], ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


def page(shown):
    html = shown._repr_html_()
    assert len(html) < LARGE + 250 * html.count("<td")
    read = Page(html)
    assert read.tags <= {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "rect"}
    assert not [name for name in read.attributes if name.startswith("on")]
    colours = set(re.findall(r"(?<![-\w])(?:color|background|stroke|fill)[:=]\s*\"?([^;\"]+)", html))
    # Only the harm colour is set, over whatever the page has; ink and paper are the page's own.
    assert colours <= {"inherit", "none", "currentColor", "#D55E00"} | {c for c in colours if "213, 94, 0" in c}
    return read


def rollouts(n=12, prefill=0, category="a", **columns):
    outcome = np.arange(n) % 3
    return ms.Rollouts.of(
        [[1, 2, 3]] * n, prompt_id=np.arange(n) // 2, category=category, prefill=prefill, outcome=outcome,
        hit=np.full(n, 2), columns=columns,
    )  # fmt: skip


def test_a_number_shows_value_interval_and_reasons():
    read = page(clustered([1, 2, 0, 0], [5, 5, 5, 5], name="P(harm)"))
    assert "P(harm) = 0.15" in read.text
    assert [row[0] for row in read.cells] == ["95 % interval", "width: sampling"]
    assert "not assessed: judge, lumping, model, truncation, rounding" in read.text
    assert "svg" in read.tags  # a probability is drawn on the line from 0 to 1
    assert "svg" not in page(ms.Bound(3.0, 2.0, 4.0, info={"name": "tokens"})).tags
    assert "svg" not in page(ms.Bound(np.nan, 0.0, 1.0, info={"name": "P(harm)"})).tags
    assert "proven interval" in page(ms.Bound(0.5, 0.5, 0.5, 1.0)).text


def test_the_strip_is_drawn_to_scale():
    html = rich.strip(0.5, 0.25, 1.0, width=102)
    assert '<rect x="26.0" y="3" width="75.0"' in html
    assert "M51.0 0V12" in html
    assert rich.strip(0, 0, 0).count('width="1.0"') == 1  # an interval of no width can still be seen


def test_many_numbers_show_the_first():
    bound = ms.hitting_probability(ms.toy.ladder(30, 0.4, start=3), "harm")
    read = page(bound)
    assert read.cells[0] == ["entry", "value", "proven interval"]
    assert len(read.cells) == 1 + rich.MOST
    assert "and 23 more" in read.text
    assert str(bound.at_start) in read.text
    nested = page(ms.Bound(np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3))))
    assert [row[0] for row in nested.cells[1:]] == ["0, 0", "0, 1", "0, 2", "1, 0", "1, 1", "1, 2"]


def test_a_profile_shows_its_depths_and_a_slice_of_it_only_places():
    harm = ms.profile(ms.Rollouts.concat([rollouts(6), rollouts(6, prefill=2)]))
    assert [row[0] for row in page(harm).cells] == ["depth", "0", "2"]
    assert [row[0] for row in page(harm[::-1]).cells] == ["entry", "0", "1"]


def test_a_small_chain_shows_its_matrix():
    read = page(ms.toy.ladder(3, 0.25, start=1))
    assert read.cells[0] == ["from \\ to", "level 0", "level 1", "level 2", "level 3"]
    assert read.cells[2] == ["level 1", "0.75", "", "0.25", ""]
    assert "outcomes (states): harm (1), refusal (1)" in read.text
    assert "start: level 1 1" in read.text


def test_a_large_chain_shows_what_it_is():
    read = page(ms.toy.ruin(5000, start=7))
    assert not read.cells
    assert "5,001 states" in read.text
    P = np.diag(np.ones(9), 1)
    P[-1, -1] = 1
    assert "start: none" in page(ms.Chain(P, {"harm": 9})).text
    layered = ms.Chain.layered([P] * 4, {"harm": 9}, start=np.full(10, 0.1))
    assert "4 layers" in page(layered).text
    assert "and 2 more" in page(layered).text


def test_counts_and_rollouts_show_answers_by_forced_tokens():
    rolls = ms.Rollouts.concat([rollouts(12), rollouts(6, prefill=1)])
    table = [["0", "4", "4", "4", "0"], ["1", "2", "2", "2", "0"]]
    read = page(rolls)
    assert read.cells[0] == ["forced tokens", *ms.OUTCOMES]
    assert read.cells[1:] == table
    assert "the first answer: token ids 1 2 3" in read.text
    counts = ms.count(rolls, states=ms.KGram(2))
    assert page(counts).cells[1:] == table
    assert f"{len(counts.states)} states" in page(counts).text
    unjudged = rolls.replace(outcome=np.full(18, -1), hit=np.full(18, -1))
    assert page(unjudged).cells[0][-1] == "not judged"
    assert page(unjudged).cells[1] == ["0", "0", "0", "0", "0", "12"]
    assert page(ms.Rollouts.of([], prompt_id=[])).cells == [["forced tokens", *ms.OUTCOMES]]


def test_many_forced_lengths_are_shortened():
    rolls = ms.Rollouts.of(
        [list(range(40))] * 30, prompt_id=np.arange(30), prefill=np.arange(30), outcome=1, hit=np.full(30, 39)
    )
    for shown in (rolls, ms.count(rolls, states=ms.Position())):
        assert len(page(shown).cells) == 1 + rich.MOST
        assert "and 22 more" in page(shown).text


def test_a_grid_shows_harm_by_depth_and_width():
    model = ms.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    grid = ms.sweep(model, depth=range(4), width=[1, 2])
    read = page(grid)
    assert read.cells[0] == ["depth", "width 1", "width 2"]
    assert [row[0] for row in read.cells[1:]] == ["0", "1", "2", "3"]
    assert read.cells[1][1] == f"{grid.harm.value[0, 0]:.3g}"
    assert f"{0.45 * grid.harm.value[0, 0]:.2f}" in grid._repr_html_()
    large = page(ms.sweep(model, depth=range(500), width=range(1, 41)))
    assert len(large.cells) == 14  # a head, six depths, a gap, six depths
    assert len(large.cells[0]) == 14
    assert large.cells[7][0] == "..."
    assert large.cells[8][0] == "494"
    wide = page(ms.sweep(model, depth=[1, 2], width=[1], correlation=[0.0, 0.2, 0.4]))
    assert "correlation 0.0 (and 2 more tables)" in wide.text


def test_grids_print_what_they_show():
    grid = ms.sweep(ms.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3), depth=range(3), width=[1, 2])
    for row in page(grid).cells:
        assert "  ".join(row) in re.sub(" {2,}", "  ", str(grid))


@pytest.mark.parametrize(
    "shown",
    [
        ms.Bound(0.1, 0.0, 0.5, info={"name": HOSTILE, "note": HOSTILE}),
        ms.Bound(np.zeros(3), np.zeros(3), np.ones(3), info={"name": HOSTILE, "note": HOSTILE}),
        ms.Chain([[0.5, 0.5], [0, 1]], {HOSTILE: 1}, 0, [HOSTILE + "1", HOSTILE + "2"]),
        ms.Chain(
            np.eye(20, k=1) + np.diag([0.0] * 19 + [1.0]), {HOSTILE: 19}, 0, [HOSTILE + str(i) for i in range(20)]
        ),
        rollouts(2, text=[HOSTILE] * 2, category=HOSTILE),
        ms.count(rollouts(2, category=HOSTILE), states=ms.KGram(1)),
    ],
    ids=["bound", "bounds", "chain", "large chain", "rollouts", "counts"],
)
def test_labels_are_text(shown):
    read = page(shown)
    assert "script" not in read.tags
    assert "img" not in read.tags


def test_hostile_names_of_a_grid_are_text():
    grid = ms.sweep(ms.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3), depth=[0, 1], width=[1])
    grid = type(grid)(grid.harm, grid.dims, grid.coords, {**grid.info, "note": HOSTILE, "rule": HOSTILE})
    assert page(grid).text.count(HOSTILE) == 2


@pytest.mark.parametrize("title", ["", HOSTILE, "あ" * 5])
def test_tables_escape_all_that_they_are_given(title):
    html = rich.shown(title, [(HOSTILE, HOSTILE)], head=[HOSTILE, HOSTILE], notes=[HOSTILE])
    assert Page(html).tags == {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}


@pytest.mark.parametrize("room", ["chains", "hitting", "evidence"])
def test_results_print_alike_with_and_without_print(room):
    module = getattr(ms, room)
    classes = [x for x in (getattr(module, name) for name in module.__all__) if isinstance(x, type)]
    own = [x for x in classes if "__str__" in vars(x)]
    assert all(x.__repr__ is x.__str__ for x in own)
    assert len(own) >= {"chains": 0, "hitting": 2, "evidence": 10}[room]


def test_results_of_depth_do_not_print_their_arrays():
    """What compares by identity holds arrays; dataclasses would print all their numbers."""
    things = [x for x in (getattr(ms.depth, name) for name in ms.depth.__all__) if dataclasses.is_dataclass(x)]
    large = [x for x in things if x.__eq__ is object.__eq__]
    assert len(large) >= 18
    assert [x.__name__ for x in large if hasattr(x.__repr__, "__wrapped__")] == []  # as dataclasses make it
    mixing = ms.depth.mixing(ms.depth.parity_model())
    assert repr(mixing).startswith("Mixing(")
    assert len(repr(mixing).splitlines()) == 1


def test_what_holds_arrays_says_what_it_is_in_a_line(tmp_path):
    counts = ms.count(ms.Rollouts.concat([rollouts(12), rollouts(6, prefill=1)]), states=ms.KGram(1))
    ended = "18 rollouts (6 harm + 6 refusal + 6 benign + 0 truncated)"
    assert repr(counts.tally) == f"<Tally {ended} in 9 groups, prefill 0, 1>"
    assert repr(ms.estimate(counts).evidence) == f"<Evidence of 7 states: {ended} in 9 groups>"
    assert f"{ended} of 6 prompts" in repr(counts)
    pairs = ms.chains.count_transitions([1, 2, 1, 1], order=2)
    assert repr(pairs) == "<Transitions: 4 tokens in 4 contexts of order 2>"
    path = ms.chains.write_layers([np.eye(2)] * 5, tmp_path / "x.npz", {"harm": 1})
    assert repr(ms.read_chain(path, stream=True).layers) == "<StoredLayers: 5 of 2 states in x.npz>"


def test_long_labels_are_cut():
    chain = ms.Chain([[0.5, 0.5], [0, 1]], {"harm": 1}, 0, ["a" * 100_000, "b" * 100_000])
    assert len(page(chain).text) < 1000
