"""Solve along the graph: states without a cycle by substitution, each cyclic class on its own.

`potential` solves ``sum_j w_ij (x_j - x_i) + c_i = 0`` (hitting probabilities, times, rewards) and `flow` its transpose
``d_j z_j = s_j + sum_i z_i w_ij`` (expected visits). Both carry three columns, value, lower and upper, through the same
steps: the exact solution grows with everything it is computed from, so solving with lower inputs and widening by the
proven error of the step gives a lower bound, and the same above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError
from . import elimination, krylov, sparse
from .certify import TINY, enclose, enclose_flow, gamma, widen
from .cyclic import Cyclic, Room
from .graph import Plan, plan
from .layered import Flow, substitute
from .rates import Rates

__all__ = ["DENSE_LIMIT", "SMALL", "Report", "flow", "potential"]

SMALL = 200  # "auto" eliminates classes up to this size, and tries the iterative solver first above it
DENSE_LIMIT = 5000  # largest class that is ever made dense (200 MB)
WIDE = 1e-9  # a certificate wider than this, relative to the largest value, is tried again by elimination

HOW = {
    "elimination": "subtraction-free elimination",
    "dissection": "subtraction-free elimination in nested dissection",
    "krylov": "Gauss-Seidel sweeps or BiCGStab with refinement",
    "lu": "sparse LU with refinement",
}


@dataclass
class Report:
    """What was done, for `Bound.info`, and what could not be proven."""

    single: int = 0
    classes: list[tuple[int, str, str]] = field(default_factory=list)  # states, method, because
    failed: list[int] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The heaviest method that was used."""
        used = {method for _, method, _ in self.classes}
        return "sparse" if used & {"lu", "krylov", "dissection"} else "elimination" if used else "layered"

    def why(self) -> str:
        """One sentence."""
        parts = [f"{self.single} states on no cycle by substitution"] if self.single else []
        for method, how in HOW.items():
            done = [(m, because) for m, used, because in self.classes if used == method]
            if done:
                classes = "class" if len(done) == 1 else "classes"
                largest, because = max(done)
                reason = f", because {because}" if because else ""
                parts.append(f"{len(done)} cyclic {classes} (largest {largest}) by {how}{reason}")
        return "; ".join(parts) or "the graph alone decides"


def potential(
    rates: Rates,
    free: NDArray,
    known: NDArray,
    gain: NDArray | None,
    how: str = "auto",
    ceiling: float = np.inf,
    order: Plan | None = None,
) -> tuple[NDArray, Report]:
    """Solve for the free states.

    Parameters
    ----------
    rates : Rates
    free : bool array, shape (n,)
        Unknown states; from each of them a known state can be reached.
    known : array, shape (n, 3) or (n, 1)
        Values of the other states: value, lower, upper; one column if no enclosure is wanted. Non-negative.
    gain : array, same shape, optional
        The constant c, on the scale of the rates. Non-negative.
    how : {"auto", "recursion", "elimination", "sparse"}
        What to do with cyclic classes.
    ceiling : float
        A known upper bound of the solution.
    order : Plan, optional
        Of the free states, where it is known.

    Returns
    -------
    X : array, same shape
    report : Report
        Classes whose enclosure could not be proven are in `failed` and carry [0, ceiling].
    """
    X = np.where(free[:, None], 0.0, known)
    given, gain = gain, np.broadcast_to(np.zeros(X.shape[1]), X.shape) if gain is None else gain
    order = plan(rates.W, free) if order is None else order
    report = Report(order.n_single)
    _check(order, how)
    room = Room.of(rates.n) if order.cyclic else None
    with np.errstate(over="ignore", invalid="ignore"):  # overflow is caught by looking at the results
        for single, cyclic in order.levels:
            if single.size:
                substitute(rates, single, X, given, ceiling)
            for own in cyclic:
                assert room is not None
                X[own] = _solve_class(Cyclic(rates, own, room), X, gain[own], how, ceiling, report)
    return X, report


def _check(order: Plan, how: str) -> None:
    largest = max(map(len, order.cyclic), default=0)
    if how == "recursion" and largest:
        raise InputError(
            f"The chain has cycles: a class of {largest} states, each reachable from every other.",
            cause="Backward recursion needs an order in which no state comes back.",
            next='Use method="auto", "elimination" or "sparse".',
        )


