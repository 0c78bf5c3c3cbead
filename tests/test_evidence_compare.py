"""compare: what changed between two models, with its interval, its states and its positions."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_depth import make_rollouts
from test_evidence import answers

import markovsafety as ms
from markovsafety.evidence.cells import cell, tally_of
from markovsafety.evidence.paired import benjamini_hochberg, mover, paired
from markovsafety.evidence.positions import by_position


def test_compare_finds_the_planted_change():
    before = ms.Rollouts.concat(
        [make_rollouts([1, 2] * 15, [20] * 30, category="a"), make_rollouts([9, 11] * 15, [20] * 30, 0, 30, "b")]
    )
    after = ms.Rollouts.concat(
        [make_rollouts([2, 1] * 15, [20] * 30, category="a"), make_rollouts([6, 4] * 15, [20] * 30, 0, 30, "b")]
    )
    result = ms.compare(before, after)
    assert [row["category"] for row in result.table] == [None, "a", "b"]
    assert [row["flagged"] for row in result.table] == [False, False, True]
    assert [row["category"] for row in result.flagged] == ["b"]
    b = result.table[2]
    assert b["difference"] == pytest.approx(-0.25)
    assert b["method"] == "paired t"
    assert result.table[1]["difference"] == pytest.approx(0)
    assert result.table[1]["difference_lower"] < 0 < result.table[1]["difference_upper"]
    assert "changed" in str(result)
    json.dumps(result.to_json(), allow_nan=False)


def test_compare_of_one_unnamed_category_has_one_row():
    before, after = (make_rollouts(x * 15, [20] * 30) for x in ([8, 9], [2, 1]))
    result = ms.compare(before, after)
    assert [row["category"] for row in result.table] == [None]
    assert result.table[0]["flagged"]
    assert result.table[0]["adjusted"] == result.table[0]["p"]
    assert str(result).count("changed") == 1
    assert len(str(result).splitlines()) == 3
    # A name of its own, or a second category on one side, keeps the rows apart.
    named = [r.replace(category=np.full(len(r), "b")) for r in (before, after)]
    assert [row["category"] for row in ms.compare(*named).table] == [None, "b"]
    wider = ms.Rollouts.concat([after, make_rollouts([3], [20], 0, 90, "b")])
    assert [row["category"] for row in ms.compare(before, wider).table] == [None, "all"]


def test_paired_t_by_hand():
    x, y, n = np.array([3, 5, 6, 2] * 3), np.array([6, 9, 7, 6] * 3), np.full(12, 10)
    a, b = (cell(tally_of(make_rollouts(v, n)), 0) for v in (x, y))
    lower, upper, p, method = paired(a, b, 0.95)
    d = (y - x) / 10
    half = 2.200985160082949 * d.std(ddof=1) / np.sqrt(12)  # Student quantile .975 at 11 degrees of freedom
    assert method == "paired t"
    assert (lower, upper) == pytest.approx((d.mean() - half, d.mean() + half))
    from scipy.stats import ttest_rel

    assert p == pytest.approx(ttest_rel(y, x).pvalue)
    # Prompts that never harm on either side add to the mean, not to what is known about its variance.
    more = [cell(tally_of(make_rollouts(np.r_[v, np.zeros(20, int)], np.full(32, 10))), 0) for v in (x, y)]
    d = np.r_[d, np.zeros(20)]
    assert paired(more[0], more[1], 0.95)[1] == pytest.approx(
        d.mean() + 2.200985160082949 * d.std(ddof=1) / np.sqrt(32)
    )


def test_few_harmful_prompts_use_the_clustered_intervals():
    """7 harmful prompts of 20: MOVER with the correlation between prompts, shrunk by 2 / 7."""
    x, y, n = np.r_[1, 2, 3, 4, 1, 2, 3, np.zeros(13)], np.r_[2, 3, 3, 4, 2, 4, 5, np.zeros(13)], np.full(20, 10)
    a, b = (cell(tally_of(make_rollouts(v.astype(int), n)), 0) for v in (x, y))
    lower, upper, _, method = paired(a, b, 0.95)
    assert method == "paired MOVER"
    r = np.corrcoef(x, y)[0, 1] * (1 - 2 / 7)
    assert (lower, upper) == pytest.approx(mover(a.bound(), b.bound(), r))
    wide = mover(a.bound(), b.bound())
    assert wide[0] < lower < upper < wide[1]
    same = paired(a, a, 0.95)
    assert same[0] < 0 < same[1]
    assert same[2] == 1
    few = [cell(tally_of(make_rollouts([3, *[0] * 19], n)), 0), cell(tally_of(make_rollouts([5, *[0] * 19], n)), 0)]
    assert paired(few[0], few[1], 0.95)[:2] == mover(few[0].bound(), few[1].bound())


def test_zero_events_are_never_a_point():
    zero, some = make_rollouts([0] * 10, [4] * 10), make_rollouts([2] * 10, [4] * 10)
    for before, after in ((zero, zero), (zero, some), (some, zero), (some, make_rollouts([4] * 10, [4] * 10))):
        row = ms.compare(before, after).table[0]
        assert row["method"] == "paired MOVER"
        assert row["difference_lower"] < row["difference"] < row["difference_upper"] or row["difference"] in (1, -1)
    row = ms.compare(zero, some).table[0]
    a, b = (ms.profile(r)[0] for r in (zero, some))
    assert row["difference_lower"] == pytest.approx(0.5 - np.hypot(b.value - b.lower, a.upper))
    assert row["p"] < 0.05
    assert ms.compare(zero, zero).table[0]["p"] == 1


def test_the_difference_is_a_bound():
    before, after = (make_rollouts(np.tile(x, 6), [20] * 12) for x in ([8, 9], [2, 1]))
    result = ms.compare(before, after)
    change, row = result.difference(), result.table[0]
    assert (change.value, change.lower, change.upper) == tuple(
        row[f"difference{end}"] for end in ("", "_lower", "_upper")
    )
    assert change.reasons["sampling"] == pytest.approx((change.upper - change.lower) / 2)
    assert change.reasons["judge"] is None
    assert "change of P(harm) (all, k = 0) = -0.35" in str(change)
    assert change.info["flagged"]
    for k, category in ((3, None), (0, "bio")):
        with pytest.raises(ms.InputError, match="Nothing was compared") as caught:
            result.difference(k, category)
        assert caught.value.partial == result.table
    alone = ms.compare(make_rollouts([3], [10]), make_rollouts([5], [10])).difference()
    assert "one prompt only" in alone.info["note"]
    assert "one prompt only" in str(ms.compare(make_rollouts([3], [10]), make_rollouts([5], [10])))


def test_different_prompts_are_not_paired():
    before, after = make_rollouts([5] * 9 + [4], [10] * 10), make_rollouts([5] * 9 + [6], [10] * 10, first_prompt=50)
    row = ms.compare(before, after).table[0]
    assert row["method"] == "MOVER"
    assert row["prompts"] == [10, 10]
    p = row["p"]
    # p is where the interval just touches zero.
    a, b = (cell(tally_of(r), 0) for r in (before, after))
    ends = mover(a.bound(1 - p), b.bound(1 - p))
    assert min(abs(ends[0]), abs(ends[1])) < 1e-6  # bisection of ln(alpha) to 27 / 2**30


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=6), st.lists(st.integers(0, 6), min_size=2, max_size=6))
def test_swapping_sides_flips_the_interval(x, y):
    a, b = (cell(tally_of(make_rollouts(v, [6] * len(v))), 0) for v in (x, y))
    forth, back = paired(a, b, 0.95), paired(b, a, 0.95)
    assert forth[:2] == pytest.approx((-back[1], -back[0]), abs=1e-12)
    assert forth[3] == back[3]
    assert forth[2] == pytest.approx(back[2], rel=1e-5)
    assert forth[0] <= forth[1]
    assert 0 <= forth[2] <= 1


def test_benjamini_hochberg_by_hand():
    p = np.array([0.01, 0.04, 0.03, 0.5])
    assert benjamini_hochberg(p) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert benjamini_hochberg(np.array([])).size == 0


def test_compare_chains_attributes_the_change():
    harsh = answers(7, 100, 5)
    mild = harsh.replace(outcome=np.where((harsh.outcome == 0) & (np.arange(len(harsh)) % 2 == 0), 1, harsh.outcome))
    before, after = (ms.estimate(ms.count(r, ms.KGram(2))) for r in (harsh, mild))
    result = ms.compare(before, after)
    row = result.table[0]
    assert result.attribution is not None
    assert result.positions is not None
    assert result.attribution.sum() == pytest.approx(row["difference"], abs=1e-12)
    assert "through state" in str(result)
    assert result.positions.sum() == pytest.approx(row["difference"], abs=1e-12)
    assert "by position" in str(result)
    assert result.to_json()["positions"] == result.positions.tolist()
    other = ms.compare(before, ms.estimate(ms.count(mild, ms.KGram(1))))
    assert other.attribution is None
    assert other.positions is None
    assert "no attribution to states and positions: the chains have different states" in str(other)
    assert other.table == result.table  # what was measured stays
    assert ms.compare(harsh, mild).attribution is None


def test_compare_names_what_it_leaves_out():
    before = ms.Rollouts.concat([make_rollouts([1, 1], [4, 4]), make_rollouts([1, 1], [4, 4], prefill=2)])
    after = ms.Rollouts.concat([make_rollouts([1, 1], [4, 4]), make_rollouts([1], [4], 0, 9, "new")])
    text = str(ms.compare(before, after))
    assert "prefill 2" in text
    assert "category new" in text
    with pytest.raises(ms.InputError, match="No prefill depth"):
        ms.compare(before[before.prefill == 2], after)
    with pytest.raises(ms.InputError, match="remembers no rollouts"):
        ms.compare(before, SimpleNamespace())
    with pytest.raises(ms.InputError, match="rate"):
        ms.compare(before, after, rate=2)


def test_change_by_position_follows_the_walk():
    """Both laws unrolled by hand: what the rows after t tokens contribute, until both chains have ended."""
    rng = np.random.default_rng(4)
    P, Q = (rng.dirichlet(np.ones(5), 5) for _ in range(2))
    for M in (P, Q):
        M[3:] = np.eye(5)[3:]
    Q[2] = P[2]
    a, b = (ms.Chain(M, {"harm": 3, "refusal": 4}, s) for M, s in ((P, 0), (Q, [0.5, 0.5, 0, 0, 0])))
    h, g = (ms.hitting_probability(c, "harm").value for c in (a, b))
    shares = by_position(a, b)
    law = after = (a.start + b.start) / 2
    for t in range(6):
        moved = (law @ (Q - P) @ g + after @ (Q - P) @ h) / 2
        assert shares[t] == pytest.approx(moved + (t == 0) * float((b.start - a.start) @ (h + g)) / 2, abs=1e-12)
        law, after = (np.where(np.arange(5) < 3, x, 0) @ M for x, M in ((law, P), (after, Q)))
    assert shares.sum() == pytest.approx(float(b.start @ g - a.start @ h), abs=1e-14)
    assert abs(by_position(a, b, horizon=400)[-1]) < 1e-15
    # A refusal that begins to leak, and one that stops: an end on one side, and never left there.
    leaky = ms.Chain([[0, 0.5, 0.3, 0.2], [0, 0.5, 0.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]], {"harm": 2, "refusal": 3}, 0)
    tight = ms.Chain([[0, 0.5, 0.3, 0.2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], {"harm": 2, "refusal": 3}, 0)
    for forth in (by_position(tight, leaky), -by_position(leaky, tight)):
        assert forth.sum() == pytest.approx(0.5)
        assert forth[:3] == pytest.approx([0, 0.375, 0.0625])


def test_layered_chains_have_their_positions():
    rng = np.random.default_rng(5)
    sides = []
    for _ in range(2):
        layers = [rng.dirichlet(np.ones(4), 4) for _ in range(3)]
        sides.append(ms.Chain.layered(layers, {"harm": 2, "refusal": 3}, start=0))
    shares = by_position(*sides)
    assert shares.shape == (4,)
    change = [ms.hitting_probability(c, "harm").at_start.value for c in sides]
    assert shares.sum() == pytest.approx(change[1] - change[0], abs=1e-14)
