"""Figures of the plane and of depth signatures: what is drawn are the numbers that were given."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Circle, Rectangle
from matplotlib.quiver import Quiver
from test_plot import close, ends, render

import markovsafety as ms
from markovsafety import plot
from markovsafety.chains import drift, grid

EDGES = {"harm": [-1.5, -0.5, 0.5], "refusal": [0.25]}
BINS = ms.ActivationBins(EDGES)
STATES = [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), "harm", "refusal"]


def walk() -> ms.Chain:
    """Right or left along the lower row, up in one place; (3, 0) is harm's door and (1, 1) refusal's."""
    P = np.zeros((7, 7))
    P[0, [1, 5]] = 0.75, 0.25
    P[1, [0, 2, 4]] = 0.25, 0.5, 0.25
    P[2, [1, 3]] = 0.5, 0.5
    P[3, [2, 5]] = 0.25, 0.75
    P[4, 6] = 1
    return ms.Chain(P, {"harm": 5, "refusal": 6}, start=[0.75, 0.25, 0, 0, 0, 0, 0], states=STATES)


def image(ax):
    (found,) = ax.images
    return found


def patches(ax, gid):
    return [p for p in ax.patches if p.get_gid() == gid]


def legend(ax):
    return [] if ax.get_legend() is None else [t.get_text() for t in ax.get_legend().get_texts()]


def centres(found):
    return {(int(r.get_x() + 0.5), int(r.get_y() + 0.5)) for r in found if isinstance(r, Rectangle)}


def test_the_surface_is_the_committor():
    chain = walk()
    c = ms.committor(chain, "harm", "refusal")
    ax = plot.plane(chain, c, BINS)
    render(ax)
    drawn = image(ax).get_array()
    assert np.array_equal(drawn.filled(np.nan), grid(chain, c, BINS), equal_nan=True)
    assert drawn.shape == (2, 4)
    for label, value in zip(STATES[:5], c.value):
        assert drawn[label[1], label[0]] == value
    assert image(ax).get_extent() == [-0.5, 3.5, -0.5, 1.5]
    assert image(ax).origin == "lower"
    assert ax.figure.axes[1].get_ylabel() == "P(refusal before harm)"
    assert centres(patches(ax, "no answer was here")) == {(0, 1), (2, 1), (3, 1)}
    assert "no answer was here" in legend(ax)


def test_ends_of_the_scale_have_the_colours_of_their_outcomes():
    chain = walk()
    for colours, (low, high) in {("harm", "refusal"): (0, 1), ("refusal", "harm"): (1, 0)}.items():
        drawn = image(plot.plane(chain, np.linspace(0, 1, 7), BINS, colours=colours))
        shades = [to_hex(drawn.to_rgba(x)).upper() for x in (low, high)]
        assert shades == [plot.OUTCOME_COLOURS["harm"], plot.OUTCOME_COLOURS["refusal"]]
    ax = plot.plane(chain, np.arange(7.0), BINS, limits=(1, 3))
    assert image(ax).get_clim() == (1, 3)
    assert image(ax).colorbar.extend == "both"
    render(ax)


def test_borders_carry_the_edges_and_bins_without_edges_their_numbers():
    chain = walk()
    ax = plot.plane(chain, np.zeros(7), EDGES)
    assert ax.get_xticks().tolist() == [0.5, 1.5, 2.5]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["−1.5", "−0.5", "0.5"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.25"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("harmfulness (projection)", "refusal (projection)")
    bare = plot.plane(chain, np.zeros(7))
    assert [t.get_text() for t in bare.get_xticklabels()] == ["0", "1", "2", "3"]
    assert bare.get_xlabel() == "bin of harmfulness"
    many = ms.ActivationBins({"a": np.arange(40) * 1e-7, "b": [1e6]})
    far = plot.plane(chain, np.zeros(7), many)
    assert far.get_xlabel() == "a (projection)"
    assert len(far.get_xticks()) <= 9
    render(far)


def test_discs_are_probabilities_of_passing_and_starting_by_area():
    chain = walk()
    ax = plot.plane(chain, np.zeros(7), BINS)
    passed = {p.get_center(): p.get_radius() for p in patches(ax, "passes here (by area)") if isinstance(p, Circle)}
    started = {p.get_center(): p.get_radius() for p in patches(ax, "starts here") if isinstance(p, Circle)}
    whole = {at: r**2 / 0.4**2 for at, r in passed.items()}
    # (0, 0) and (1, 0): from (0, 0) with 3/4 to (1, 0), so 1/4 + 3/4 * 3/4; and back to (0, 0) with u from (1, 0),
    # u = 1/4 + 1/2 v, v = u / 2 + 1/2 * 1/4 v.
    v = 0.125 / (1 - 0.125 - 0.25)
    assert whole[(1, 0)] == pytest.approx(0.25 + 0.75 * 0.75, abs=1e-12)
    assert whole[(0, 0)] == pytest.approx(0.75 + 0.25 * (0.25 + v / 2), abs=1e-12)
    assert {at: r**2 / 0.4**2 for at, r in started.items()} == pytest.approx({(0, 0): 0.75, (1, 0): 0.25})
    assert len(passed) == 5
    assert not patches(plot.plane(chain, np.zeros(7), BINS, visits=False), "passes here (by area)")
    nowhere = ms.Chain(chain.P, chain.outcomes, states=STATES)
    assert not patches(plot.plane(nowhere, np.zeros(7), BINS), "passes here (by area)")


def arrows(ax):
    found = [c for c in ax.collections if isinstance(c, Quiver)]
    return found[0] if found else None


def test_arrows_are_the_mean_steps():
    chain = walk()
    ax = plot.plane(chain, np.zeros(7), BINS, arrows=True)
    render(ax)
    drawn, steps = arrows(ax), drift(chain, BINS)
    assert drawn is not None
    want = {(x, y): steps[:, y, x] for x, y in STATES[:4] if np.hypot(*steps[:, y, x]) > 0}
    assert len(want) == 3  # (2, 0) goes left and right alike
    got = {(x, y): (u, v) for x, y, u, v in zip(drawn.X, drawn.Y, drawn.U, drawn.V)}
    assert got.keys() == want.keys()
    for at, step in want.items():
        assert got[at] == pytest.approx(tuple(step))
    assert drawn.scale == pytest.approx(1 / 0.9)  # the longest, from (0, 0), is one cell
    assert "mean step, shortened 1.1 times" in legend(ax)
    assert arrows(plot.plane(chain, np.zeros(7), BINS)) is None
    P = np.diag([0.5, 0.5, 0.0])
    P[[0, 1], 2] = 0.5
    still = ms.Chain(P, {"harm": 2}, start=0, states=[(0, 0), (1, 0), "harm"])
    assert arrows(plot.plane(still, np.zeros(3), arrows=True)) is None


def test_wide_intervals_are_pale_dotted_and_without_arrows():
    chain = walk()
    upper = np.array([0.1, 0.9, 0.2, 0.3, 0.6, 1, 1])
    values = ms.Bound(np.minimum(0.2, upper), np.zeros(7), upper, info={"name": "P(x)"})
    ax = plot.plane(chain, values, BINS, arrows=True)
    render(ax)
    assert centres(patches(ax, "interval wider than 0.5")) == {(1, 0), (1, 1)}
    strength = np.asarray(image(ax).get_alpha())
    assert strength[[0, 1], [1, 1]].max() < 0.5
    assert strength[0, [0, 2, 3]].tolist() == [1, 1, 1]
    assert {(x, y) for x, y in zip(arrows(ax).X, arrows(ax).Y)} == {(0, 0), (3, 0)}
    assert not patches(plot.plane(chain, values, BINS, wide=0.95), "interval wider than 0.95")
    both = plot.panels({"a": values, "b": np.zeros(7)}, lambda v, ax: plot.plane(chain, v, BINS, ax, bar=False), (7, 3))
    render(both)
    told = {t.get_text() for t in both[0, 0].figure.legends[0].get_texts()}
    assert told == {"interval wider than 0.5", "no answer was here", "passes here (by area)", "starts here"}


def test_one_category_of_a_product():
    chain = walk()
    states = [("bio", s) if isinstance(s, tuple) else s for s in STATES]
    states[4] = ("chem", (1, 0))
    named = ms.Chain(chain.P, chain.outcomes, chain.start, states)
    ax = plot.plane(named, np.arange(7.0), BINS, cell=lambda s: s[1] if s[0] == "bio" else None, bar=False)
    assert image(ax).get_array()[0].tolist() == [0, 1, 2, 3]
    assert image(ax).get_array().mask[1].all()
    assert len(ax.figure.axes) == 1
    render(ax)


def test_values_that_are_not_finite_are_drawn_without_a_warning():
    chain = walk()
    for values in (np.full(7, np.nan), np.full(7, np.inf), ms.hitting_time(chain, "harm")):
        ax = plot.plane(chain, values, BINS)
        render(ax)
        assert centres(patches(ax, "no answer was here")) == {(0, 1), (2, 1), (3, 1)}


def test_bad_input_is_refused():
    chain = walk()
    for bad, more, says in (
        (np.zeros(7), {"limits": (1, 1)}, "limits"),
        (np.zeros(6), {}, "shape"),
        (np.zeros(7), {"edges": {"harm": [0.5], "refusal": [0.5]}}, "edges make 2 x 2"),
    ):
        with pytest.raises(ms.InputError, match=says):
            plot.plane(chain, bad, **more)


SIGNATURES = {"prompt only": [0.94, 0.0, 0.0], "every step": [0.94, 0.99, 0.1]}


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def test_signatures_are_drawn_with_their_intervals():
    lower = {name: np.array(d) / 2 for name, d in SIGNATURES.items()}
    upper = {name: (1 + np.array(d)) / 2 for name, d in SIGNATURES.items()}
    ax = plot.depth_signature(SIGNATURES, lower, upper)
    render(ax)
    flat = [d for one in SIGNATURES.values() for d in one]
    assert heights(ax) == flat
    bounds = [ms.Bound(d, d / 2, (1 + d) / 2) for d in flat]
    close(ends(ax), bounds)
    assert legend(ax) == list(SIGNATURES)
    assert ax.get_xticks().tolist() == [0, 1, 2]
    same = plot.depth_signature({n: ms.Bound(d, lower[n], upper[n]) for n, d in SIGNATURES.items()})
    close(ends(same), bounds)
    by_depth = {n: {2 * k: b for k, b in enumerate(bounds[3 * i : 3 * i + 3])} for i, n in enumerate(SIGNATURES)}
    rare = plot.depth_signature(by_depth)
    close(ends(rare), bounds)
    assert rare.get_xticks().tolist() == [0, 2, 4]


def test_one_signature_needs_no_name():
    ax = plot.depth_signature([0.9, np.nan, 0.1], depths=[0, 5, 20])
    render(ax)
    assert ax.get_xticks().tolist() == [0, 5, 20]
    assert legend(ax) == []
    assert ends(ax) == [(0.9, 0.9), (0.1, 0.1)]
    with pytest.raises(ms.InputError, match="for 2 depths"):
        plot.depth_signature([0.9, 0.1, 0.2], depths=[0, 1])
    with pytest.raises(ms.InputError, match="One end"):
        plot.depth_signature([0.9], lower=[0.8])
    with pytest.raises(ms.InputError, match="shapes"):
        plot.depth_signature([0.9], lower=[0.8, 0.1], upper=[1, 1])


@pytest.mark.parametrize(
    "draw",
    [lambda ax: plot.plane(walk(), np.zeros(7), BINS, ax, arrows=True), lambda ax: plot.depth_signature([0.1], ax=ax)],
)
def test_figures_use_given_axes_and_leave_matplotlib_alone(draw):
    import matplotlib

    before = matplotlib.rcParams.copy()
    _, mine = plot.figure((4, 3))
    assert draw(mine) is mine
    assert isinstance(draw(None), Axes)
    render(mine)
    assert matplotlib.rcParams.copy() == before
