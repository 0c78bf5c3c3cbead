"""Arithmetic of bounds: names kept, ends right at the corners, levels honest, coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety import arithmetic
from markovsafety.bound import REASONS, Bound, clopper_pearson

proba = st.floats(0.001, 0.999)


def measured(events, total, level=0.95, **reasons):
    lower, upper = clopper_pearson(events, total, level)
    return Bound(events / total, lower, upper, level, {"sampling": (upper - lower) / 2, **reasons}, None, {"name": "p"})


@st.composite
def bounds(draw, reasons=("sampling", "rounding")):
    value, down, up = draw(proba), draw(st.floats(0, 1)), draw(st.floats(0, 1))
    lower, upper = value * (1 - down), value + up
    part = draw(st.floats(0, 1))
    widths = {"sampling": (upper - lower) / 2 * (1 - part), "rounding": min(value - lower, upper - value) * part}
    return Bound(value, lower, upper, 0.95, {k: widths[k] for k in reasons})


@settings(derandomize=True, deadline=None, max_examples=60)
@given(bounds(), bounds(), st.booleans())
def test_difference_and_ratio_hold_the_value_and_never_beat_a_single_term(a, b, independent):
    for made in (arithmetic.difference(a, b, independent=independent), arithmetic.ratio(a, b, independent=independent)):
        assert made.lower <= made.value <= made.upper
    d = arithmetic.difference(a, b, independent=independent)
    assert d.upper - d.lower >= max(a.upper - a.lower, b.upper - b.lower) * (1 - 1e-12)
    back = arithmetic.difference(b, a, independent=independent)
    assert np.allclose([d.value, d.lower, d.upper], [-back.value, -back.upper, -back.lower], rtol=0, atol=1e-15)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(bounds(), bounds())
def test_ratio_by_mover_agrees_with_the_published_formula(a, b):
    """The published form, evaluated in long double where its denominators do not vanish.

    1e-6: in the published form the root's argument cancels; where it is 0 up to 1e-17, the root is 0 up to 1e-8.
    """
    a, b = (Bound(x.value, x.lower, x.upper, 0.95, {"sampling": 1.0}) for x in (a, b))
    x, y, l1, u1, l2, u2 = (np.longdouble(v) for v in (a.value, b.value, a.lower, a.upper, b.lower, b.upper))
    made = arithmetic.ratio(a, b)
    if abs(u2 * (2 * y - u2)) > 1e-3:
        low = (x * y - np.sqrt((x * y) ** 2 - l1 * u2 * (2 * x - l1) * (2 * y - u2))) / (u2 * (2 * y - u2))
        assert float(low) == pytest.approx(made.lower, rel=1e-6, abs=1e-8)
    if l2 > 1e-3:
        high = (x * y + np.sqrt((x * y) ** 2 - u1 * l2 * (2 * x - u1) * (2 * y - l2))) / (l2 * (2 * y - l2))
        assert float(high) == pytest.approx(made.upper, rel=1e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(bounds(), min_size=1, max_size=5), st.integers(0, 100))
def test_mean_holds_its_terms(terms, seed):
    w = np.random.default_rng(seed).random(len(terms)) + 0.01
    loose, tight = (arithmetic.mean(terms, w, independent=i) if i or len(terms) < 5 else None for i in (False, True))
    assert tight is not None
    assert tight.value == pytest.approx(np.average([b.value for b in terms], weights=w), rel=1e-12)
    if loose is not None:
        assert loose.lower <= tight.lower + 1e-12
        assert loose.upper >= tight.upper - 1e-12
    assert tight.reasons["rounding"] == pytest.approx(
        np.average([b.reasons["rounding"] for b in terms], weights=w), rel=1e-9, abs=1e-300
    )


def test_systematic_widths_add_and_statistical_ones_add_in_squares():
    a = Bound(0.5, 0.5 - 0.03 - 0.1, 0.5 + 0.03 + 0.1, 0.95, {"sampling": 0.03, "model": 0.1})
    b = Bound(0.2, 0.2 - 0.04 - 0.05, 0.2 + 0.04 + 0.05, 0.95, {"sampling": 0.04, "model": 0.05})
    d = arithmetic.difference(a, b)
    assert d.reasons["sampling"] == pytest.approx(0.05)
    assert d.reasons["model"] == pytest.approx(0.15)
    assert [d.lower, d.upper] == pytest.approx([0.3 - 0.05 - 0.15, 0.3 + 0.05 + 0.15])
    assert d.level == 0.95
    assert arithmetic.difference(a, b, independent=False).level == pytest.approx(0.9)


def test_what_one_term_has_not_assessed_is_not_assessed():
    a, b = measured(5, 100), measured(7, 100, judge=0.01)
    for made in (arithmetic.difference(a, b), arithmetic.ratio(a, b), arithmetic.mean([a, b])):
        assert made.reasons["judge"] is None
        assert made.reasons["sampling"] is not None
    assert arithmetic.largest([b, b]).reasons["judge"] == pytest.approx(0.01)
    assert arithmetic.largest([a, b]).reasons["judge"] is None


def test_proven_numbers_stay_proven():
    a, b = (Bound(v, v - 1e-12, v + 1e-12, 1.0, {"rounding": 1e-12}) for v in (0.3, 0.1))
    d = arithmetic.difference(a, b)
    assert d.level == 1
    assert d.lower <= 0.2 - 2e-12
    assert d.upper >= 0.2 + 2e-12


def test_zero_events_on_both_sides_is_no_proof_of_equality():
    a, b = measured(0, 330), measured(0, 330)
    d = arithmetic.difference(a, b)
    assert d.value == 0
    assert d.lower == pytest.approx(-b.upper)
    assert d.upper == pytest.approx(a.upper)
    r = arithmetic.ratio(a, b)
    assert np.isnan(r.value)
    assert r.lower == 0
    assert r.upper == np.inf


def test_largest_takes_the_worst_and_corrects_its_lower_end():
    terms = [measured(k, 200) for k in (3, 20, 19, 8)]
    worst = arithmetic.largest(terms, name="worst category")
    assert worst.value == 0.1
    assert worst.info["which"] == 1
    assert worst.lower == max(b.lower for b in terms)
    assert worst.upper == max(b.upper for b in terms)
    assert worst.level == pytest.approx(1 - 0.025 - 4 * 0.025)
    assert "worst category" in str(worst)


def test_difference_and_ratio_cover():
    """40,000 pairs of binomials: 95 % intervals miss at most 6 % of the time.

    If the true rate of missing were 5.2 % (Clopper-Pearson ends are conservative: it is below 5 %), 6 % would be
    exceeded with probability below 1e-10 (standard error .11 points)."""
    rng = np.random.default_rng(5)
    p, q, n = 0.04, 0.1, 150
    x, y = rng.binomial(n, p, 40_000), rng.binomial(n, q, 40_000)
    a, b = (Bound(z / n, *clopper_pearson(z, n), 0.95, {"sampling": 1.0}) for z in (x, y))
    a, b = (Bound(c.value, c.lower, c.upper, 0.95, {"sampling": (c.upper - c.lower) / 2}) for c in (a, b))
    d, r = arithmetic.difference(a, b), arithmetic.ratio(a, b)
    assert ((d.lower > p - q) | (d.upper < p - q)).mean() < 0.06
    assert ((r.lower > p / q) | (r.upper < p / q)).mean() < 0.06


@settings(derandomize=True, deadline=None, max_examples=40)
@given(bounds(reasons=("sampling",)), st.floats(0, 0.5), st.floats(0, 0.5))
def test_widened_adds_a_named_width(b, down, up):
    wide = arithmetic.widened(b, least=0, most=2.5, judge=(down, up), model=0.25)
    assert wide.reasons["judge"] == pytest.approx((down + up) / 2)
    assert wide.lower == pytest.approx(max(b.lower - down - 0.25, 0), abs=1e-15)
    assert wide.upper == pytest.approx(b.upper + up + 0.25)
    with pytest.raises(ms.InputError, match="there already"):
        arithmetic.widened(wide, judge=0.1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: arithmetic.difference(measured(1, 9), Bound([0.1], [0.0], [0.2])), "shapes"),
        (lambda: arithmetic.ratio(measured(1, 9), Bound(0.1, -0.2, 0.2)), "non-negative"),
        (lambda: arithmetic.mean([]), "no bounds"),
        (lambda: arithmetic.mean([measured(1, 9)], [-1.0]), "weights"),
        (lambda: arithmetic.mean([measured(1, 9)], [1.0, 2.0]), "weights"),
        (lambda: arithmetic.mean([measured(1, 9)] * 20, independent=False), "say nothing"),
        (lambda: arithmetic.largest([measured(1, 9), Bound(np.nan, 0.0, 1.0)]), "no value"),
        (lambda: arithmetic.widened(measured(1, 9), luck=0.1), "no name"),
        (lambda: arithmetic.widened(measured(1, 9), model=-0.1), "negative"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(ms.InputError, match=says) as e:
        call()
    assert e.value.cause
    assert e.value.next


def test_arrays_go_entry_by_entry():
    a = Bound([0.1, 0.2], [0.05, 0.1], [0.2, 0.4], 0.95, {"sampling": [0.07, 0.15]})
    b = Bound([0.3, 0.1], [0.25, 0.05], [0.4, 0.2], 0.95, {"sampling": [0.07, 0.07]})
    for f in (arithmetic.difference, arithmetic.ratio):
        whole = f(a, b)
        for i in range(2):
            one = f(a[i], b[i])
            assert [whole.value[i], whole.lower[i], whole.upper[i]] == [one.value, one.lower, one.upper]
            assert all((whole.reasons[k] is None) == (one.reasons[k] is None) for k in REASONS)
