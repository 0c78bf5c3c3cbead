"""branch: how much of the outcome is decided after k tokens, one number that answers both depth and width.

Continue an answer twice from the same first k tokens. With X_k the prefix and h(X_k) its probability of harm, the two
outcomes correlate by

    rho_k = Var h(X_k) / (p (1 - p)),    p = E h(X_k),

and m continuations are all harmful with probability ``F(m, k) = E[h(X_k)^m]``: what gets through m answers that branch
at depth k if one harmless answer is enough. rho_k rises with k from the correlation between prompts to 1; where it is 1
all is decided, and neither a later check of the answer by itself nor more answers from there help.

In a chain ``Var h(X_k)`` grows at every step by the harm information ``I_t = E Var(h(X_{t+1}) | X_t)``, and all of them
sum to p (1 - p). Measured, it needs several continuations of each of several prefixes: ``C(x, m) / C(n, m)`` from x
harmful ones of n is unbiased for ``h^m``, m <= n.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, clustered, encode
from ..chains import Chain
from ..errors import InputError, UntrustedError
from ..hitting import hitting_probability
from ..hitting.core import walk, without_start
from .branch_groups import Groups, groups_at, shares, whole_axis

__all__ = ["Branch", "branch", "branch_exact", "correlation"]

FEW = 5  # clusters with and without harm, below which a correlation has no interval of its own


@dataclass(frozen=True, eq=False)
class Branch:
    """Correlation of continuations, and harm that gets through several of them.

    Parameters
    ----------
    k : tuple of int
        Depths: tokens that the continuations share.
    width : tuple of int
        Numbers m of continuations.
    rho : Bound
        Branch correlation by depth, shape (len(k),); nan and [0, 1] where it cannot be seen.
    surface : Bound
        F(m, k), shape (len(k), len(width)); nan where fewer continuations than m were sampled.
    information : array or None
        Of a chain: harm information of steps 0 .. max(k) - 1, in probability squared.
    info : dict
        kind ("rollouts" or "chain"), given (what the prefixes are), and for rollouts by depth: prompts, prefixes,
        continuations (smallest number), left_out (prefixes with a single continuation), why (rho cannot be seen).

    Examples
    --------
    >>> chain = ms.toy.shallow(3)
    >>> found: ms.evidence.Branch = ms.evidence.branch_exact(chain, [0, 3], width=[1, 2])
    >>> print(found.rho[1])
    rho = 0.741771   proven [0.741771, 0.741771]
        because: rounding 1e-14; sampling, judge, lumping, model, truncation not assessed
    >>> print(found.surface[1, 1])
    F(m, k) = 0.231907   proven [0.231907, 0.231907]
        because: rounding 2e-15; sampling, judge, lumping, model, truncation not assessed
    """

    k: tuple[int, ...]
    width: tuple[int, ...]
    rho: Bound
    surface: Bound
    information: NDArray | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [["k", "rho", *(f"F({m}, k)" for m in self.width)]]
        for i, k in enumerate(self.k):
            rows.append([str(k), _span(self.rho[i]), *(_span(self.surface[i, j]) for j in range(len(self.width)))])
        sizes = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        level = "proven" if self.rho.level == 1 else f"{100 * self.rho.level:g} %"
        lines = [f"branch correlation, and harm through m continuations of k tokens   {level}   {self.info['given']}"]
        lines += ["  " + "  ".join(c.rjust(s) for c, s in zip(row, sizes)) for row in rows]
        return "\n".join(lines + [f"  {note}" for note in self.info.get("notes", ())])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: k, width, rho, surface, information, info."""
        names = ("k", "width", "rho", "surface", "information", "info")
        return {name: encode(getattr(self, name)) for name in names}


def _span(b: Bound) -> str:
    if b.upper - b.lower <= 1e-9:
        return f"{b.value:.3g}"
    return f"{b.value:.3g} [{b.lower:.3g}, {b.upper:.3g}]"


