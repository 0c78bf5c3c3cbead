"""Figures of grids: what is drawn are the numbers of the grid, in any shape a sweep can have."""

from __future__ import annotations

import numpy as np
import pytest
from test_plot import ends, render, texts
from test_sweep import steep

import markovsafety as ms
from markovsafety import plot
from markovsafety.depth import AttackLaw, Checkpoint, Profile

STEEP = Profile(0.8, 0.2, 0.0, 0.3)
FORM = Profile(0.08, 0.02, 0.01, 0.3)
TABLE = {
    8: {0: ms.Bound(0.7, 0.6, 0.8), 20: "diverged"},
    16: {0: ms.Bound(0.8, 0.7, 0.9), 20: ms.Bound(0.1, 0.05, 0.2)},
}


def surface(**options):
    return ms.sweep(STEEP, depth=range(41), width=range(1, 65), **options)


EVERY = {
    "contour": lambda ax: plot.contour(surface(), [1e-2, 1e-6], ax),
    "lines": lambda ax: plot.lines(ms.sweep(FORM, depth=range(9), correlation=[0, 0.3]), ax=ax),
    "pareto": lambda ax: plot.pareto(surface().pareto({"depth": 1, "width": 3}, harm=1e-6), ax=ax),
    "capacity": lambda ax: plot.capacity(ms.sweep(TABLE), ax=ax),
    "traces": lambda ax: plot.traces({"a": [1, 0.5, 0.25], "b": (np.array([1, 10]), np.array([0.3, 0.1]))}, ax=ax),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_function_draws_into_given_or_new_axes_and_leaves_matplotlib_alone(name):
    import matplotlib

    before = matplotlib.rcParams.copy()
    ax = EVERY[name](None)
    assert isinstance(ax, matplotlib.axes.Axes)
    assert len(render(ax)) > 500
    _, mine = plot.figure((4, 3))
    assert EVERY[name](mine) is mine
    render(mine)
    assert matplotlib.rcParams.copy() == before


def line_of(ax, text):
    """The points of the contour with this label."""
    drawn = [c for c in ax.collections if c.get_gid() == "budget"]
    found = [c for c in drawn if text in [t.get_text() for t in c.labelTexts]]
    return np.concatenate([p.vertices for p in found[0].get_paths()])


def test_budget_lines_are_the_hyperbola():
    """m (d + d0) = ln(1 / eps) / ln(1 / c), where the line crosses whole depths and runs between widths in log harm."""
    ax = plot.contour(surface(), [1e-4, 1e-6])
    render(ax)
    d0 = np.log(1 / 0.8) / np.log(1 / 0.7)
    for eps, text in ((1e-4, r"$10^{-4}$"), (1e-6, r"$10^{-6}$")):
        x, m = line_of(ax, text).T
        whole = np.isclose(x, np.round(x)) & (m > 1)
        assert whole.sum() > 8
        # Along widths log harm is linear, so these points are exact.
        assert m[whole] * (x[whole] + d0) == pytest.approx(np.log(1 / eps) / np.log(1 / 0.7), rel=1e-6)


def test_dots_are_the_least_widths():
    grid = surface()
    ax = plot.contour(grid, 1e-6)
    dots = [line for line in ax.lines if line.get_label() == "least width that suffices"]
    needed = grid.needed(harm=1e-6).width
    want = [(d, m) for d, m in enumerate(needed) if m is not None and m > 1]
    assert list(zip(*(a.tolist() for a in dots[0].get_data()))) == want
    assert ax.get_yscale() == "log"
    assert plot.contour(ms.sweep(STEEP, depth=range(9), width=range(1, 9))).get_yscale() == "linear"


def test_contour_shows_the_cheapest_cell_and_what_costs_as_much():
    grid = surface()
    ax = plot.contour(grid, 1e-6, cheapest=grid.pareto({"depth": 1, "width": 3}, harm=1e-6))
    assert "depth 10, width 4\ncost 22" in texts(ax)
    iso = ax.lines[-2].get_xydata()
    assert iso[:, 0] + 3 * iso[:, 1] == pytest.approx(22)
    render(ax)


def test_contour_of_evidence_and_gaps():
    ax = plot.contour(ms.sweep(steep(), width=[1, 2, 4]), [0.1, 0.3, 0.0])
    render(ax)
    assert ax.get_xlabel().startswith("tokens already spoken")
    gap = {k: ms.Bound(0.1 / (k + 1), 0.0, 0.5) for k in (0, 1, 2)}
    grid = ms.sweep({8: {0: gap[0], 4: gap[1], 9: gap[2]}, 16: {0: gap[0]}}, width=[1, 2, 4])
    render(plot.contour(grid.at(capacity=16), 0.1, side="value"))
    with pytest.raises(ms.InputError, match="no surface"):
        plot.contour(ms.sweep(FORM, depth=[1, 2]))
    with pytest.raises(ms.InputError, match="side"):
        plot.contour(surface(), side="left")
    zero = ms.sweep(Profile(0.0, 0.5, 0.0, 0.5), depth=range(3), width=[1, 2])
    render(plot.contour(zero, 0.1))
    sure = ms.sweep(Profile(1.0, 0.0, 1.0, 0.0), depth=range(3), width=[1, 2])
    render(plot.contour(sure, 0.1))


def test_panels_of_contours_share_their_axis():
    grid = surface(correlation=[0, 0.3])
    axes = plot.panels(
        {f"correlation {c:g}": grid.at(correlation=c) for c in (0, 0.3)},
        lambda one, ax: plot.contour(one, 1e-4, ax, bar=False),
        (7.0, 3.0),
        sharey=True,
    )
    render(axes)
    assert [ax.get_title(loc="left") for ax in axes.flat] == ["correlation 0", "correlation 0.3"]


def drawn(ax):
    return {tuple(line.get_ydata()) for line in ax.lines}


def test_lines_are_the_columns_of_the_grid():
    grid = ms.sweep(FORM, depth=range(6), width=[1, 2], correlation=[0, 0.3])
    ax = plot.lines(grid, by="correlation")
    for c in range(2):
        assert tuple(grid.harm.value[:, 0, c]) in drawn(ax)
    assert {"correlation 0", "correlation 0.3"} <= set(texts(ax))
    ax = plot.lines(grid, over="width", by="depth", log=False)
    assert tuple(grid.harm.value[3, :, 0]) in drawn(ax)
    assert ax.get_xlabel() == "ensemble width"
    deep = ms.sweep(STEEP, depth=range(30))
    assert plot.lines(deep).get_yscale() == "log"
    assert plot.lines(deep, log=False).get_yscale() == "linear"
    attacked = ms.sweep(FORM, depth=[0, 5, 9], attack=[AttackLaw.fixed(k) for k in range(12)])
    ax = plot.lines(attacked, over="attack", budget=0.1)
    assert ax.lines[0].get_xdata().tolist() == list(range(12))
    assert ax.get_xlabel() == "tokens already spoken (forced)"
    # All three end at the same harm: a key says which is which, names at the ends could not.
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["depth 0", "depth 5", "depth 9"]
    mixed = ms.sweep(FORM, depth=[0, 5], attack=[AttackLaw.geometric(p) for p in (0.1, 0.5)])
    assert plot.lines(mixed, over="attack").get_xlabel() == "mean number of forced tokens"
    for bad in ({"over": "colour"}, {"by": "depth"}, {"by": "colour"}):
        with pytest.raises(ms.InputError, match="no lines over"):
            plot.lines(grid, **bad)


def test_lines_ring_the_best_place_of_a_checkpoint():
    grid = ms.sweep(Checkpoint(0.08, 0.02, 0.95), depth=range(1, 41), attack=[{0: 1}, AttackLaw.geometric(0.2)])
    ax = plot.lines(grid, best=True)
    rings = [line for line in ax.lines if len(line.get_xdata()) == 1]
    assert [r.get_xdata()[0] for r in rings] == [6]  # unattacked the best is the first depth: no inner optimum


def test_lines_of_evidence_have_bars_that_end_at_the_bounds():
    grid = ms.sweep(steep(), width=[1, 3])
    ax = plot.lines(grid, log=False)
    want = [(grid.harm.lower[i, j], grid.harm.upper[i, j]) for j in range(2) for i in range(3)]
    np.testing.assert_allclose(ends(ax), want, atol=1e-12)
    wide = Profile(0.08, 0.02, 0.01, 0.3, {"a1": (0.005, 0.02)}, level=0.9)
    render(plot.lines(ms.sweep(wide, depth=range(60))))
    render(plot.lines(ms.sweep(TABLE, capacity=[8, 16, 32]), over="capacity", budget=0.3))


def test_pareto_draws_the_front():
    one = surface().pareto({"depth": 1, "width": 3}, harm=1e-6)
    ax = plot.pareto(one)
    shown = one.front.harm >= 1e-10
    assert tuple(one.front.harm[shown]) in drawn(ax)
    assert "depth 10, width 4: cost 22" in texts(ax)
    assert "budget 1e-06" in texts(ax)
    two = surface().pareto({"depth": 1, "width": 3}, benign=0.02)
    ax = plot.pareto(two)
    offsets = ax.collections[0].get_offsets()
    kept = two.front.harm >= 1e-12
    assert np.asarray(offsets)[:, 0].tolist() == two.front.cost[kept].tolist()
    render(ax)
    render(plot.pareto({"plain": one, "priced": two}))


def test_capacity_draws_intervals_bounds_and_gaps():
    grid = ms.sweep(TABLE)
    ax = plot.capacity(grid, {(8, 0): (0.5, 0.9), 16: 0.95}, budget=0.15)
    np.testing.assert_allclose(ends(ax)[:3], [(0.6, 0.8), (0.7, 0.9), (0.05, 0.2)], atol=1e-12)
    bars = [p for p in ax.patches if p.get_gid() != "untrained"]
    spans = sorted((round(p.get_y(), 9), round(p.get_y() + p.get_height(), 9)) for p in bars)
    assert spans == [(0.0, 0.95), (0.0, 0.95), (0.5, 0.9)]
    assert len([p for p in ax.patches if p.get_gid() == "untrained"]) == 1
    names = [t.get_text() for t in ax.get_legend().get_texts()]
    assert names == ["depth 0", "depth 20", "perturbation bound", "not trained"]
    assert "budget 0.15" in texts(ax)
    render(ax)
    render(plot.capacity(grid, ms.Bound(np.full((2, 2), 0.5), np.zeros((2, 2)), np.ones((2, 2)))))
    render(plot.capacity(ms.sweep({"tiny": steep(), "small $x$": None}), np.full((3, 2), 0.9)))
    with pytest.raises(ms.InputError, match=r"shape \(3,\)"):
        plot.capacity(grid, [0.1, 0.2, 0.3])
    with pytest.raises(ms.InputError, match="no capacity axis"):
        plot.capacity(surface())


def test_equal_figures_are_equal_files(tmp_path):
    for kind in ("png", "pdf", "svg"):
        paths = [tmp_path / "new" / f"{i}.{kind}" for i in range(2)]
        for path in paths:
            assert plot.save(EVERY["lines"](None), path) == str(path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(ms.InputError, match="no kind of figure"):
        plot.save(EVERY["lines"](None), tmp_path / "x.gif")


def test_what_lies_under_a_logarithmic_axis_is_an_open_marker_at_its_foot():
    table = {0: {0: ms.Bound(0.5, 0.4, 0.6)}, 1: {0: ms.Bound(0.0, 0.0, 0.1), 4: ms.Bound(1e-3, 0.0, 0.02)}}
    grid = ms.sweep({"a": table[0] | {4: ms.Bound(0.2, 0.1, 0.3)}, "b": table[1]})
    ax = plot.lines(grid, over="depth", by="capacity", log=True)
    render(ax)
    under = [c.lines[0] for c in ax.containers if c.lines[0].get_gid() == "under"]
    assert [(line.get_ydata().tolist(), line.get_markerfacecolor()) for line in under] == [([1e-3], "#FFFFFF")]
    assert ax.get_ylim()[0] == pytest.approx(1e-3)
    assert any("below the axis" in t for t in texts(ax))
    assert not any("below the axis" in t for t in texts(plot.lines(grid, over="depth", by="capacity", log=False)))


def test_the_step_of_a_front_falls_on_beyond_the_least_harm_shown():
    """The line leaves through the bottom where less harm can be had; it does not run on flat."""
    found = surface().pareto({"depth": 1, "width": 3}, harm=1e-6, benign=0.02, over=0.1)
    ax = plot.pareto(found)
    cost, harm = (np.asarray(a) for a in ax.lines[0].get_data())
    assert (np.diff(cost) >= 0).all()
    assert (np.diff(harm) < 0).all()
    assert harm[-1] < 1e-10 <= harm[-2]


@pytest.mark.parametrize(
    ("source", "says"),
    [(FORM, "trained depth (aligned tokens)"), (Checkpoint(0.08, 0.02), "position of the checkpoint")],
)
def test_the_depth_axis_says_what_it_counts(source, says):
    grid = ms.sweep(source, depth=range(1, 9), width=[1, 2])
    for ax in (plot.lines(grid), plot.contour(grid), plot.width(grid), plot.depth(grid), plot.depth({"a": grid})):
        assert ax.get_xlabel() == says
