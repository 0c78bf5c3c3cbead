"""Figures: what is drawn is what the bounds say, in any case that data can bring, without touching global settings."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from markovsafety import Bound, Chain, InputError, hitting_probability, plot
from markovsafety.bound import clustered
from markovsafety.plot.folding import folded
from markovsafety.plot.style import plain, short, spread, state_text

MODEST = settings(derandomize=True, deadline=None, max_examples=25)


def bound(value: float, lower: float | None = None, upper: float | None = None) -> Bound:
    return Bound(value, value / 2 if lower is None else lower, (1 + value) / 2 if upper is None else upper)


def some_profile(*values: float) -> dict[int, Bound]:
    return {k: bound(v) for k, v in zip((0, 1, 2, 5, 20), values)}


def some_grid(
    cells: Any, depth: tuple[int, ...], width: tuple[int, ...], dims: tuple[str, ...] = ("depth", "width")
) -> Any:
    value, lower, upper = np.moveaxis(np.array(cells, dtype=float), -1, 0)
    return SimpleNamespace(harm=Bound(value, lower, upper), dims=dims, coords={"depth": depth, "width": width})


def some_check(*rows: tuple[int, float, float, float, str], margin: float = 0.05) -> Any:
    names = ("k", "difference", "difference_lower", "difference_upper", "verdict")
    return SimpleNamespace(margin=margin, table=[dict(zip(names, row)) for row in rows])


def ladder(harm: float = 0.3, start: Any = 0) -> Chain:
    """Two states on the way, then harm, refusal or back."""
    P = [[0, 0.8, 0, 0.2], [0.2, 0, harm, 0.8 - harm], [0, 0, 0, 0], [0, 0, 0, 0]]
    return Chain(P, {"harm": 2, "refusal": 3}, start=start, states=[(-1,), (5,), "bad", "no"])


def ends(ax: Any, axis: int = 1) -> list[tuple[float, float]]:
    """Ends of all error bars, in the order in which they were drawn."""
    found = []
    for container in ax.containers:
        if hasattr(container, "has_yerr"):
            for collection in container.lines[2]:
                found += [tuple(sorted(segment[:, axis])) for segment in collection.get_segments()]
    return found


def render(ax: Any) -> bytes:
    """Draw everything; warnings (a glyph that the font lacks, a layout that collapses) are errors."""
    axes = ax.flat[0] if isinstance(ax, np.ndarray) else ax
    out = io.BytesIO()
    axes.figure.savefig(out, format="png", dpi=40)
    return out.getvalue()


def drawn_alone(draw):
    """Assert that a figure is drawn into given or new axes, and that matplotlib is left as it was."""
    import matplotlib
    from matplotlib.axes import Axes

    before = matplotlib.rcParams.copy()
    ax = draw(None)
    assert isinstance(ax, Axes)
    assert len(render(ax)) > 500
    _, mine = plot.figure((4, 3))
    assert draw(mine) is mine
    render(mine)
    assert matplotlib.rcParams.copy() == before


def texts(ax: Any) -> list[str]:
    return [t.get_text() for t in ax.texts]


def close(drawn: list[tuple[float, float]], bounds: list[Bound]) -> None:
    np.testing.assert_allclose(drawn, [(b.lower, b.upper) for b in bounds], rtol=1e-12, atol=1e-12)


def some_branch(*ends: tuple[float, float, float]) -> Any:
    value, lower, upper = np.array(ends).T
    return SimpleNamespace(k=tuple(range(len(ends))), rho=Bound(value, lower, upper))


EVERY: dict[str, Any] = {
    "branch": lambda ax: plot.branch({"a": some_branch((0.1, 0.0, 0.3), (np.nan, 0.0, 1.0))}, ax=ax),
    "depth": lambda ax: plot.depth({"a": some_profile(0.1, 0.5), "b": some_profile(0.2, 0.3)}, budget=0.1, ax=ax),
    "width": lambda ax: plot.width(some_grid([[[0.5, 0.4, 0.6], [0.2, 0.1, 0.3]]], (0,), (1, 2)), 0.3, ax=ax),
    "chain": lambda ax: plot.chain(ladder(), ax=ax),
    "categories": lambda ax: plot.categories({"x": bound(0.3), "y": bound(0.1)}, ax=ax, truth={"x": 0.2}),
    "attribution": lambda ax: plot.attribution(np.array([0.1, -0.2, 0.0]), ["a", "b", "c"], ax=ax),
    "check": lambda ax: plot.check(some_check((0, 0.0, -0.1, 0.1, "not counted"), (1, 0.2, 0.1, 0.3, "off")), ax=ax),
    "outcomes": lambda ax: plot.outcomes(
        {0: {name: bound(0.25) for name in ("harm", "refusal", "benign", "truncated")}}, ax=ax
    ),
    "strikes": lambda ax: plot.strikes({(0, 4): bound(0.1), (4, 9): bound(0.02)}, ax=ax),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_function_draws_into_given_or_new_axes_and_leaves_matplotlib_alone(name):
    import matplotlib

    before, modules = matplotlib.rcParams.copy(), set(sys.modules)  # dict() of them would itself import pyplot
    ax = EVERY[name](None)
    assert isinstance(ax, matplotlib.axes.Axes)
    assert len(render(ax)) > 500
    _, mine = plot.figure((4, 3))
    assert EVERY[name](mine) is mine
    render(mine)
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in set(sys.modules) - modules


def test_importing_the_faces_loads_no_matplotlib():
    code = "import sys, markovsafety.plot, markovsafety.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_depth_draws_exactly_the_intervals():
    a, b = some_profile(0.07, 0.52, 0.5), some_profile(0.01, 0.02, 0.2)
    ax = plot.depth({"a": a, "b": b})
    close(ends(ax), [*a.values(), *b.values()])
    assert [t for t in texts(ax) if t in "ab"] == ["a", "b"]


def test_depth_reads_profiles_grids_and_mappings_alike():
    line = some_profile(0.07, 0.52, 0.5)
    parts = np.array([[x.value, x.lower, x.upper] for x in line.values()])
    info = {"dims": ("depth",), "coords": {"depth": tuple(line)}}
    measured = Bound(*parts.T, info=info)
    grid = some_grid(np.stack([parts, parts**2], axis=1), tuple(line), (1, 2))
    turned = some_grid(np.stack([parts, parts**2], axis=0), tuple(line), (1, 2), ("width", "depth"))
    for source in (line, measured, grid, turned):
        close(ends(plot.depth(source)), list(line.values()))
    with pytest.raises(InputError, match="axis of depths"):
        plot.depth(3.0)


def test_depth_draws_truth_prediction_and_budget():
    line, truth = some_profile(0.1, 0.5), {0: 0.11, 1: 0.48}
    guess = {1: bound(0.45, 0.4, 0.6)}
    ax = plot.depth({"m": line}, {"m": truth}, {"m": guess}, budget=0.2)
    lines = [(list(x.get_xdata()), list(x.get_ydata())) for x in ax.lines]
    assert ([0, 1], [0.11, 0.48]) in lines
    assert ([1], [0.45]) in lines
    assert any(y == [0.2, 0.2] for _, y in lines)
    close(ends(ax), [*guess.values(), *line.values()])
    assert {"m", "budget 0.2"} <= set(texts(ax))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "measured, 95 % interval",
        "planted truth",
        "predicted by the chain",
    ]


def test_depth_shows_what_zero_harm_still_allows():
    line = {k: clustered(np.zeros(20), np.full(20, 5)) for k in (0, 1)}
    ax = plot.depth(line)
    assert ax.get_ylim()[1] > line[0].upper > 0.1
    render(ax)


def test_depth_leaves_out_what_is_not_finite_and_survives_nothing():
    line = {0: bound(0.1), 1: Bound(np.nan, 0.0, 1.0), 2: Bound(np.inf, 3.0, np.inf)}
    ax = plot.depth({"m": line})
    close(ends(ax), [line[0]])
    render(ax)
    render(plot.depth({}))


def test_labels_at_the_end_do_not_touch():
    ax = plot.depth({f"model {i}": some_profile(0.1, 0.5 + 0.001 * i) for i in range(8)}, budget=0.5)
    y = sorted(t.xy[1] for t in ax.texts)
    height = ax.get_ylim()[1] / (72 * ax.figure.get_figheight() * ax.get_position().height)
    assert len(y) == 9
    assert min(np.diff(y)) > 9 * height


@MODEST
@given(st.lists(st.floats(-1, 2), max_size=9), st.floats(0, 0.3))
def test_spread_keeps_order_gap_and_room(y, gap):
    place = spread(y, gap, 0.0, 1.0)
    assert len(place) == len(y)
    assert np.all((place >= -1e-12) & (place <= 1 + 1e-12))
    order = np.argsort(y, kind="stable")
    assert np.all(np.diff(place[order]) >= min(gap, 1 / max(len(y) - 1, 1)) - 1e-12)


def test_branch_draws_what_can_be_seen_and_leaves_out_the_rest():
    seen = [(0.1, 0.05, 0.2), (-0.01, -0.02, 0.03)]
    one = some_branch(*seen, (0.2, 0.0, 1.0), (np.nan, 0.0, 1.0))
    ax = plot.branch(one)
    np.testing.assert_allclose(ends(ax), [(low, high) for _, low, high in seen])
    assert ax.get_ylim()[0] < -0.02
    assert ax.get_ylim()[1] < 0.5
    both = plot.branch({"first": one, "second": some_branch((1.0, 1.0, 1.0))})
    assert {"first", "second"} <= set(texts(both))
    render(plot.branch(some_branch((np.nan, 0.0, 1.0))))


def test_width_says_value_interval_and_evidence():
    cells = [[[0.5, 0.4, 0.6], [0.25, 0.1, 0.3]], [[0.02, 0.001, 0.05], [0.3, 0.0, 1.0]]]
    ax = plot.width(some_grid(cells, (0, 20), (1, 4)), budget=0.1)
    said = texts(ax)
    assert {"0.50", "0.40 – 0.60", "0.020", "0.001 – 0.050", "no evidence"} <= set(said)
    assert "0.30" not in said
    assert [p.get_hatch() for p in ax.patches] == ["////"]
    # The only cell within the budget is (20, width 1): the border runs to its left and above it.
    border = {tuple(zip(*x.get_data())) for x in ax.lines if x.get_gid() == "budget"}
    assert border == {((0.5, -0.5), (0.5, 0.5)), ((0.5, 0.5), (1.5, 0.5))}
    colour = ax.images[0].get_array()
    assert colour[0, 1] < 0 < colour[0, 0]
    assert colour[1, 1] is np.ma.masked
    render(ax)


def test_width_reads_the_axes_by_name():
    cells = [
        [[0.5, 0.4, 0.6], [0.25, 0.1, 0.3], [0.2, 0.1, 0.3]],
        [[0.02, 0.001, 0.05], [0.3, 0.2, 0.4], [0.1, 0, 0.2]],
    ]
    turned = plot.width(some_grid(cells, (0, 5, 20), (1, 4), ("width", "depth")))
    straight = plot.width(some_grid(np.swapaxes(cells, 0, 1), (0, 5, 20), (1, 4)))
    assert [(t.get_position(), t.get_text()) for t in turned.texts] == [
        (t.get_position(), t.get_text()) for t in straight.texts
    ]


def test_width_without_budget_or_map():
    grid = some_grid([[[0.0, 0.0, 1e-9]]], (0,), (1,))
    ax = plot.width(grid)
    assert (ax.images[0].get_array() > 0).all()
    assert not [x for x in ax.lines if x.get_gid() == "budget"]
    render(ax)
    render(plot.width(grid, budget=0.0))
    render(plot.width(grid, budget=1.0))
    with pytest.raises(InputError, match="depth x width"):
        plot.width(SimpleNamespace(harm=bound(0.1), coords={"depth": (0,)}))


def test_categories_draw_exactly_the_intervals():
    rows = {"all": {"k = 0": bound(0.1), "k = 1": bound(0.5)}, "x": {"k = 1": bound(0.4)}}
    ax = plot.categories(rows, truth={"all": {"k = 1": 0.45}})
    close(ends(ax, axis=0), [rows["all"]["k = 0"], rows["all"]["k = 1"], rows["x"]["k = 1"]])
    assert [list(x.get_xdata()) for x in ax.lines if x.get_gid() == "truth"] == [[0.45, 0.45]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["all", "x"]
    render(ax)
    render(plot.categories({}))
    render(plot.categories({"never": Bound(np.nan, 0.0, 1.0)}))


def test_outcomes_stack_to_one_with_intervals_of_harm_and_refusal():
    share = {"harm": bound(0.2), "refusal": bound(0.5), "benign": bound(0.2), "truncated": bound(0.1)}
    ax = plot.outcomes({0: share})
    bars = {c.get_label(): c.patches[0] for c in ax.containers if hasattr(c, "patches")}
    assert bars["refusal"].get_y() + bars["refusal"].get_height() == pytest.approx(1, abs=1e-12)
    assert {n: b.get_facecolor()[:3] for n, b in bars.items()} == {
        n: tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for n, c in plot.OUTCOME_COLOURS.items()
    }
    harm, refusal = ends(ax)
    np.testing.assert_allclose(harm, (share["harm"].lower, share["harm"].upper))
    np.testing.assert_allclose(refusal, (1 - share["refusal"].upper, 1 - share["refusal"].lower))


def test_strikes_and_check_draw_exactly_the_intervals():
    bins = {(3, 7): bound(0.1), (0, 3): bound(0.2)}
    close(ends(plot.strikes(bins)), [bins[0, 3], bins[3, 7]])
    render(plot.strikes({}))
    rows = [(0, 0.0, -0.1, 0.1, "not counted"), (1, 0.01, -0.02, 0.04, "within"), (5, 0.2, 0.1, 0.3, "off")]
    ax = plot.check(some_check(*rows))
    np.testing.assert_allclose(sorted(ends(ax)), sorted((low, high) for _, _, low, high, _ in rows))
    render(plot.check(some_check()))
    render(plot.check(some_check((1, np.nan, -1.0, 1.0, "cannot tell"))))


def test_attribution_adds_up():
    change = np.array([0.3, -0.2, 0.05, 0.04, 0.0])
    ax = plot.attribution(change, ["a", "b", "c", "d", "e"], top=2)
    assert sum(p.get_width() for p in ax.patches) == pytest.approx(change.sum(), abs=1e-12)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "2 other states"]
    assert "+0.19" in ax.get_xlabel()
    interval = Bound(change, change - 0.01, change + 0.02)
    drawn = ends(plot.attribution(interval, top=2), axis=0)
    np.testing.assert_allclose(drawn, [(0.29, 0.32), (-0.21, -0.18)])
    render(plot.attribution(np.zeros(3)))


def random_chain(seed: int, n: int = 9, layered: bool = False, start: str = "one") -> Chain:
    """States n-3 .. n-1 are harm, refusal (leaky) and benign."""
    rng = np.random.default_rng(seed)

    def matrix() -> np.ndarray:
        P = rng.random((n, n)) * (rng.random((n, n)) < 0.5)
        P[:-3, -3:] += 0.05
        P[[-3, -1]] = 0
        P[-2] = 0 if layered else np.eye(n)[0] * 0.2 + np.eye(n)[-1] * 0.8
        total = P.sum(axis=1, keepdims=True)
        return np.divide(P, total, out=np.zeros_like(P), where=total > 0)

    law = 0 if start == "one" else np.r_[rng.dirichlet(np.ones(n - 3)), 0, 0, 0]
    outcomes = {"harm": n - 3, "refusal": n - 2, "benign": n - 1}
    if layered:
        return Chain.layered([matrix() for _ in range(6)], outcomes, start=law)
    return Chain(sp.csr_array(matrix()), outcomes, start=law)


@MODEST
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from(["one", "spread"]))
def test_folding_keeps_the_flows_and_the_outcomes(seed, top, start):
    chain = random_chain(seed, start=start)
    graph = folded(chain, top=top)
    states = [n for n in graph if not isinstance(n, str)]
    assert len(states) <= top
    harm = hitting_probability(chain, "harm")
    into = sum(at["flow"] for _, _, at in graph.in_edges("harm", data=True))
    assert into == pytest.approx(harm.at_start.value, abs=1e-9)
    for n in states:
        out = sum(at["flow"] for _, _, at in graph.out_edges(n, data=True))
        arrived = sum(at["flow"] for _, _, at in graph.in_edges(n, data=True))
        begun = chain.start[n] if "start" not in graph else 0.0
        # What is left of a state's visits are its own returns, which are no road.
        assert out == pytest.approx(arrived + begun, abs=1e-9)
        assert graph.nodes[n]["harm"].value == pytest.approx(harm.value[n], abs=1e-12)
    assert all(0 <= at["hidden"] <= 1 for _, _, at in graph.edges(data=True))


def test_folding_a_layered_chain():
    chain = random_chain(3, layered=True)
    graph = folded(chain, top=3)
    for outcome in ("harm", "truncated"):
        into = sum(at["flow"] for _, _, at in graph.in_edges(outcome, data=True))
        assert into == pytest.approx(hitting_probability(chain, outcome).at_start.value, abs=1e-9)
    render(plot.chain(chain, top=3))


def test_folding_shows_one_state_of_a_corridor():
    P = np.zeros((6, 6))
    P[0, 1] = P[1, 2] = P[2, 3] = 1
    P[3, [4, 5]] = 0.5
    graph = folded(Chain(P, {"harm": 4, "refusal": 5}, start=0))
    assert [n for n in graph if not isinstance(n, str)] == [0]
    assert graph.edges[0, "harm"] == {"flow": 0.5, "hidden": 1.0}


@pytest.mark.parametrize(
    "chain",
    [
        ladder(),
        ladder(harm=0.0),
        ladder(start=[0.5, 0.5, 0, 0]),
        ladder(start=[0, 0, 1, 0]),
        Chain([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]], {"harm": 2}, start=0),  # no outcome is ever reached
        Chain([[0, 1], [0, 0]], {"harm": 1}, start=0, states=["$x^", "終"]),
        random_chain(11, n=40, start="spread"),
    ],
    ids=["plain", "no harm", "two starts", "starts in harm", "trapped", "odd labels", "many starts"],
)
def test_any_chain_can_be_drawn(chain):
    ax = plot.chain(chain)
    render(ax)
    assert len(ax.texts) > 0


def test_chain_says_states_in_words_with_intervals():
    chain = ladder()
    ax = plot.chain(chain, words=["zero", "one", "two", "three", "four", "sure"])
    h = hitting_probability(chain, "harm").value
    assert {"(start)", "sure", "harm", "refusal", f"{h[1]:.2f}  [{h[1]:.2f}, {h[1]:.2f}]"} <= set(texts(ax))


def test_chain_without_start_or_harm_is_refused():
    with pytest.raises(InputError, match="no start law"):
        plot.chain(ladder(start=None))
    with pytest.raises(InputError, match="target"):
        plot.chain(ladder(), target="absurd")


def test_panels_keep_one_legend_and_titles():
    data = {"first $": some_profile(0.1, 0.2), "second": some_profile(0.3, 0.4), "third": some_profile(0.5, 0.6)}
    axes = plot.panels(data, lambda line, ax: plot.depth(line, ax=ax), (6, 2))
    assert axes.shape == (2, 2)
    assert [ax.get_title(loc="left") for ax in axes.flat[:3]] == [r"first \$", "second", "third"]
    assert not axes[1, 1].get_visible()
    assert all(ax.get_legend() is None for ax in axes.flat)
    assert [t.get_text() for t in axes.flat[0].figure.legends[0].get_texts()] == ["measured, 95 % interval"]
    render(axes)


def test_colours_are_stable_and_apart():
    names = [f"m{i}" for i in range(8)]
    looks = plot.palette(names)
    assert len(set(looks.values())) == 8
    assert plot.palette(names[:3]) == {n: looks[n] for n in names[:3]}


@pytest.mark.parametrize(
    ("p", "said"), [(0, "0"), (1, "1"), (0.5, "0.50"), (0.0213, "0.021"), (4e-4, "4e-4"), (1e-12, "1e-12")]
)
def test_short_numbers(p, said):
    assert short(p) == said


def test_state_labels_in_words():
    words = ["a", "b"]
    assert state_text((-1, -1), words) == "(start)"
    assert state_text((-1, -1, 1), words) == "· b"
    assert state_text((0, 1), words) == "a b"
    assert state_text((0, 1), lambda i: f"<{i}>") == "<0> <1>"
    assert state_text((3, "refusing"), None) == "3 refusing"
    assert state_text(7, words) == "7"
    assert plain("a$b\n終\x07", 32) == r"a\$b↵□□"
    assert plain("x" * 50, 10) == "x" * 9 + "…"


JUPYTER = """
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.instance()
import matplotlib.pyplot as plt
from markovsafety import plot
from markovsafety.plot.style import unshown
with unshown():
    plot.depth({0: 0.1})
assert plt.get_fignums() == []
assert plot.depth({0: 0.1}).figure.number in plt.get_fignums()
"""


def test_in_jupyter_figures_show_but_not_those_of_a_page():
    env = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", JUPYTER], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