def branch(
    source: Any, depth: Any = None, width: Any = (1, 2, 4, 8), *, base: Any = None, level: float = 0.95
) -> Branch:
    """Branch correlation rho_k and the surface F(m, k).

    Parameters
    ----------
    source : Rollouts or Chain
        Rollouts: judged, with several continuations of every prefix, e.g. ``sample(model, prompts, n=8, prefill=[5],
        prefix=answers of the model itself)``. A Chain goes to `branch_exact`.
    depth : int or sequence of int, optional
        Tokens k that continuations share. None: the numbers of forced tokens in the rollouts. A k that no rollout was
        forced to is read off whole answers: those with the same first k tokens are continuations of one prefix.
    width : int or sequence of int
        Numbers m of continuations.
    base : Rollouts, optional
        The free answers that the prefixes were cut from. With them the answers that had ended, or done harm, within k
        tokens are counted in (decided: h = 0 or 1), and the numbers are those of the whole model. Without them they are
        those of answers still open after k tokens, as in `sweep`.
    level : float

    Returns
    -------
    Branch

    Raises
    ------
    InputError
        No judged rollouts, weights, a depth that was not sampled, or prefixes that do not belong to `base`.
    UntrustedError
        No correlation can be seen at any depth (a single continuation per prefix, no harm, nothing but harm);
        ``partial`` is the Branch, whose F(1, k) and upper ends stand.

    Notes
    -----
    Prefixes count in proportion to their continuations. Intervals of F are clustered by prompt
    (`markovsafety.bound.clustered`, a prefix being one trial from m = 2 on), and F(1)^m <= F(m) <= F(m - 1) cuts off
    what it excludes. rho = (F(2) - F(1)^2) / (F(1) (1 - F(1))), its square freed of bias, has a jackknife interval over
    prompts (on Fisher's scale; Student with the degrees of freedom that their kurtosis leaves); with fewer than 5
    prompts that have, or lack, harm it reaches from 0 to 1. In simulations with 12 to 100 prompts a 95 % interval of
    rho covered 91 to 96 %, those of F 97 to 99 %. Prefixes with a single continuation are left out: they say nothing of
    h^2. With one prompt its prefixes take the prompts' place, and the notes say so.

    Examples
    --------
    With nothing forced answers to one prompt are nearly independent, so that several seldom all do harm; after eight
    tokens they resemble each other:

    >>> from markovsafety.exercises import case
    >>> rolls = case().rolls  # 16 answers to each of 60 prompts, after 0 to 8 forced tokens
    >>> ms.evidence.branch(rolls, depth=[0, 8], width=[1, 2, 8])
    branch correlation, and harm through m continuations of k tokens   95 %   of answers still open after k tokens
      k                   rho                   F(1, k)                      F(2, k)                 F(8, k)
      0    0.0225 [0, 0.0522]  0.0125 [0.00483, 0.0262]  0.000417 [2.33e-05, 0.0262]           0 [0, 0.0262]
      8  0.185 [0.111, 0.256]      0.549 [0.484, 0.612]          0.346 [0.234, 0.48]  0.0613 [0.0157, 0.155]
    """
    check_level(level)
    if isinstance(source, Chain):
        return branch_exact(source, (0, 1, 2, 5, 10, 20) if depth is None else depth, width, level=level)
    depths, widths = _depths(source, depth), whole_axis(width, "width", 1)
    rows, info = [], {"kind": "rollouts", "given": "of answers still open after k tokens"}
    if base is not None:
        info["given"] = "of all answers"
    for k in depths:
        groups, decided = groups_at(source, k), None
        if base is not None:
            groups, decided = shares(base, groups, k)
        rows.append(_measured(groups, decided, widths, level))
    stack = lambda i, s: np.array([getattr(row[i], s) for row in rows])  # noqa: E731
    bounds = []
    for i, name in ((0, "rho"), (1, "F(m, k)")):
        low, high = stack(i, "lower"), stack(i, "upper")
        bounds.append(Bound(stack(i, "value"), low, high, level, {"sampling": (high - low) / 2}, None, {"name": name}))
    table = {name: [row[2][name] for row in rows] for name in rows[0][2]}
    notes = {f"k = {k}: {why}" for k, why in zip(depths, table["why"]) if why}
    notes |= {"one prompt only: the variance between prompts is not assessed"} if 1 in table["prompts"] else set()
    found = Branch(depths, widths, bounds[0], bounds[1], None, {**info, **table, "notes": tuple(sorted(notes))})
    if all(table["why"]):
        raise UntrustedError(
            f"No correlation of continuations can be seen: {table['why'][0]}.",
            cause="It is read from prefixes of which some continuations are harmful and others are not.",
            next="Sample more continuations (n=8) of more prefixes; error.partial has what can be said of F.",
            partial=found,
        )
    return found


