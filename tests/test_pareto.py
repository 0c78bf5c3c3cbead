"""pareto: fronts against brute force, the hyperbola's golden optimum, and prices that cannot be paid."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import steep

import markovsafety as ms
from markovsafety.depth import AttackLaw, Profile, over_refusal, pareto

quick = settings(deadline=None, derandomize=True, max_examples=40)
STEEP = Profile(0.8, 0.2, 0.0, 0.3)  # harm 0.8 * 0.7^d: no floor


def dominated(rows):
    """Row by row: is there another that is nowhere worse, and somewhere better? What rounding broke is a tie."""
    return [any((o <= r * (1 + 1e-12)).all() and (o < r * (1 - 1e-12)).any() for o in rows) for r in rows]


def written(row):
    return tuple(f"{x:.9e}" for x in row)


@quick
@given(
    st.floats(0.01, 5),
    st.one_of(st.just(0.0), st.floats(0.01, 5)),
    st.one_of(st.none(), st.floats(0.001, 0.5)),
    st.sampled_from([0.0, 0.1]),
    st.integers(2, 8),
    st.integers(2, 6),
)
def test_front_is_what_nothing_dominates(price_d, price_m, benign, rho, depths, widths):
    p = Profile(0.08, 0.02, 0.01, 0.3)
    grid = ms.sweep(p, depth=range(depths), width=range(1, widths + 1), correlation=[rho])
    found = grid.pareto({"depth": price_d, "width": price_m}, benign=benign)
    d, m = np.meshgrid(range(depths), range(1, widths + 1), indexing="ij")
    columns = [price_d * d + price_m * m, grid.harm.value[..., 0]]
    if benign is not None:
        columns.append(over_refusal(benign, m))
    rows = np.array([np.asarray(c).ravel() for c in columns]).T
    best = {written(r) for r, bad in zip(rows, dominated(rows)) if not bad}
    front = found.front
    mine = [front.cost, front.harm] + ([] if benign is None else [front.over_refusal])
    assert {written(r) for r in np.array(mine).T} == best
    assert (np.diff(front.cost) >= 0).all()
    for i in range(len(front)):
        cell = front[i]
        at = cell["depth"], cell["width"] - 1
        assert cell["harm"] == grid.harm.value[(*at, 0)]
        assert cell["cost"] == pytest.approx(columns[0][at])


def test_golden_optimum_of_the_hyperbola():
    """m (d + d0) = ln(1 / eps) / ln(1 / c); at prices 1 and 3 the real optimum is (10.15, 3.59), the whole cost 22."""
    grid = ms.sweep(STEEP, depth=range(45), width=range(1, 65))
    assert [grid.needed(harm=1e-6).width[d] for d in (0, 1, 2, 5, 10, 20, 40)] == [62, 24, 15, 7, 4, 2, 1]
    found = grid.pareto({"depth": 1, "width": 3}, harm=1e-6)
    assert found.best["cost"] == 22
    assert (found.best["depth"], found.best["width"]) == (10, 4)  # (13, 3) costs the same, with more harm
    assert grid.harm.value[13, 2] <= 1e-6
    assert grid.harm.value[13, 2] > found.best["harm"]
    big = math.log(1e6) / math.log(1 / 0.7)
    assert math.sqrt(big / 3) == pytest.approx(3.59, abs=5e-3)
    assert math.sqrt(3 * big) - math.log(1 / 0.8) / math.log(1 / 0.7) == pytest.approx(10.15, abs=5e-3)
    assert "cheapest depth 10, width 4: cost 22, harm 2.6" in str(found)
    by_hand = grid.pareto(lambda depth, width: depth + 3 * width, harm=1e-6)
    assert by_hand.best == found.best
    assert by_hand.prices is None
    assert pareto(grid, cost={"depth": 1, "width": 3}, harm=1e-6).best == found.best


def test_over_refusal_is_a_second_price():
    grid = ms.sweep(STEEP, depth=range(45), width=range(1, 65))
    found = grid.pareto({"depth": 1, "width": 3}, harm=1e-6, benign=0.02, over=0.05)
    assert (found.best["depth"], found.best["width"]) == (19, 2)
    assert found.best["over_refusal"] == pytest.approx(1 - 0.98**2)
    none = grid.pareto({"depth": 1}, harm=1e-6, benign=0.02, over=0.01)
    assert none.best is None
    assert not none.possible
    assert "costs an over-refusal of 0.02 or more, its budget is 0.01" in none.reasons.item()
    rule = ms.sweep(STEEP, depth=[5], width=[3, 9], rule="2-refusals").pareto({"width": 1}, benign=0.02)
    assert rule.front.over_refusal[-1] == pytest.approx(over_refusal(0.02, 9, "2-refusals"))
    json.dumps([found.to_json(), none.to_json()], allow_nan=False)


def test_each_circumstance_has_its_front():
    attacks = [AttackLaw.fixed(0), AttackLaw.fixed(3)]
    grid = ms.sweep(STEEP, depth=range(20), width=[1, 2], correlation=[0, 1], attack=attacks)
    found = grid.pareto({"depth": 1, "width": 100}, harm=0.1)
    assert found.dims == ("correlation", "attack")
    assert found.fronts.shape == (2, 2)
    assert [x["depth"] for x in found.cheapest.flat] == [6, 9, 6, 9]
    assert str(found).count("\n") == 3
    assert "correlation 1.0, attack 3 forced: cheapest depth 9" in str(found)


def test_forced_tokens_are_not_for_sale():
    grid = ms.sweep(steep(), width=[1, 2, 4])
    with pytest.raises(ms.InputError, match="the attacker chooses it"):
        grid.pareto({"depth": 1})
    found = grid.pareto({"width": 1}, harm=0.35)
    assert found.dims == ("depth",)
    assert [x and x["width"] for x in found.cheapest] == [1, 1, None]
    assert "impossible: the smallest harm (upper end)" in found.reasons[2]
    assert found.reasons[0] == ""


def test_untrained_models_are_on_no_front():
    small, large = Profile(0.08, 0.02, 0.05, 0.3), Profile(0.08, 0.02, 0.001, 0.3)
    grid = ms.sweep({8: small, 16: None, 64: large}, depth=range(9))
    found = grid.pareto({"capacity": 1, "depth": 2}, harm=0.2)
    assert 16 not in found.front.at["capacity"].tolist()
    assert found.best["capacity"] == 8
    assert grid.pareto({"capacity": 1, "depth": 2}, harm=0.1).best["capacity"] == 64
    gone = (
        ms.sweep({8: {0: "lost", 4: "lost"}, 16: {0: ms.Bound(0.2, 0.1, 0.3)}})
        .at(capacity=8)
        .pareto({"depth": 1}, harm=1)
    )
    assert gone.best is None
    assert "nothing was trained" in gone.reasons.item()
    assert len(gone.front) == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"cost": {}}, "empty"),
        ({"cost": 3}, "prices axes"),
        ({"cost": {"depth": -1}}, "price of depth"),
        ({"cost": {"depth": math.nan}}, "price of depth"),
        ({"cost": {"colour": 1}}, "cannot be bought"),
        ({"cost": {"capacity": 1}}, "cannot be bought"),
        ({"cost": {"depth": 1}, "over": 0.1}, "without a rate"),
        ({"cost": {"depth": 1}, "benign": 1.5}, "nu is 1.5"),
        ({"cost": {"depth": 1}, "harm": 2}, "budget"),
        ({"cost": {"depth": 1}, "side": "left"}, "side"),
        ({"cost": lambda depth, width: np.array([1.0, 2.0])}, "cells"),
        ({"cost": lambda depth, width: np.nan}, "finite"),
    ],
)
def test_prices_that_are_none(options, word):
    with pytest.raises(ms.InputError, match=word):
        ms.sweep(STEEP, depth=range(4), width=[1, 2]).pareto(**options)
    with pytest.raises(ms.InputError, match="no numbers"):
        ms.sweep({"a": STEEP, "b": STEEP}, depth=[1]).pareto({"capacity": 1})


def test_a_prompt_shows_one_line():
    """Whatever their size, grids and what is read off them do not print every cell."""
    grid = ms.sweep(STEEP, depth=range(400), width=range(1, 50), correlation=[0.0, 0.3])
    small = ms.sweep(STEEP, depth=[0, 4], width=[1])
    assert repr(small) == "<Grid P(harm) by depth 2, width 1: 0.192 to 0.8, proven>"
    assert repr(small.needed(0.5)) == f"<Needed {small.needed(0.5).line()}>"
    found = grid.pareto({"depth": 1, "width": 2}, harm=0.01)
    assert repr(found) == f"<Pareto {str(found).splitlines()[0]}; and 1 more>"
    assert repr(small.pareto({"depth": 1}).front) == "<Front of 2 cells: cost 0 to 4, harm 0.8 to 0.1921>"
    assert all("\n" not in repr(x) and len(repr(x)) < 600 for x in (grid, grid.needed(1e-3), found, found.front))
    gone = ms.sweep({8: {4: STEEP.harm(4)}, 16: None}).at(capacity=16)
    assert repr(gone) == "<Grid P(harm) by depth 1, width 1: nothing measured>"
    assert repr(gone.pareto({"width": 1}).front) == "<Front of no cell>"
