"""Formulas: chains whose hitting probabilities are known by hand, and the numeric engine at random parameters."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction as F

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety import toy
from markovsafety.hitting.symbolic import rational

a, r, e, l, p = sympy.symbols("a r e l p")
LEAK = [["1 - a - r", "r", "a", 0], ["l", "1 - l - e", 0, "e"], [0] * 4, [0] * 4]
LEAK_ENDS = {"harm": 2, "refusal": 1, "benign": 3}


def leak():
    return rational(LEAK, LEAK_ENDS, start="go", states=["go", "refusal", "harm", "end"])


def same(x, y):
    return sympy.simplify(x - y) == 0


def trajectory(head, tail):
    """Positions with (harm, refusal) hazards, then a state that repeats."""
    d = len(head)
    P = [[sympy.S.Zero] * (d + 3) for _ in range(d + 3)]
    for i, (harm, refuse) in enumerate([*head, tail]):
        P[i][d + 1], P[i][d + 2] = harm, refuse
        P[i][min(i + 1, d)] = 1 - harm - refuse
    return rational(sympy.Matrix(P), {"harm": d + 1, "refusal": d + 2}, start=0)


def test_leaky_refusal():
    h = leak()
    first = a / (a + r * e / (e + l))
    assert same(h.at_start, first)
    assert same(h.expressions[1], l / (l + e) * first)
    assert h.expressions[2:] == (1, 0)
    assert [s.name for s in h.parameters] == ["a", "e", "l", "r"]
    assert same(h.diff("l")[0], sympy.diff(first, l))
    assert same(h.diff(r)[1], sympy.diff(l / (l + e) * first, r))
    exact = h.evaluate(a="1/20", r=F(3, 10), l="0.02", e=F(1, 10))
    assert exact.exact == [F(1, 6), F(1, 36), 1, 0]
    assert exact.at_start.exact == F(1, 6)
    assert exact.lower[0] <= exact.value[0] <= exact.upper[0] <= np.nextafter(exact.lower[0], 1)


def test_aligned_positions():
    a0, r0, a1, r1 = sympy.symbols("a0 r0 a1 r1")
    d = 3
    h = trajectory([(a1, r1)] * d, (a0, r0))
    f0, f1, c1 = a0 / (a0 + r0), a1 / (a1 + r1), 1 - a1 - r1
    for k in range(d + 1):
        assert same(h.expressions[k], f1 + c1 ** (d - k) * (f0 - f1))
    at = {"a1": 0.01, "r1": 0.3, "a0": 0.08, "r0": 0.02}
    assert h.evaluate(**at).value[: d + 1] == pytest.approx(toy.prefilled_harm(d, np.arange(d + 1)), rel=1e-13)


def test_checkpoint():
    s, d = sympy.Symbol("s"), 4
    c = 1 - a - r
    h = trajectory([(a, r)] * (d - 1) + [(a, r + c * s)], (a, r))
    for k in range(d + 1):
        assert same(h.expressions[k], a / (a + r) * (1 - (s * c ** (d - k) if k < d else 0)))


def ladder(n, up="p", down="1 - p", **more):
    P = [[0] * (n + 1) for _ in range(n + 1)]
    for i in range(1, n):
        P[i][i + 1], P[i][i - 1] = up, down
    return rational(P, {"harm": n, "refusal": 0}, **more)


def test_ladder():
    n, ratio = 6, (1 - p) / p
    h = ladder(n, start=3)
    for i in range(n + 1):
        assert same(h.expressions[i], (1 - ratio**i) / (1 - ratio**n))
    assert h.evaluate(p=F(3, 10)).exact[1:6:2] == [F(243, 29230), F(27, 370), F(12423, 29230)]
    assert h.evaluate(p="1/2").exact == [F(i, n) for i in range(n + 1)]  # where the closed form is 0 / 0


def test_thirty_rungs():
    h = ladder(30)
    assert h.evaluate(p="2/5").value == pytest.approx(toy.ladder_harm(30, 0.4), rel=1e-13)


def test_two_states():
    tenths = [[F(2, 10), F(5, 10), F(1, 10), F(2, 10)], [0.1, 0.3, 0.4, 0.2], [0] * 4, [0] * 4]
    h = rational(tenths, {"harm": 2, "refusal": 3}, start=["1/2", 0.5, 0, 0])
    assert h.expressions == (sympy.Rational(9, 17), sympy.Rational(11, 17), 1, 0)
    assert h.parameters == ()
    assert h.at_start == sympy.Rational(10, 17)
    assert h.evaluate().at_start.exact == F(10, 17)


def test_start_law_in_parameters():
    h = rational(LEAK, LEAK_ENDS, start=["q", "1 - q", 0, 0])
    assert same(h.at_start.subs("q", 1), h.expressions[0])
    assert same(h.at_start.subs("q", 0), h.expressions[1])


def test_numeric_chain():
    chain = ms.Chain.from_counts([[2, 5, 1, 2], [1, 3, 4, 2], [0] * 4, [0] * 4], {"harm": 2, "refusal": 3}, start=0)
    h = ms.hitting_probability(chain, "harm", method="symbolic")
    assert h.exact == [F(9, 17), F(11, 17), 1, 0]
    assert h.info["expression"] == [sympy.Rational(9, 17), sympy.Rational(11, 17), 1, 0]
    assert (h.info["method"], h.at_start.exact) == ("symbolic", F(9, 17))
    assert "expression" not in h[0].info
    both = [ms.committor(chain, "refusal", "harm", method=m).exact for m in ("symbolic", "exact")]
    assert both[0] == both[1]
    with pytest.raises(ms.MarkovsafetyError, match="one matrix"):
        ms.hitting_probability(ms.Chain.layered([chain.P], {"harm": 2}), "harm", method="symbolic")


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_floats_agree_with_the_exact_method(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 9))
    P = rng.random((n, n)) * (rng.random((n, n)) < 0.4) + np.diag(rng.random(n) * 0.1 + 1e-9)
    P /= P.sum(axis=1, keepdims=True)
    chain = ms.Chain(P, {"harm": n - 1, "refusal": n - 2}, start=0)
    one, other = (ms.hitting_probability(chain, "harm", method=m) for m in ("symbolic", "exact"))
    assert one.exact == other.exact
    assert one.at_start.exact == other.at_start.exact


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_random_formulas_agree_with_numbers(seed):
    """A random chain in three parameters, evaluated, is the numeric chain of the same integers."""
    rng = np.random.default_rng(seed)
    n, at = int(rng.integers(3, 7)), {k: F(int(rng.integers(1, 5)), 16) for k in "xyz"}
    weights, counts = np.zeros((n, n), dtype=object), np.zeros((n, n), dtype=int)
    for i in range(n - 2):
        where = rng.choice(n, size=3, replace=False)
        names = rng.permutation(["x", "y", "z"])[:2]
        entries = [f"{names[0]}", f"{names[1]}*{names[0]}", f"1 - {names[0]} - {names[0]}*{names[1]}"]
        u, v = at[names[0]], at[names[1]]
        weights[i, where] = entries
        counts[i, where] = [int(256 * x) for x in (u, u * v, 1 - u - u * v)]
    outcomes = {"harm": n - 1, "refusal": n - 2}
    h = rational(weights.tolist(), outcomes, start=0)
    exact = ms.hitting_probability(ms.Chain.from_counts(counts, outcomes), "harm", method="exact").exact
    bound = h.evaluate(**{s.name: at[s.name] for s in h.parameters})
    assert bound.exact == exact
    assert [F(str(x.subs(at))) for x in h.expressions] == exact


def test_derivative_is_the_sensitivity():
    h, at = leak(), {"a": 0.05, "r": 0.3, "l": 0.02, "e": 0.1}
    S = ms.sensitivity(toy.leak(), "harm").toarray()
    # d/dl moves mass from staying in the refusal (1, 1) to going back (1, 0); d/da from (0, 0) to (0, 2).
    for name, along in (("l", S[1, 0] - S[1, 1]), ("a", S[0, 2] - S[0, 0]), ("e", S[1, 3] - S[1, 1])):
        assert float(h.diff(name)[0].subs(at)) == pytest.approx(along, rel=1e-11)
    step, other = F(1, 10**6), {k: v for k, v in at.items() if k != "l"}
    up, down = (h.evaluate(**other, l=F(2, 100) + x).exact[0] for x in (step, -step))
    # Central difference: the error is of the order of step**2 times the third derivative.
    assert float((up - down) / (2 * step)) == pytest.approx(float(h.diff("l")[0].subs(at)), rel=1e-7)


def test_arrows_that_vanish_at_the_values():
    """x leaves for harm or refusal at rate t: the formula does not know t, but at t = 0 nothing is ever hit."""
    h = rational([["1 - t", "t*q", "t*(1 - q)"], [0] * 3, [0] * 3], {"harm": 1, "refusal": 2}, start=0)
    assert same(h.at_start, sympy.Symbol("q"))
    assert h.evaluate(t="1/9", q="1/3").at_start.exact == F(1, 3)
    assert h.evaluate(t=0, q="1/3").at_start.exact == 0
    assert leak().evaluate(a=0.1, r=0.3, l=0, e=0).exact[:2] == [F(1, 4), 0]
    assert leak().evaluate(a=0.1, r=0.3, l=0.2, e=0).exact[:2] == [1, 1]


def test_unreachable_and_certain():
    h = rational([["1 - a", "a", 0], [0, 1, 0], [0, 0, 0]], {"harm": 2}, target="harm")
    assert h.expressions == (0, 0, 1)
    h = rational([["1 - a", "a", 0], [0, 1, 0], [0, "b - b", 1]], {"harm": 1, "benign": 2})
    assert h.expressions == (1, 1, 0)
    h = rational([["1 - a", "a", 0], [0, 0, 1], [0, 0, 0]], {"harm": 2, "refusal": 1}, ["harm", "refusal"])
    assert h.name == "harm or refusal"


def test_names_that_mean_something_elsewhere():
    """Texts are read, not evaluated: E, I, S and beta are parameters like any other."""
    h = rational([["1 - E - S*beta", "E", "S*beta"], [0] * 3, [0] * 3], {"harm": 1, "refusal": 2})
    assert [s.name for s in h.parameters] == ["E", "S", "beta"]
    E, S, beta = h.parameters
    assert same(h.expressions[0], E / (E + S * beta))


def test_symbols_are_kept():
    x = sympy.Symbol("x", positive=True)
    h = rational([[1 - x - sympy.Float(0.1), "x", 0.1], [0] * 3, [0] * 3], {"harm": 1, "refusal": 2}, start=0)
    assert h.parameters == (x,)
    assert h.at_start == 10 * x / (10 * x + 1)


def test_latex_and_text():
    h = leak()
    assert h.latex() == h.latex("go") == sympy.latex(h.at_start)
    assert "frac" in h.latex()
    assert "h_{2} &= 1" in ladder(2).latex()
    assert "4 states in a, e, l, r; at start a*(e + l)" in repr(h)


ENDS = {"harm": 1, "refusal": 2}


def three(*row):
    return lambda: rational([list(row), [0] * 3, [0] * 3], ENDS)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (three("1 - a", "a", "r"), "The row of state 0 sums to r + 1"),
        (three("a", "a", "a"), "sums to 3*a"),
        (three(1 / 3, 2 / 3, 0), "sums to 9999999999999999/10000000000000000"),
        (three(0, 0, 0), "sums to 0"),
        (three("1 - a", "a*f(x)", 0), "P[0][1]"),
        (three("1 - a", "__import__('os')", 0), "is not read"),
        (three("1 - a", "a**b", 0), "Exponents"),
        (three("1 - a", "a +", 0), "P[0][1]"),
        (three("1 - a", "1/0", 0), "P[0][1]"),
        (three("1 - a", None, 0), "no number"),
        (three(True, 0, 0), "truth value"),
        (three(float("nan"), 1, 0), "P[0][0]"),
        (three("3/2", "-1/2", 0), "P[0][0]"),
        (three(1 - sympy.sqrt(2) / 2, sympy.sqrt(2) / 2, 0), "rational and finite"),
        (three(1 - sympy.exp(a), sympy.exp(a), 0), "rational functions"),
        (three(1 - a, sympy.Symbol("a", positive=True), 0), "Two different parameters"),
        (three(1, "a", "-a"), "cancel identically"),
        (lambda: rational([[1, 0], [0, 1, 0]], ENDS), "not a square"),
        (lambda: rational("P", ENDS), "not a square"),
        (lambda: rational(LEAK, LEAK_ENDS, target="flood"), "flood"),
        (lambda: rational(LEAK, LEAK_ENDS).at_start, "needs a start"),
        (lambda: rational(LEAK, LEAK_ENDS, start=["a", 0, 0, 0]), "start law sums to a"),
        (lambda: rational(LEAK, LEAK_ENDS, start=["a", "1 - a"]), "2 entries for 4 states"),
        (lambda: leak().evaluate(a=0.1, r=0.2, l=0.1), "'e' has no value"),
        (lambda: leak().evaluate(a=0.1, r=0.2, l=0.1, e=0.1, z=1), "no parameter 'z'"),
        (lambda: leak().evaluate(a=0.5, r=0.6, l=0.1, e=0.1), "state 0 ('go')"),
        (lambda: leak().evaluate(a="a", r=0.6, l=0.1, e=0.1), "no rational number"),
        (lambda: rational([["a/(a + b)", "b/(a + b)"], [0, 0]], {"harm": 1}).evaluate(a=0, b=0), "at these values"),
        (lambda: leak().diff("z"), "no parameter 'z'"),
        (lambda: leak().latex("nowhere"), "no state"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ms.MarkovsafetyError) as caught:
        call()
    assert text in str(caught.value)
    assert caught.value.cause
    assert caught.value.next


def test_sympy_is_imported_only_when_asked_for():
    code = (
        "import sys, markovsafety as ms, markovsafety.hitting\n"
        "c = ms.Chain([[0, .5, .5], [0] * 3, [0] * 3], {'harm': 1, 'refusal': 2})\n"
        "ms.hitting_probability(c, 'harm', method='exact')\n"
        "print('sympy' in sys.modules)\n"
        "ms.hitting_probability(c, 'harm', method='symbolic')\n"
        "print('sympy' in sys.modules)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "True"]