def _depths(rolls: Any, depth: Any) -> tuple[int, ...]:
    if depth is not None:
        return whole_axis(depth, "depth", 0)
    if not hasattr(rolls, "prefill"):
        raise InputError(
            f"branch was given a {type(rolls).__name__}.",
            cause="Continuations are told apart by their tokens.",
            next="Pass judged Rollouts, or a Chain.",
        )
    return tuple(np.unique(np.asarray(rolls.prefill)).tolist())


def _measured(
    g: Groups, decided: tuple[NDArray, NDArray] | None, widths: tuple[int, ...], level: float
) -> tuple[Bound, Bound, dict[str, Any]]:
    """rho, F over the widths, and the facts, at one depth."""
    K, reach = g.prompts, int(g.n.min())
    told = {"prompts": K, "prefixes": len(g.n), "continuations": reach, "left_out": g.left_out}
    share = g.n / g.n.mean()
    add = lambda v: np.bincount(g.prompt, v, K)  # noqa: E731
    count, sums = add(share), {}
    for m in sorted({1, 2, *widths}):
        if m <= reach:
            sums[m] = add(share * _power(g.x, g.n, m))
    trials = count
    if decided is not None:  # every prompt counts once, as what its answers had come to and what its prefixes say
        harmful, open_ = decided
        sums = {m: harmful + open_ * np.where(count > 0, s / np.maximum(count, 1e-300), 0.0) for m, s in sums.items()}
        trials = np.ones(K)
    first = clustered(add(g.x), add(g.n), level) if decided is None else clustered(sums[1], trials, level)
    value, lower, upper = [], [], []
    best = first.upper
    for m in widths:
        if m == 1:
            here = first
        elif m <= reach:
            here = clustered(np.minimum(sums[m], trials), trials, level)
        else:
            value, lower, upper = [*value, np.nan], [*lower, first.lower**m], [*upper, best]
            continue
        best = max(min(best, here.upper), here.value)
        value, upper = [*value, here.value], [*upper, best]
        lower = [*lower, min(max(here.lower, first.lower**m), here.value)]
    surface = Bound(value, lower, upper, level)
    if K < 2 and decided is None:  # prefixes in place of prompts
        trials, sums = share, {m: share * _power(g.x, g.n, m) for m in sums}
    rho, why = correlation(trials, sums, level)
    return rho, surface, told | {"why": why}


def _power(x: NDArray, n: NDArray, m: int) -> NDArray[np.float64]:
    """``C(x, m) / C(n, m)``: unbiased for h^m."""
    j = np.arange(m)[:, None]
    return np.prod(np.maximum(x - j, 0) / (n - j), axis=0)


