"""Derivations of the closed forms of hazards: ladders, aligned positions, checkpoints, and leaky refusals."""

from __future__ import annotations

from typing import Any

import sympy as sy

from .symbolic import Derivation

__all__ = [
    "aligned_positions",
    "attacked_positions",
    "checkpoint",
    "checkpoint_attacked",
    "checkpoint_optimum",
    "leaky_refusal",
    "needed_depth",
    "operational_depth",
    "price_optimum",
    "severity_ladder",
    "survival_ratio",
]

OWN = "our own; the setting is that of arXiv 2406.05946 and arXiv 2502.00669"
QUALITY = "0 < a + r <= 1 in both stretches"


def _is(left: Any, right: Any) -> Any:
    """An equation that stays one, even where sympy sees at once that it holds."""
    return sy.Eq(left, right, evaluate=False)


def _numbers(names: str) -> Any:
    return sy.symbols(names, positive=True)


def _hazards() -> tuple[dict[str, Any], Any, Any, Any]:
    """Symbols of the four hazards, and f0, f1, c1 in them."""
    a0, r0, a1, r1 = _numbers("a_0 r_0 a_1 r_1")
    return dict(zip(("a0", "r0", "a1", "r1"), (a0, r0, a1, r1))), a0 / (a0 + r0), a1 / (a1 + r1), 1 - a1 - r1


def severity_ladder() -> Derivation:
    """Gambler's ruin: harm from level i of n, one up with probability p, else one down."""
    i, n = sy.symbols("i n", integer=True, positive=True)
    p, s = _numbers("p s")
    h = lambda j: (1 - s**j) / (1 - s**n)  # noqa: E731
    steps = (
        (
            "with s = (1 - p) / p, that is p = 1 / (1 + s): one step up or down",
            _is((1 + s) * h(i), h(i + 1) + s * h(i - 1)),
        ),
        ("level 0 is a refusal", _is(h(sy.Integer(0)), 0)),
        ("level n is harm", _is(h(n), 1)),
        ("at p = 1/2 the limit is i / n", _is(_fair(i, n), i / n)),
    )
    return Derivation(
        "severity ladder",
        _is(sy.Function("h")(i), h(i).subs(s, (1 - p) / p)),
        {"i": i, "n": n, "p": p},
        "0 < p < 1, p != 1/2, 0 <= i <= n",
        steps,
        "W. Feller, An Introduction to Probability Theory and Its Applications I, XIV.2",
    )


def _fair(i: Any, n: Any) -> Any:
    x = sy.symbols("x", positive=True)
    return sy.Limit((1 - sy.exp(i * x)) / (1 - sy.exp(n * x)), x, 0)


def aligned_positions() -> Derivation:
    """Harm after k forced tokens where the first d positions are aligned."""
    symbols, f0, f1, c = _hazards()
    d, k, m = sy.symbols("d k m", integer=True, nonnegative=True)
    h = lambda left: f1 + c**left * (f0 - f1)  # noqa: E731
    a0, r0, a1 = symbols["a0"], symbols["r0"], symbols["a1"]
    steps = (
        ("behind them: one token of the unaligned tail", _is(f0, a0 + (1 - a0 - r0) * f0)),
        ("none left: the tail", _is(h(sy.Integer(0)), f0)),
        ("one more position: harm, refusal, or on", _is(h(m + 1), a1 + c * h(m))),
        ("d - k of them are left to cross", _is(h(m).subs(m, d - k), h(d - k))),
    )
    return Derivation(
        "aligned positions",
        _is(sy.Function("h")(k, d), h(d - k)),
        {**symbols, "depth": d, "prefill": k},
        f"{QUALITY}, k <= d",
        steps,
        OWN,
    )


def needed_depth() -> Derivation:
    """Trained depth that brings unattacked harm down to eps."""
    symbols, f0, f1, c = _hazards()
    eps = _numbers("epsilon")
    need = sy.log((f0 - f1) / (eps - f1)) / -sy.log(c)
    # c^need by its logarithm, which sympy does not take apart for general c.
    power = sy.exp(sy.simplify(need * sy.log(c)))
    steps = (("there c^d is the ratio in the logarithm, and harm just eps", _is(f1 + power * (f0 - f1), eps)),)
    return Derivation(
        "needed depth",
        _is(sy.Symbol("d^*"), need),
        {**symbols, "eps": eps},
        "f1 < eps < f0 with f = a / (a + r), c1 = 1 - a1 - r1 > 0; whole depths: its ceiling",
        steps,
        OWN,
    )