def _order(how: str, c: Cyclic) -> tuple[list[str], str]:
    """Which solvers to try on a class, in order, and why the first."""
    m = len(c)
    dense = ["elimination"] if m <= DENSE_LIMIT else []
    if dense and (how == "elimination" or (how == "auto" and m <= SMALL)):
        return dense, ""
    if how == "elimination" and c.fronts is None:
        raise InputError(
            f"The chain has a cyclic class of {m} states.",
            cause=f"Elimination makes the class dense, which is limited to {DENSE_LIMIT} states, or follows a nested "
            "dissection, of which this class has none that is cheap.",
            next='Use method="auto" or "sparse".',
        )
    if c.fronts is not None:
        because = f"that is cheap here: {c.fronts.fill / m:.0f} numbers of fill per state"
        return ["dissection"] if how == "elimination" else ["dissection", "lu", "krylov", *dense], because
    rest = dense if dense else ["lu"]
    return ["krylov", *rest], f"it spreads too fast to be eliminated cheaply and leaks {c.local.leak:.1g} per move"


def _try(
    order: tuple[list[str], str],
    attempt: Callable[[str], NDArray | None],
    c: Cyclic,
    report: Report,
    ceiling: float = np.inf,
) -> NDArray | None:
    """The first attempt that is proven and narrow, or what all attempts together prove."""
    best, (ways, because), refused = None, order, []
    for which in ways:
        if best and (which in ("lu", "krylov") or _width(best[1]) <= gamma(elimination.roundings(len(c)))):
            continue  # it would prove no more
        x = attempt(which)
        if x is None:
            refused.append(HOW[which])
            continue
        best = (which, x if best is None or x.shape[1] == 1 else _narrower(best[1], x))
        if _width(x) <= WIDE:
            break
        refused.append(HOW[which])
    method = ways[-1] if best is None else best[0]
    tried = [name for name in refused if name != HOW[method]]
    report.classes.append((len(c), method, f"{' and '.join(tried)} could not be trusted" if tried else because))
    if best is None or _says_nothing(best[1], ceiling):
        report.failed.append(len(c))
    return None if best is None else best[1]


def _solve_class(c: Cyclic, X: NDArray, gain: NDArray, how: str, ceiling: float, report: Report) -> NDArray:
    def attempt(which: str) -> NDArray | None:
        if which == "krylov":
            return krylov.solve(c.rates, c.mixer, X, gain, c.room.values, ceiling)
        if which == "lu":
            return _factored_class(c, X, gain, ceiling)
        return _eliminated_class(c, X, gain, ceiling, which == "dissection")

    x = _try(_order(how, c), attempt, c, report, ceiling)
    return np.tile([np.nan, 0.0, ceiling][: X.shape[1]], (len(c), 1)) if x is None else x


def _factored_class(c: Cyclic, X: NDArray, gain: NDArray, ceiling: float) -> NDArray | None:
    outside, solve = c.parts[1], c.factors(flow=False)
    right = gain[:, 0] + outside @ X[:, 0]
    x = None if solve is None else sparse.refined(solve, c.rows, c.own, X[:, 0], right, gain[:, 0])
    if solve is None or x is None:
        return None
    if X.shape[1] == 1:
        return np.clip(x, 0.0, ceiling)[:, None]
    ends = enclose(None, c.own, X, x, gain, solve, ceiling, parts=c.parts, errors=c.rates.errors)
    return None if ends is None else _columns(x, *ends)


def _eliminated_class(c: Cyclic, X: NDArray, gain: NDArray, ceiling: float, sparse: bool = False) -> NDArray | None:
    eliminated = c.eliminated(sparse)
    if eliminated is None:
        return None
    right = gain + c.parts[1] @ X
    if X.shape[1] == 1:
        return _finite(np.minimum(elimination.solve(eliminated, right), ceiling))
    solver = lambda g: elimination.solve(eliminated, g)  # noqa: E731
    first = solver(np.ascontiguousarray(right[:, 0]))
    ends = enclose(None, c.own, X, first, gain, solver, ceiling, parts=c.parts, errors=c.rates.errors)
    if ends is not None and sparse and _width(_columns(first, *ends)) <= WIDE:
        return _columns(first, *ends)
    terms = c.exits + 1 + c.rates.errors
    x, relative, absolute = elimination.enclosed_solve(eliminated, right, terms)
    widen(x, relative, absolute[:, 0], ceiling)
    if ends is None and not np.isfinite(absolute).all():
        return None
    return x if ends is None else _narrower(x, _columns(x[:, 0], *ends))


def _finite(x: NDArray) -> NDArray | None:
    return x if np.isfinite(x).all() else None


def _says_nothing(x: NDArray, ceiling: float) -> bool:
    """Whether the enclosure of a state is all that was known beforehand."""
    return x.shape[1] == 3 and bool(((x[:, 1] <= 0) & (x[:, 2] >= ceiling)).any())