def correlation(w: NDArray, sums: dict[int, NDArray], level: float) -> tuple[Bound, str]:
    """rho and its jackknife interval from sums over clusters of weight w; why it cannot be seen, if so."""
    from scipy.special import stdtrit

    nothing = Bound(np.nan, 0.0, 1.0, level)
    if 2 not in sums:
        return nothing, "one continuation per prefix"
    y, z, U = sums[1], sums[2], len(w)
    if y.sum() <= 0 or y.sum() >= w.sum() * (1 - 1e-12):
        return nothing, "no harm was seen" if y.sum() <= 0 else "nothing but harm was seen"
    if U < 2:
        return nothing, "one prefix"
    parts = np.stack([w, y, z, y * y, y * w, w * w])
    value = float(_rho(parts.sum(axis=1), U))
    if min((y > 0).sum(), (y < w).sum()) < FEW:
        return Bound(min(value, 1.0), min(value, 0.0), 1.0, level), ""
    with np.errstate(divide="ignore"):
        again = np.arctanh(np.clip(_rho(parts.sum(axis=1)[:, None] - parts, U - 1), -0.9999, 0.9999))
    away = again - again.mean()
    error = np.sqrt((U - 1) / U * np.sum(away**2))
    # The variance of a variance from values of that kurtosis says how well the error is known.
    kurtosis = U * np.sum(away**4) / max(float(np.sum(away**2)) ** 2, 1e-300)
    known = min((y > 0).sum() - 1, (y < w).sum() - 1, 2 * U / max(kurtosis - 1, 1e-12))
    reach = float(stdtrit(max(known, 1.0), (1 + level) / 2) * error)
    at = np.arctanh(np.clip(value, -0.9999, 0.9999))
    lower, upper = float(np.tanh(at - reach)), float(np.tanh(at + reach))
    if upper <= 0:  # no rho is negative: an interval without one that is possible says nothing
        return Bound(value, value, 1.0, level), ""
    return Bound(min(value, 1.0), min(max(lower, 0.0), value), min(max(upper, value), 1.0), level), ""


def _rho(parts: NDArray, U: int) -> NDArray[np.float64]:
    w, y, z, yy, yw, ww = parts
    p = y / w
    noise = U / max(U - 1, 1) * np.maximum(yy - 2 * p * yw + p * p * ww, 0.0) / w**2  # p^2 is too large by this
    bottom = p * (1 - p) + noise
    return np.divide(z / w - p * p + noise, bottom, out=np.zeros_like(bottom), where=bottom > 0)