def operational_depth() -> Derivation:
    """Forced tokens that a model of trained depth d withstands: d less a constant."""
    symbols, f0, f1, c = _hazards()
    eps, d = _numbers("epsilon d")
    over = sy.log((f0 - f1) / (eps - f1)) / -sy.log(c)
    k = d - over
    power = sy.exp(sy.simplify((d - k) * sy.log(c)))
    steps = (
        ("there harm is just eps", _is(f1 + power * (f0 - f1), eps)),
        ("one more trained position withstands one more token", _is(sy.diff(k, d), 1)),
    )
    return Derivation(
        "operational depth",
        _is(sy.Symbol("D_epsilon"), k),
        {**symbols, "eps": eps, "depth": d},
        "f1 < eps < f0, d large enough for it not to be negative; whole depths: its floor",
        steps,
        OWN,
    )


def price_optimum() -> Derivation:
    """Depth with the least harm plus price per position."""
    f0, f1, rate, price, d = _numbers("f_0 f_1 kappa lambda d")
    cost = f1 + sy.exp(-rate * d) * (f0 - f1) + price * d
    best = sy.log((f0 - f1) * rate / price) / rate
    steps = (
        ("c^d = exp(-kappa d), and the cost is stationary there", _is(sy.diff(cost, d).subs(d, best), 0)),
        (
            "its second derivative is positive where f0 > f1",
            _is(sy.diff(cost, d, 2), rate**2 * sy.exp(-rate * d) * (f0 - f1)),
        ),
    )
    return Derivation(
        "price optimum",
        _is(sy.Symbol("d^*"), best),
        {"f0": f0, "f1": f1, "rate": rate, "price": price},
        "kappa = ln(1 / c1), (f0 - f1) kappa > lambda; the whole optimum is next to it, on the one or the other side",
        steps,
        OWN,
    )


def checkpoint() -> Derivation:
    """Harm with one checkpoint at position d, after k < d forced tokens."""
    a, r, rho = _numbers("a r rho")
    d, k, m = sy.symbols("d k m", integer=True, nonnegative=True)
    f, c = a / (a + r), 1 - a - r
    h = lambda left: f * (1 - rho * c**left)  # noqa: E731
    steps = (
        ("at the checkpoint: refused with rho, else as without it", _is(h(sy.Integer(0)), (1 - rho) * f)),
        ("one more token before it", _is(h(m + 1), a + c * h(m))),
        ("unattacked, one position deeper is worse by", _is(h(m + 1) - h(m), rho * a * c**m)),
    )
    return Derivation(
        "checkpoint",
        _is(sy.Function("h")(k, d), h(d - k)),
        {"a": a, "r": r, "success": rho, "depth": d, "prefill": k},
        "0 < a + r <= 1, k < d",
        steps,
        OWN,
    )


def _geometric() -> tuple[Any, Any, Any]:
    c, q = _numbers("c q")
    return c, q, lambda d: (1 - q) * c * (c**d - q**d) / (c - q)


def checkpoint_attacked() -> Derivation:
    """Chance that a checkpoint at d is still ahead of a geometric attack, and reached."""
    c, q, g = _geometric()
    p, m = _numbers("p"), sy.Symbol("m", integer=True, nonnegative=True)
    d = sy.Symbol("d", integer=True, nonnegative=True)
    steps = (
        ("at 0 no token comes before it", _is(g(sy.Integer(0)), 0)),
        ("one deeper: ahead of one more length of the attack, past one more token",
         _is(g(m + 1), c * (g(m) + (1 - q) * q**m))),
    )  # fmt: skip
    return Derivation(
        "checkpoint under a geometric attack",
        _is(sy.Function("g")(d), g(d).subs(q, 1 - p)),
        {"c": c, "p": p, "depth": d},
        "P(K = k) = p (1 - p)^k, c != 1 - p; harm is f (1 - rho g(d))",
        steps,
        OWN,
    )


