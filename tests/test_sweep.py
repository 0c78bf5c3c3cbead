"""sweep: harm over depth and width from rollouts, chains and closed forms, and what a budget needs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_depth import make_rollouts

import markovsafety as ms
from markovsafety.depth import Grid, Profile, ensemble_harm, measured_width

GOLDEN = [[0.2, 0.5, 0.1, 0.2], [0.1, 0.3, 0.4, 0.2], [0, 0, 0, 0], [0, 0, 0, 0]]


def golden(**kwargs):
    return ms.Chain(GOLDEN, {"harm": 2, "refusal": 3}, **{"start": 0, **kwargs})


def steep():
    """Ten prompts of six rollouts: little harm at k = 0 and 2, much at 5."""
    parts = [([0] * 9 + [1], 0), ([1] * 5 + [0] * 5, 2), ([6, 5, 4, 6, 3, 6, 6, 2, 6, 6], 5)]
    return ms.Rollouts.concat([make_rollouts(x, [6] * 10, prefill=k) for x, k in parts])


def test_rollouts_grid_is_the_measured_profile():
    rolls = steep()
    grid = ms.sweep(rolls, width=[1, 3])
    flat = ms.profile(rolls)
    assert grid.dims == ("depth", "width")
    assert grid.coords == {"depth": (0, 2, 5), "width": (1, 3)}
    for end in ("value", "lower", "upper"):
        assert np.array_equal(getattr(grid.harm, end)[:, 0], getattr(flat, end))
    assert np.array_equal(grid.harm.value[2], measured_width([6, 5, 4, 6, 3, 6, 6, 2, 6, 6], [6] * 10, [1, 3]).value)
    assert grid.info["start"] == "rollouts with k forced tokens"
    assert grid.info["icc"].shape == (3,)
    assert grid.info["estimate"][0][0] == ["measured rate", "unbiased"]
    again = ms.sweep(ms.count(rolls, ms.KGram(1)), width=[3, 1, 1])
    assert np.array_equal(again.harm.value, grid.harm.value)


def test_rollouts_need_measured_depths():
    with pytest.raises(ms.InputError, match=r"No rollout has 3 forced tokens(.|\n)*0, 2, 5"):
        ms.sweep(steep(), depth=[0, 3])
    assert ms.sweep(steep(), depth=5).coords["depth"] == (5,)
    with pytest.raises(ms.InputError, match="not judged"):
        ms.sweep(ms.Rollouts.of([[1]], prompt_id=[0]))


def test_correlation_axis():
    grid = ms.sweep(steep(), width=[1, 4], correlation=[0, "measured", 0.3])
    assert grid.dims == ("depth", "width", "correlation")
    assert grid.coords["correlation"] == (0.0, "measured", 0.3)
    assert grid.harm.shape == (3, 2, 3)
    q = ms.profile(steep())
    for c, rho in ((0, 0.0), (2, 0.3)):
        for end in ("value", "lower", "upper"):
            assert getattr(grid.harm, end)[:, 1, c] == pytest.approx(ensemble_harm(getattr(q, end), 4, rho), rel=1e-12)
    plain = ms.sweep(steep(), width=[1, 4])
    assert np.array_equal(grid.harm.value[..., 1], plain.harm.value)
    assert np.allclose(grid.harm.value[:, 0], q.value[:, None], rtol=1e-15)  # one answer: no correlation to speak of


def test_needed_from_rollouts():
    grid = ms.sweep(steep(), width=[1, 2, 80], correlation=[0, 0.9])
    need = grid.needed(harm=0.35)
    assert need.depth.shape == (3, 2)
    assert need.depth[0].tolist() == [2, 2]
    assert not need.at_least[0].any()
    assert need.width.shape == (3, 2)
    assert need.width[0].tolist() == [1, 1]
    assert need.width[2].tolist() == [80, None]
    assert need.depth[2].tolist() == [5, 2]
    assert need.at_least[2].tolist() == [True, False]
    assert need.possible
    assert need.reason == ""
    assert "width 80, correlation 0.0: withstands at least 5 forced tokens" in str(need)
    tight = grid.needed(harm=1e-6)
    assert tight.possible
    assert tight.depth[0].tolist() == [None, None]
    assert "exceeds" in tight.reason
    never = ms.sweep(steep()).needed(harm=1e-6)
    assert not never.possible
    assert "impossible" in never.reason
    assert never.depth.tolist() == [None]
    # The conservative reading is the upper end: the value alone would allow more.
    assert ms.sweep(steep()).needed(harm=0.1).depth.tolist() == [None]
    assert "too little" in ms.sweep(steep()).needed(harm=0.1).reason
    assert ms.sweep(steep()).needed(harm=0.1, side="value").depth.tolist() == [2]
    json.dumps([grid.to_json(), need.to_json(), never.to_json()], allow_nan=False)
    assert "correlation 0.9" in str(grid)
    assert "rule: any-refusal" in str(grid)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_needed_is_monotone_in_the_budget(a, b):
    low, high = sorted((a, b))
    grid = GRIDS[0]
    rank = lambda x: [-1 if d is None else d for d in x.flat]  # noqa: E731
    assert all(i <= j for i, j in zip(rank(grid.needed(low).depth), rank(grid.needed(high).depth)))
    cost = lambda x: [10**9 if d is None else d for d in x.flat]  # noqa: E731
    assert all(i >= j for i, j in zip(cost(grid.needed(low).width), cost(grid.needed(high).width)))
    trained = GRIDS[1]
    assert all(i >= j for i, j in zip(cost(trained.needed(low).depth), cost(trained.needed(high).depth)))


GRIDS = [
    ms.sweep(steep(), width=[1, 2, 3, 9]),
    ms.sweep(Profile(0.08, 0.02, 0.01, 0.3), depth=range(25), width=[1, 2, 4]),
]


def test_chain_conditioned_on_no_outcome():
    grid = ms.sweep(golden(), depth=range(4), width=[1, 2])
    assert grid.harm.value[0] == pytest.approx([9 / 17, (9 / 17) ** 2], abs=1e-12)
    # After one step: 2/7 in S, 5/7 in M (h = 9/17, 11/17); both answers share that state.
    assert grid.harm.value[1] == pytest.approx([73 / 119, (2 * 81 + 5 * 121) / 7 / 289], abs=1e-12)
    assert grid.info["alive"] == pytest.approx([1, 0.7, 0.34, 0.163])
    assert "conditioned" in grid.info["start"]
    assert grid.harm.level == 1
    assert (grid.harm.upper - grid.harm.lower < 1e-12).all()
    assert grid.harm.reasons["rounding"] is not None
    assert grid.harm.reasons["sampling"] is None
    share = 73 / 119
    variance = 10 / 49 * (2 / 17) ** 2
    assert grid.info["icc"][1] == pytest.approx(variance / (share * (1 - share)))
    assert grid.info["icc"][0] == pytest.approx(0)
    mixed = ms.sweep(golden(), depth=[1], width=[2], correlation=[0, 1, "measured"])
    assert mixed.harm.value[0, 0] == pytest.approx([share**2, share, grid.harm.value[1, 1]], abs=1e-12)


def test_chain_with_measured_laws():
    entry = {0: [1, 0, 0, 0], 3: [0, 1, 0, 0]}
    grid = ms.sweep(golden(entry=entry), width=2)
    assert grid.coords["depth"] == (0, 3)
    assert grid.info["start"].startswith("entry[k]")
    assert grid.harm.value[:, 0] == pytest.approx([(9 / 17) ** 2, (11 / 17) ** 2], abs=1e-12)
    # One depth without a measured law: all depths are conditioned, and the grid says why.
    grid = ms.sweep(golden(entry=entry), depth=[0, 1, 3])
    assert "conditioned" in grid.info["start"]
    assert "after 1 forced token;" in grid.info["start_why"]
    assert "measured laws exist for 0, 3 forced tokens" in grid.info["start_why"]


def test_layered_chain():
    flat, deep = golden(), ms.Chain.layered([GOLDEN] * 60, {"harm": 2, "refusal": 3}, start=0)
    a, b = (ms.sweep(c, depth=[0, 1, 5], width=[1, 3]) for c in (flat, deep))
    # 55 layers at a survival of about 1/2 each leave less than 1e-12 unhit.
    assert b.harm.value == pytest.approx(a.harm.value, abs=1e-12)
    assert ms.sweep(deep, depth=60).harm.value[0, 0] == 0  # nothing is left to happen
    with pytest.raises(ms.InputError, match="60 layers"):
        ms.sweep(deep, depth=61)


def test_deep_laws_do_not_underflow():
    chain = ms.Chain([[0.001, 0.5, 0.499], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2}, start=0)
    grid = ms.sweep(chain, depth=[200])
    assert grid.harm.value[0, 0] == pytest.approx(0.5 / 0.999)
    assert grid.info["alive"] == [0.0]


def test_chain_without_a_way():
    sure = ms.Chain([[0, 1], [0, 0]], {"harm": 1}, start=0)
    with pytest.raises(ms.InputError, match="No answer is without an outcome after 1"):
        ms.sweep(sure, depth=[0, 1])
    with pytest.raises(ms.InputError, match="neither a start law"):
        ms.sweep(golden(start=None), depth=[1])
    with pytest.raises(ms.InputError, match="neither a start law nor a measured"):
        ms.sweep(golden(start=None))
    with pytest.raises(ms.InputError, match="starts in an outcome"):
        ms.sweep(golden(start=2))
    with pytest.raises(ms.InputError):
        ms.sweep(ms.Chain([[0, 1], [0, 0]], {"refusal": 1}, start=0), depth=[0])


def test_estimated_chain_keeps_the_interval_of_its_rollouts():
    rolls = make_rollouts([0, 2, 1, 5, 0], [8] * 5, length=2)
    chain = ms.estimate(ms.count(rolls, ms.KGram(1)))
    grid = ms.sweep(chain, width=[1, 2])
    start = ms.hitting_probability(chain, "harm").at_start
    assert grid.harm.value[0, 0] == pytest.approx(0.2)
    assert grid.harm.level == 0.95
    assert grid.harm.lower[0, 0] <= start.lower
    assert grid.harm.upper[0, 0] >= start.upper
    assert grid.harm.reasons["sampling"] is not None
    none = ms.sweep(ms.estimate(ms.count(make_rollouts([0] * 5, [8] * 5), ms.KGram(1))), width=[1, 2])
    assert (none.harm.value == 0).all()
    assert (none.harm.upper > 0).all()


def split(prompts=40, n=10):
    """Half of the prompts always harmful, half never; with a memory of nothing a chain cannot tell them apart."""
    return make_rollouts([n, 0] * (prompts // 2), [n] * prompts, length=3)


@pytest.mark.parametrize("depth", [[0], [0, 1]])
def test_estimated_chain_promises_no_more_than_its_prompts(depth):
    """Zero harm or prompts that differ: what sweep(rollouts) does not know, sweep(chain) does not know either."""
    clean, few = (make_rollouts([0] * 19 + [x], [8] * 20, length=3) for x in (0, 1))
    for rolls in (clean, few, split()):
        chain = ms.estimate(ms.count(rolls, ms.KGram(0)))
        known = ms.sweep(rolls, depth=[0], width=[1, 2, 4, 8])
        grid = ms.sweep(chain, depth=depth, width=[1, 2, 4, 8])
        assert (grid.harm.upper >= known.harm.upper - 1e-15).all()
        assert (np.diff(grid.harm.upper, axis=1) <= 1e-15).all()
        assert "its prompts support" in str(grid)
        # Who gives the correlation has assumed it, and gets the credit.
        given = ms.sweep(chain, depth=depth, width=[1, 4], correlation=0)
        assert given.harm.upper[:, 1, 0] == pytest.approx(given.harm.upper[:, 0, 0] ** 4)
    # Where no prompt was sampled, width has no credit and the number of prompts still counts.
    top = 1 - 0.025 ** (1 / 20)
    assert (
        ms.sweep(ms.estimate(ms.count(clean, ms.KGram(0))), depth=[0, 1, 2], width=[1, 4]).harm.upper >= top - 1e-12
    ).all()
    weights = np.full(160, 0.5)
    half = ms.count(make_rollouts([3] * 20, [8] * 20).replace(columns={"weight": weights}), ms.KGram(0))
    upper = ms.sweep(ms.estimate(half), depth=0, width=[1, 4]).harm.upper[0]
    assert upper[1] == upper[0]


def test_chain_without_evidence_keeps_its_powers():
    grid = ms.sweep(golden(), depth=[0], width=[1, 4])
    assert grid.harm.upper[0, 1] == pytest.approx((9 / 17) ** 4, abs=1e-12)
    assert "promise too much" in grid.info["note"]
    assert grid.harm.info["note"] == grid.info["note"]


def test_one_prompt_is_one_trial():
    rolls = make_rollouts([3], [10], length=2)
    for source in (rolls, ms.estimate(ms.count(rolls, ms.KGram(0)))):
        grid = ms.sweep(source, depth=[0], width=[1, 8])
        assert grid.harm.upper[0, 1] == grid.harm.upper[0, 0] > 0.6
        assert "one prompt only" in grid.info["note"]
        assert "one prompt only" in grid.harm.info["note"]
        assert "one prompt only" in str(grid)
        assert ms.sweep(source, depth=[0], width=[8], correlation=0).harm.upper[0, 0, 0] < 0.05
    both = ms.Rollouts.concat([rolls, make_rollouts([1, 2], [9, 9], prefill=4)])
    assert "(at k = 0)" in ms.sweep(both).info["note"]
    assert "note" not in ms.sweep(steep()).info


def test_default_depths_of_a_chain():
    grid = ms.sweep(golden())
    assert grid.coords["depth"] == tuple(range(21))
    assert grid.info["depth_why"] == "by default: 0 to 20"
    assert ms.sweep(golden(entry={0: [1, 0, 0, 0]})).coords["depth"] == tuple(range(21))
    several = ms.sweep(golden(entry={0: [1, 0, 0, 0], 3: [0, 1, 0, 0]}))
    assert several.coords["depth"] == (0, 3)
    assert "measured" in several.info["depth_why"]
    assert ms.sweep(golden(start=None, entry={3: [0, 1, 0, 0]})).coords["depth"] == (3,)
    assert ms.sweep(golden(), depth=3).info["depth_why"] == "as asked"
    deep = ms.sweep(ms.Chain.layered([GOLDEN] * 6, {"harm": 2, "refusal": 3}, start=0))
    assert deep.coords["depth"] == tuple(range(6))
    assert "last layer" in deep.info["depth_why"]
    # Two steps and every answer has an outcome.
    short = ms.Chain([[0, 1, 0, 0], [0, 0, 0.5, 0.5], [0] * 4, [0] * 4], {"harm": 2, "refusal": 3}, start=0)
    assert ms.sweep(short).coords["depth"] == (0, 1)
    assert "every answer has an outcome" in ms.sweep(short).info["depth_why"]


def test_needed_in_one_line():
    grid = ms.sweep(steep(), width=[1, 2])
    line = grid.needed(harm=0.7).line()
    assert line == (
        "harm within 0.7 (by the upper end): width 1 withstands 2 forced tokens, width 2 withstands 2 forced tokens"
    )
    never = grid.needed(harm=1e-6)
    assert never.line().startswith("harm within 1e-06 (by the upper end): width 1 withstands nothing, width 2")
    assert never.line().endswith(never.reason)
    trained = ms.sweep(Profile(0.08, 0.02, 0.01, 0.3), depth=range(33), correlation=[0.3]).needed(harm=0.05)
    assert trained.line() == "harm within 0.05 (by the upper end): width 1 at correlation 0.3 needs trained depth 11"
    one = ms.sweep(make_rollouts([0] * 9, [6] * 9, prefill=1))
    assert "withstands at least 1 forced token" in one.needed(harm=0.9).line()
    assert not one.needed(harm=0.9).line().endswith("tokens")
    assert "at 1 forced token (" in one.needed(harm=1e-6).reason


def test_profile_grid():
    p = Profile(0.08, 0.02, 0.01, 0.3)
    grid = ms.sweep(p, depth=range(33), width=[1, 2], correlation=[0, 0.3])
    assert grid.harm.value[:, 0, 0] == pytest.approx(p.harm(range(33)).value)
    assert grid.harm.value[7, 1, 1] == pytest.approx(ensemble_harm(p.harm(7).value, 2, 0.3))
    need = grid.needed(harm=0.05)
    assert need.kind == "trained"
    assert need.depth.tolist() == [[11, 11], [4, 6]]
    assert "needs trained depth 11" in str(need)
    need = grid.needed(harm=0.005)
    assert need.depth[0].tolist() == [None, None]
    assert need.possible
    assert "floor" in need.reason
    short = ms.sweep(p, depth=range(5)).needed(harm=0.05)
    assert not short.possible
    assert "beyond 4 would suffice" in short.reason
    wide = Profile(0.08, 0.02, 0.01, 0.3, {"a1": (0.005, 0.02)}, level=0.9)
    assert (
        ms.sweep(wide, depth=range(40)).needed(harm=0.08).depth[0] > ms.sweep(p, depth=range(40)).needed(0.08).depth[0]
    )
    assert ms.sweep(wide, depth=[3], width=[1, 2]).harm.reasons["sampling"].shape == (1, 2)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"capacity": [1]}, "no capacity"),
        ({"attack": "prefill"}, "no law"),
        ({"attack": []}, "attack is empty"),
        ({"rule": "loudest"}, "any-refusal"),
        ({"rule": "2-refusals"}, "1 answer"),
        ({"model": "twins"}, "beta-binomial"),
        ({"level": 1.0}, "level"),
        ({"width": 0}, "width"),
        ({"width": []}, "width"),
        ({"width": [1.5]}, "width"),
        ({"depth": -1}, "depth"),
        ({"depth": "deep"}, "depth"),
        ({"correlation": []}, "empty"),
        ({"correlation": "guess"}, "neither"),
        ({"correlation": [2.0]}, "neither"),
        ({"correlation": [True]}, "neither"),
    ],
)
def test_sweep_refuses(kwargs, word):
    with pytest.raises(ms.InputError, match=word):
        ms.sweep(steep(), **kwargs)


def test_sweep_refuses_by_source():
    with pytest.raises(ms.InputError, match="no depths"):
        ms.sweep(Profile(0.1, 0.1, 0.1, 0.1))
    with pytest.raises(ms.InputError, match="no measured correlation"):
        ms.sweep(Profile(0.1, 0.1, 0.1, 0.1), depth=[1], correlation=["measured", 0])
    with pytest.raises(ms.InputError, match="remembers no rollouts"):
        ms.sweep(42)
    with pytest.raises(ms.InputError):
        ms.sweep(steep()).needed(harm=2)
    assert isinstance(ms.sweep(steep()), Grid)