def branch_exact(
    chain: Chain, depth: Any, width: ArrayLike = (1, 2, 4, 8), *, target: Any = "harm", level: float = 0.95
) -> Branch:
    """rho_k and F(m, k) of a chain, homogeneous or layered, with the harm information of every step.

    Parameters
    ----------
    chain : Chain
        With a start law. Of an estimated chain: what its states say, which differences between prompts that the states
        do not show are missing from.
    depth, width
        As in `branch`; layered: depth at most the number of layers.
    target : as in `hitting_probability`
    level : float
        Confidence level for an estimated chain.

    Returns
    -------
    Branch
        Of all answers: one that has ended, or done harm, within k tokens is decided. Proven enclosures, or for an
        estimated chain what the intervals of its states allow.

    Raises
    ------
    InputError
        No start law, or a depth beyond the last layer.

    Examples
    --------
    Three quarters are decided when the three aligned positions have been passed:

    >>> ms.evidence.branch_exact(ms.toy.shallow(3), [0, 1, 3, 10], width=[1, 2, 8])
    branch correlation, and harm through m continuations of k tokens   proven   of all answers
       k    rho  F(1, k)  F(2, k)   F(8, k)
       0      0    0.284   0.0809  4.29e-05
       1  0.188    0.284    0.119    0.0104
       3  0.742    0.284    0.232    0.0768
      10  0.876    0.284    0.259     0.185
    """
    depths, widths = whole_axis(depth, "depth", 0), whole_axis(width, "width", 1)
    w = walk(chain, target)
    if chain.start is None:
        raise without_start("A branch correlation")
    if chain.is_layered and depths[-1] > chain.n_layers:
        raise InputError(
            f"Depth {depths[-1]} lies behind the last of {chain.n_layers} layers.",
            cause="A layered chain ends there.",
            next=f"Ask for depths up to {chain.n_layers}.",
        )
    h = hitting_probability(chain, target, level=level)
    law, rho, surface, information = np.asarray(chain.start, dtype=np.float64), [], [], []
    at = lambda t: h[min(t, chain.n_layers)] if chain.is_layered else h  # noqa: E731
    degree = 4 + max(int(np.bincount(P.indices, minlength=1).max(initial=1)) for P in chain.layers)
    for k in range(depths[-1] + 1):
        if k in depths:
            rho.append(_variance(at(k), law, k * degree * 2.0**-52))
            surface.append(_moments(at(k), law, widths, k * degree * 2.0**-52))
        if k == depths[-1]:
            break
        P = chain.layers[k if chain.is_layered else 0]
        now, ahead = np.asarray(at(k).value), np.asarray(at(k + 1).value)
        row = np.repeat(np.arange(chain.n_states), np.diff(P.indptr))
        moves = np.where(w.moving, law, 0.0)
        information.append(float(np.sum(moves[row] * P.data * (ahead[P.indices] - now[row]) ** 2)))
        law = np.where(w.moving, 0.0, law) + P.T @ moves
    known = [name for name, x in h.reasons.items() if x is not None]
    reason = "sampling" if "sampling" in known else "rounding"
    bounds = []
    for name, ends in (("rho", np.array(rho)), ("F(m, k)", np.array(surface))):
        value, low, high = np.moveaxis(ends, -1, 0)
        bounds.append(Bound(value, low, high, h.level, {reason: (high - low) / 2}, None, {"name": name}))
    info: dict[str, Any] = {"kind": "chain", "given": "of all answers"}
    if chain.evidence is not None:
        info["notes"] = ("differences between prompts that the states do not show are not in the chain (see check)",)
    return Branch(depths, widths, bounds[0], bounds[1], np.array(information), info)


def _ends(h: Bound, law: NDArray) -> tuple[NDArray, ...]:
    on = law > 0
    return law[on], np.asarray(h.value)[on], np.asarray(h.lower)[on], np.asarray(h.upper)[on]


def _moments(h: Bound, law: NDArray, widths: tuple[int, ...], room: float) -> list[tuple[float, float, float]]:
    """E[h^m] with its enclosure, by width; `room` is the relative rounding of the law."""
    share, *sides = _ends(h, law)
    out = []
    for m in widths:
        value, low, high = (float(share @ np.clip(x, 0.0, 1.0) ** m) for x in sides)
        slack = room + (len(share) + m + 4) * 2.0**-52
        value = min(value, 1.0)
        out.append((value, min(low * (1 - slack), value), max(min(high * (1 + slack), 1.0), value)))
    return out


def _variance(h: Bound, law: NDArray, room: float) -> tuple[float, float, float]:
    """Var h / (p (1 - p)) with its enclosure; nan and [0, 1] where p is 0 or 1."""
    share, value, low, high = _ends(h, law)
    p = [float(share @ x) for x in (value, low, high)]
    if not 0 < p[0] < 1:
        return np.nan, 0.0, 1.0
    away, loose = np.abs(value - p[0]), np.maximum(high - value, value - low) + max(p[2] - p[0], p[0] - p[1]) + 2.0**-52
    slack = room + (len(share) + 8) * 2.0**-52
    bottom = p[0] * (1 - p[0])
    ends = [x * (1 - x) for x in np.clip(p[1:], 0.0, 1.0)]
    most = 0.25 if p[1] <= 0.5 <= p[2] else max(ends)
    rho = min(float(share @ away**2) / bottom, 1.0)
    lower = float(share @ np.maximum(away - loose, 0.0) ** 2) / most * (1 - slack)
    least = min(ends)
    upper = min(float(share @ (away + loose) ** 2) / least * (1 + slack), 1.0) if least > 0 else 1.0
    return rho, min(max(lower, 0.0), rho), max(upper, rho)