def checkpoint_optimum() -> Derivation:
    """Position of the checkpoint that is best against a geometric attack."""
    c, p, d = _numbers("c p d")
    a, b = _numbers("alpha beta")  # c = exp(-alpha), 1 - p = exp(-beta)
    best = sy.log(b / a) / (b - a)
    slope = sy.diff(sy.exp(-a * d) - sy.exp(-b * d), d)
    # alpha exp(-alpha d) = beta exp(-beta d) by logarithms, at the d in question.
    level = sy.log(a) - a * best - sy.log(b) + b * best
    gap = sy.symbols("x", positive=True)
    formula = sy.log(sy.log(1 - p) / sy.log(c)) / sy.log(c / (1 - p))
    at = formula.subs(p, 1 - sy.exp(-b)).subs(c, sy.exp(-a))
    steps = (
        ("with c = exp(-alpha), 1 - p = exp(-beta): the slope of c^d - (1 - p)^d",
         _is(slope, b * sy.exp(-b * d) - a * sy.exp(-a * d))),
        ("it is 0 there, by logarithms", _is(sy.expand_log(level, force=True), 0)),
        ("in the parameters of the attack", _is(sy.expand_log(at, force=True), sy.expand_log(best, force=True))),
        ("where both bases agree: 1 / alpha", _is(sy.Limit(sy.log(1 + gap / a) / gap, gap, 0), 1 / a)),
    )  # fmt: skip
    return Derivation(
        "checkpoint optimum",
        _is(sy.Symbol("d^*"), formula),
        {"c": c, "p": p},
        "0 < c < 1, 0 < p < 1, c != 1 - p; the whole optimum is next to it, on the one or the other side",
        steps,
        OWN,
    )


def attacked_positions() -> Derivation:
    """Mean harm of aligned positions under a geometric attack."""
    f0, f1, p = _numbers("f_0 f_1 p")
    c, q, g = _geometric()
    d, m = sy.symbols("d m", integer=True, nonnegative=True)
    G = lambda n: g(n) + q**n  # noqa: E731
    steps = (
        ("nothing aligned", _is(G(sy.Integer(0)), 1)),
        ("one more position: crossed unless the attack goes beyond it",
         _is(G(m + 1), c * (G(m) - q ** (m + 1)) + q ** (m + 1))),
    )  # fmt: skip
    return Derivation(
        "aligned positions under a geometric attack",
        _is(sy.Function("h")(d), (f1 + (f0 - f1) * G(d)).subs(q, 1 - p)),
        {"f0": f0, "f1": f1, "c": c, "p": p, "depth": d},
        "P(K = k) = p (1 - p)^k, c != 1 - p",
        steps,
        OWN,
    )


def leaky_refusal() -> Derivation:
    """Harm where a refusal may be taken back."""
    a, r, leak, end, stop = _numbers("a r ell e b")
    kept = end / (end + leak)
    h = a / (a + stop + r * kept)
    inside = (1 - kept) * h
    steps = (
        ("one token of a refusal: back, over, or on", _is(inside, leak * h + (1 - leak - end) * inside)),
        ("one token of the trajectory: harm, refusal, end, or on",
         _is(h, a + r * inside + (1 - a - r - stop) * h)),
        ("a refusal that never ends protects from nothing", _is(sy.Limit(h, end, 0), a / (a + stop))),
        ("one that never leaks is absorbing", _is(h.subs(leak, 0), a / (a + stop + r))),
    )  # fmt: skip
    return Derivation(
        "leaky refusal",
        _is(sy.Symbol("h"), h),
        {"a": a, "r": r, "leak": leak, "end": end, "stop": stop},
        "0 < a + r + b <= 1, 0 < l + e <= 1",
        steps,
        OWN,
    )


def survival_ratio() -> Derivation:
    """Refusal per token between two measured depths."""
    h, H, n = _numbers("h_1 h_2 n")
    r = 1 - (h / H) ** (1 / n)
    steps = (("n positions passed, then the harm behind them", _is(sy.powdenest((1 - r) ** n) * H, h)),)
    return Derivation(
        "survival ratio",
        _is(sy.Symbol("r"), r),
        {"before": h, "after": H, "tokens": n},
        "harm lands only behind the deeper depth, and every position refuses at one rate whatever was forced before it",
        steps,
        "our own reading of arXiv 2406.05946, Table 3",
    )
