"""Figures of what is inside a model: what is drawn are the numbers that were given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_plot import bound, close, drawn_alone, ends, texts

from markovsafety import InputError, plot
from markovsafety.interventions import Beliefs, Buckets, Detection
from markovsafety.interventions.separation import auc, curve


def some_buckets() -> Buckets:
    """Two prompts in the first bucket, one in each other, one undecided."""
    return Buckets(("a", "b", "c", "d", "e", "f"), [1, 1, 1, 0, 0, 1], np.array([0.9, 0.8, 0.1, 0.9, 0.1, 0.5]))


def some_beliefs(n: int = 6) -> Beliefs:
    levels = np.zeros((n, 2))
    return Beliefs(tuple("abcdef"[:n]), np.arange(n) / 10, -np.arange(n) / 10, levels, levels)


def some_categories() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    y = rng.normal(size=9)
    made = {"one": rng.normal(2, 1, 8), "two": rng.normal(0, 1, 7)}
    return {name: {"auc": auc(x, y), "curve": curve(x, y)} for name, x in made.items()}


def some_rows(over: bool = True) -> list[dict[str, Any]]:
    keys = ("harm", "refusal", "control_harm", "control_refusal", "over_refusal")
    rows = [{"alpha": a} | {k: bound((i + 1) / 10 + n / 50) for n, k in enumerate(keys)} for i, a in enumerate((-2, 0))]
    return rows if over else [{**r, "over_refusal": None} for r in rows]


def some_separation() -> list[dict[str, Any]]:
    return [
        {"position": p, "level": k, "mismatch": bound(v)}
        for p, vs in (("t_inst", (0.9, 0.8)), ("t_post", (0.1, 0.05, 0.0)))
        for k, v in enumerate(vs)
    ]


def some_detection(scales: tuple[float, ...] = (0.1, 1.0)) -> Detection:
    kinds = [tuple(bound(x) for x in xs) for xs in ((0.6, 0.9), (0.2, 0.8), (0.3, 0.7))]
    return Detection(scales, *kinds, bound(0.02), None)


EVERY: dict[str, Any] = {
    "beliefs": lambda ax: plot.beliefs(some_beliefs(), some_buckets(), ax),
    "separated": lambda ax: plot.separated(some_separation(), ax),
    "roc": lambda ax: plot.roc(some_categories(), ax, threshold=0.5),
    "predicted": lambda ax: plot.predicted({"a": bound(0.1), "b": 0.4}, {"b": bound(0.5), "a": bound(0.2)}, ax),
    "compared": lambda ax: plot.compared({"x": {"harm": bound(0.3)}, "y": {"harm": 0.1, "other": bound(0.2)}}, ax),
    "detected": lambda ax: plot.detected(some_detection(), ax),
    "head_map": lambda ax: plot.head_map([[0.1, np.nan], [0.9, -0.2]], ax, chosen=[(1, 0)]),
    "alphas": lambda ax: plot.alphas(some_rows(), ax),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_function_draws_into_given_or_new_axes_and_leaves_matplotlib_alone(name):
    drawn_alone(EVERY[name])


def test_beliefs_are_drawn_by_bucket():
    ax = EVERY["beliefs"](None)
    lines = {line.get_label(): line for line in ax.lines}
    assert [k for k in lines if "harm" in k] == [
        "refused harmful (2)",
        "accepted harmful (1)",
        "refused harmless (1)",
        "accepted harmless (1)",
    ]
    np.testing.assert_allclose(lines["refused harmful (2)"].get_xydata(), [[0, 0], [0.1, -0.1]])
    assert lines["accepted harmless (1)"].get_markerfacecolor() == "none"
    with pytest.raises(InputError, match="5 beliefs stand beside 6"):
        plot.beliefs(some_beliefs(5), some_buckets())


def test_levels_are_drawn_with_their_intervals():
    close(ends(EVERY["separated"](None)), [r["mismatch"] for r in some_separation()])
    whole = plot.separated(SimpleNamespace(rows=some_separation()))
    close(ends(whole), [r["mismatch"] for r in some_separation()])


def test_curves_of_a_guard_pass_their_threshold():
    made = some_categories()
    ax = plot.roc(made, threshold=0.5)
    assert [t.get_text().split(":")[0] for t in ax.get_legend().get_texts()] == ["one", "two"]
    drawn = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    marks = [line for line in ax.lines if len(line.get_xdata()) == 1]
    rng = np.random.default_rng(0)
    y = rng.normal(size=9)
    for shift, line, mark, x in zip((-0.0025, 0.0025), drawn, marks, (rng.normal(2, 1, 8), rng.normal(0, 1, 7))):
        assert line.get_ydata()[0] + shift == pytest.approx(0.0)
        assert line.get_ydata()[-1] + shift == pytest.approx(1.0)
        # between two scores the shares above do not change, so those above the mark are those above 0.5
        here = float(mark.get_xdata()[0]) - shift, float(mark.get_ydata()[0]) + shift
        assert here[0] == pytest.approx((y > 0.5).mean(), abs=1 / 9 + 1e-9)
        assert here[1] == pytest.approx((x > 0.5).mean(), abs=1 / 7 + 1e-9)
    assert len([line for line in plot.roc(made).lines if len(line.get_xdata()) == 1]) == 0
    told = SimpleNamespace(threshold=0.5, categories=made)
    assert len([line for line in plot.roc(told).lines if len(line.get_xdata()) == 1]) == 2


def test_predictions_stand_at_their_samples():
    a, b = bound(0.1), bound(0.2)
    ax = plot.predicted({"one": a}, {"one": b})
    close(ends(ax)[:1], [b])
    close(ends(ax, axis=0)[1:], [a])
    with pytest.raises(InputError, match="other names"):
        plot.predicted({"one": a}, {"two": b})


def test_rows_are_compared_in_their_order_and_outcomes_have_their_colours():
    ax = EVERY["compared"](None)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "y"]
    close(ends(ax, axis=0)[:1], [bound(0.3)])
    colours = {c.get_label(): c.lines[0].get_color() for c in ax.containers}
    assert colours["harm"] == plot.OUTCOME_COLOURS["harm"]
    assert colours["other"] not in plot.OUTCOME_COLOURS.values()


def test_what_a_monitor_sees_is_drawn_at_its_sizes():
    found = some_detection()
    ax = plot.detected(found)
    close(ends(ax), [*found.auc, *found.caught, *found.control])
    assert ax.get_xscale() == "log"
    assert plot.detected(some_detection((0.0, 1.0))).get_xscale() == "linear"  # no edit has no logarithm


def test_heads_have_their_numbers_and_the_chosen_their_frame():
    ax = EVERY["head_map"](None)
    assert sorted(texts(ax)) == ["-0.20", "0.10", "0.90"]
    (frame,) = [p for p in ax.patches if p.get_gid() == "chosen"]
    assert (round(frame.get_x() + 0.48), round(frame.get_y() + 0.48)) == (0, 1)  # head to the right, layer up
    (blank,) = [p for p in ax.patches if p.get_gid() == "no direction"]
    assert (blank.get_x(), blank.get_y()) == (0.5, -0.5)
    with pytest.raises(InputError, match="shape"):
        plot.head_map([0.1, 0.2])


def test_the_path_has_its_price_where_it_was_measured():
    rows = some_rows()
    ax = plot.alphas(rows)
    keys = ("harm", "control_harm", "refusal", "control_refusal", "over_refusal")
    close(ends(ax), [r[k] for k in keys for r in rows])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["−2", "0"]
    assert len(ends(plot.alphas(some_rows(over=False)))) == 8
    close(
        ends(plot.alphas(SimpleNamespace(rows=lambda: rows), shown=["harm"])),
        [r[k] for k in (keys[0], keys[1], keys[4]) for r in rows],
    )
