"""Figures of repairs: what is drawn are the numbers that were given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_plot import bound, close, drawn_alone, ends, texts

from markovsafety import InputError, plot
from markovsafety.interventions.fronts import TradeOffs
from markovsafety.interventions.pairs import Pair
from markovsafety.interventions.tilt_prediction import Tilted


def some_tilted() -> Tilted:
    """Two groups, two strengths; the second group is not trusted at strength 1."""
    rows = [
        {"group": g, "strength": a, "predicted": bound(0.1 * (i + 1) + 0.3 * a), "trusted": (g, a) != ("bio", 1.0)}
        for i, g in enumerate(("all", "bio"))
        for a in (0.5, 1.0)
    ]
    return Tilted("harm", (0.5, 1.0), ("all", "bio"), rows, np.arange(1), np.array(["bio"]), np.zeros((2, 1, 2)))


CELLS = [{"group": "bio", "strength": 1.0, "sampled": 0.4, "error": 0.05}]


def some_sifted(threshold: float = 0.1) -> Any:
    kinds = [
        (False, "task", -0.88),
        (False, "task", -0.88),
        (True, "plain", 0.88),
        (True, "jailbreak", -0.88),
        (None, "x", 0.32),
    ]
    pairs = [Pair((i,), (0,), harmful, category) for i, (harmful, category, _) in enumerate(kinds)]
    scores = np.array([s for _, _, s in kinds])
    return SimpleNamespace(pairs=pairs, scores=scores, filter=SimpleNamespace(threshold=threshold))


def some_front() -> TradeOffs:
    rows = [
        {"setting": s, "group": g, "harm": bound(h), "helpful": bound(u), "chosen": c}
        for g, shift in (("bio", 0.0), ("privacy", 0.05))
        for s, h, u, c in (("0", 0.1 + shift, 0.2, False), ("1", 0.3 + shift, 0.5, True))
    ]
    return TradeOffs(0.4, 0.05, 0.95, rows)


EVERY: dict[str, Any] = {
    "tilts": lambda ax: plot.tilts(some_tilted(), CELLS, ax, limit=0.5),
    "cosines": lambda ax: plot.cosines(some_sifted(), ax),
    "trade_offs": lambda ax: plot.trade_offs(some_front(), ax),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_function_draws_into_given_or_new_axes_and_leaves_matplotlib_alone(name):
    drawn_alone(EVERY[name])


def test_trusted_predictions_have_rings_and_their_intervals_and_samples_two_standard_errors():
    made = some_tilted()
    ax = EVERY["tilts"](None)
    trusted = [row["predicted"] for row in made.table if row["trusted"]]
    close(ends(ax), [*trusted, bound(0.4, 0.3, 0.5)])
    rings = [line for line in ax.lines if line.get_markersize() == 8 and len(line.get_xdata())]
    np.testing.assert_allclose(np.concatenate([r.get_ydata() for r in rings]), [b.value for b in trusted])
    place = {line.get_ydata()[0]: line.get_xdata()[0] for line in rings}
    assert place[trusted[0].value] == pytest.approx(-0.05)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.5", "1"]
    with pytest.raises(InputError, match="no group 'chem'"):
        plot.tilts(made, groups=["chem"])


def test_rows_are_counted_by_category_and_the_cut_is_drawn():
    ax = EVERY["cosines"](None)
    tall = {c.get_label(): {round(b.get_x(), 2): b.get_height() for b in c if b.get_height()} for c in ax.containers}
    assert tall["task, harmless"] == {-0.9: 2}
    assert tall["jailbreak"] == {-0.9: 1}
    assert tall["plain"] == {0.85: 1}
    assert tall["x, no label"] == {0.3: 1}
    stacked = next(b for c in ax.containers if c.get_label() == "jailbreak" for b in c if b.get_height())
    assert stacked.get_y() == 2
    assert ax.lines[0].get_xdata()[0] == 0.1
    assert "dropped" in texts(ax)[0]
    right = plot.cosines(some_sifted(0.95)).texts[0]
    assert right.get_ha() == "right"


def test_settings_are_joined_and_the_chosen_one_has_a_ring():
    made = some_front()
    ax = EVERY["trade_offs"](None)
    bio = made.rows("bio")
    close(ends(ax)[:2], [r["helpful"] for r in bio])
    close(ends(ax, axis=0)[2:4], [r["harm"] for r in bio])
    rings = [line for line in ax.lines if line.get_markersize() == 12]
    np.testing.assert_allclose([r.get_xydata()[0] for r in rings], [[0.3, 0.5], [0.35, 0.5]])
    assert texts(ax) == ["0", "1", "0", "1"]
    assert len(plot.trade_offs(made, groups=["privacy"]).get_legend().get_texts()) == 1
    with pytest.raises(InputError, match="no group"):
        plot.trade_offs(made, groups=["all"])


def test_of_many_settings_the_front_is_bold_and_the_others_are_faint():
    rows = [
        {"setting": f"s{i}", "group": "all", "harm": bound(i / 40), "helpful": bound(h), "front": f, "chosen": i == 9}
        for i, (h, f) in enumerate((0.1 + 0.02 * i, True) if i % 3 == 0 else (0.05, False) for i in range(30))
    ]
    ax = plot.trade_offs(TradeOffs(0.4, 0.05, 0.95, rows))
    assert texts(ax) == [f"s{i}" for i in range(0, 30, 3)]
    (path,) = [line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 10]
    np.testing.assert_allclose(path.get_xdata(), [i / 40 for i in range(0, 30, 3)])
    np.testing.assert_allclose(path.get_ydata(), [0.1 + 0.02 * i for i in range(0, 30, 3)])
    assert len(ends(ax)) == 60  # intervals of all, both ways
    alphas = {len(c.lines[2][0].get_segments()): c.lines[2][0].get_alpha() for c in ax.containers}
    assert alphas[20] < 0.2 < alphas[10]
    few = plot.trade_offs(TradeOffs(0.4, 0.05, 0.95, rows[:6]))
    assert texts(few) == [f"s{i}" for i in range(6)]