def _width(x: NDArray) -> float:
    """Largest width of the enclosure, relative to the largest value."""
    return float(np.max(x[:, -1] - x[:, min(1, x.shape[1] - 1)]) / max(float(np.max(x[:, -1])), TINY))


def _columns(value: NDArray, lower: NDArray, upper: NDArray) -> NDArray:
    return np.column_stack([np.clip(value, lower, upper), lower, upper])


def _narrower(x: NDArray, y: NDArray) -> NDArray:
    """Both enclosures are proven, so their intersection is."""
    return _columns(y[:, 0], np.maximum(x[:, 1], y[:, 1]), np.minimum(x[:, 2], y[:, 2]))


def flow(rates: Rates, free: NDArray, source: NDArray, how: str = "auto") -> tuple[NDArray, Report]:
    """Expected visits to every state, in units of the rates: visits in tokens are ``step * z`` on free states.

    Parameters
    ----------
    free : bool array, shape (n,)
        States that move; from each of them a state that is not free can be reached.
    source : array, shape (n, 3) or (n, 1)
        The start law.

    Returns
    -------
    Z : array, same shape
        On free states z; on all others what arrives there, start included.
    report : Report
    """
    Z = np.array(source, dtype=np.float64)
    moved = Flow(rates, Z, np.zeros(rates.n, dtype=np.int64))
    order = plan(rates.W, free)
    report = Report(order.n_single)
    _check(order, how)
    room = Room.of(rates.n) if order.cyclic else None
    with np.errstate(over="ignore", invalid="ignore"):
        for single, cyclic in reversed(order.levels):
            for own in cyclic:
                assert room is not None
                there = Cyclic(rates, own, room)
                Z[own] = _flow_class(there, moved.settled(own), how, report)
                moved.pass_on(own, there.parts[1])
            if single.size:
                moved.single(single)
        moved.settled(np.flatnonzero(~free))
    return Z, report


def _flow_class(c: Cyclic, source: NDArray, how: str, report: Report) -> NDArray:
    if not source[:, -1].any():
        return np.zeros_like(source)
    inflow = cache(lambda: sp.csr_array(c.parts[0].T.tocsr()))

    def attempt(which: str) -> NDArray | None:
        if which in ("elimination", "dissection"):
            return _eliminated_flow(c, inflow, source, which == "dissection")
        return _sparse_flow(which, c, inflow, source)

    z = _try(_order(how, c), attempt, c, report)
    return np.tile([np.nan, 0.0, np.inf][: source.shape[1]], (len(c), 1)) if z is None else z


def _sparse_flow(which: str, c: Cyclic, inflow: Callable[[], sp.csr_array], source: NDArray) -> NDArray | None:
    bare = source.shape[1] == 1
    first = np.ascontiguousarray(source[:, 0])
    z = krylov.flow(c.mixer, c.parts[0], c.out, first) if which == "krylov" else None
    if z is not None:
        solve = None if bare else krylov.flow_solver(c.mixer, c.parts[0], c.out)
    else:
        solve = sparse.krylov(c.parts[0], c.out, flow=True) if which == "krylov" else c.factors(flow=True)
        z = None if solve is None else sparse.refined_flow(solve, inflow(), c.out, first)
    if z is None:
        return None
    if bare:
        return np.maximum(z, 0.0)[:, None]
    assert solve is not None
    terms, errors = c.rates.terms[c.own], c.rates.errors
    ends = enclose_flow(inflow(), c.out, z, source, solve, terms, parts=c.parts, errors=errors)
    return None if ends is None else _columns(z, *ends)


def _eliminated_flow(
    c: Cyclic, inflow: Callable[[], sp.csr_array], source: NDArray, sparse: bool = False
) -> NDArray | None:
    eliminated = c.eliminated(sparse)
    if eliminated is None:
        return None
    if source.shape[1] == 1:
        return _finite(elimination.solve_flow(eliminated, source))
    y, relative, absolute = elimination.enclosed_flow(eliminated, source, c.exits + 1 + c.rates.errors)
    widen(y, relative, absolute)
    solver = lambda g: elimination.solve_flow(eliminated, g)  # noqa: E731
    terms, errors = c.rates.terms[c.own], c.rates.errors
    ends = enclose_flow(inflow(), c.out, y[:, 0], source, solver, terms, parts=c.parts, errors=errors)
    if ends is None and not np.isfinite(absolute):
        return None
    return y if ends is None else _narrower(y, _columns(y[:, 0], *ends))
