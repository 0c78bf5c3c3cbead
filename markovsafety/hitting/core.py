"""Chains in, arrays out: the calculations behind the front doors, with value, lower and upper in the last axis.

A `Walk` names what is hit, what is avoided and whether mass left after the last layer counts; `probability`, `duration`
and `occupation` solve it for homogeneous and layered chains alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain
from ..errors import InputError
from . import exact as rational
from . import graph, layered
from .blocks import Report, flow, potential
from .certify import TINY
from .rates import Rates, rates_of

__all__ = [
    "METHODS",
    "Answer",
    "Occupation",
    "Walk",
    "check_chain",
    "check_method",
    "duration",
    "given_hit",
    "law_mean",
    "occupation",
    "probability",
    "walk",
    "without_start",
]

METHODS = ("auto", "layered", "elimination", "sparse", "device", "exact", "symbolic")
NARROW = 256  # rates of a row up to which all rows of a level are widened by its longest
RECURSION = "one matrix per position: backward recursion, no linear solve"


@dataclass(frozen=True)
class Walk:
    """A hitting problem on a chain.

    Attributes
    ----------
    hit, avoid : bool array, shape (n,)
        Where the walk ends with and without a hit; disjoint.
    tail : float
        Value of mass that is in no outcome after the last layer: 1 if "truncated" is a hit.
    name : str
        What is hit, for printing.
    outcomes : tuple of str or None
        The outcomes whose union is hit, if it is one.
    """

    chain: Chain
    hit: NDArray[np.bool_]
    avoid: NDArray[np.bool_]
    tail: float
    name: str
    outcomes: tuple[str, ...] | None

    @property
    def moving(self) -> NDArray[np.bool_]:
        """States whose rows are read."""
        return ~(self.hit | self.avoid)

    def last(self, columns: int) -> NDArray[np.float64]:
        """Values after the last layer of a layered chain, shape (n, columns)."""
        alive = ~self.chain.outcome_mask & self.moving
        return np.repeat(np.where(self.hit, 1.0, np.where(alive, self.tail, 0.0))[:, None], columns, axis=1)


@dataclass(frozen=True)
class Answer:
    """Numbers with how they were made.

    Attributes
    ----------
    X : array, shape (n, c) or (L + 1, n, c)
        Columns value, lower, upper, or the value alone.
    exact : list of Fraction (layered: of lists), or None
    expression : list of sympy numbers, or None
    failed : list of int
        Sizes of classes without proof.
    """

    X: NDArray[np.float64]
    method: str
    why: str
    exact: Any = None
    failed: tuple[int, ...] = ()
    expression: Any = None


def check_chain(chain: Any) -> None:
    """Refuse what is no chain.

    Raises
    ------
    InputError
        If it is a matrix, counts, or anything else.
    """
    if isinstance(chain, Chain):
        return
    kind = type(chain).__name__
    hint = {"Counts": "Call estimate(counts) first.", "Rollouts": "Call estimate(count(rolls)) first."}
    raise InputError(
        f"This was given a {kind}, not a Chain.",
        cause="Probabilities, times and visits are properties of a chain with named outcomes.",
        next=hint.get(kind, 'Build one: Chain(P, {"harm": ..., "refusal": ...}), or read_chain(path).'),
    )


def walk(chain: Chain, target: Any, avoid: Any = None) -> Walk:
    """Look up target and avoided states.

    Raises
    ------
    InputError
        If a name is unknown, the target is empty, or the two overlap.
    """
    check_chain(chain)
    hit, name, outcomes, tail = _states(chain, target, "target")
    nothing = np.zeros(chain.n_states, dtype=bool)
    away, away_name, _, away_tail = (nothing, "", None, 0.0) if avoid is None else _states(chain, avoid, "a")
    both = np.flatnonzero(hit & away)
    if both.size or (tail and away_tail):
        at = f"State {both[0]} ({chain.states[both[0]]!r})" if both.size else "What the last layer leaves"
        raise InputError(
            f"{at} belongs both to what must come first and to what must come later.",
            cause="A committor asks which of two disjoint sets is hit first.",
            next="Remove the common states from one of them.",
        )
    return Walk(chain, hit, away, tail, f"{name} before {away_name}" if away_name else name, outcomes)


def _states(chain: Chain, target: Any, what: str) -> tuple[NDArray, str, tuple[str, ...] | None, float]:
    names = [target] if isinstance(target, str) else target
    named = isinstance(names, (list, tuple, set, frozenset)) and bool(names)
    if named and all(isinstance(x, str) and (x in chain.outcomes or _tail(chain, x)) for x in names):
        hit = np.zeros(chain.n_states, dtype=bool)
        for x in names:
            hit |= chain.mask(x)
        # "truncated" may be an outcome with states, or what the last layer leaves; it is named once.
        ordered = tuple(x for x in dict.fromkeys((*chain.outcomes, "truncated")) if x in set(names))
        return hit, " or ".join(ordered), ordered, float(any(_tail(chain, x) for x in names))
    hit = chain.mask(target)
    if not hit.any():
        raise InputError(
            f"{what} is empty.",
            cause=f"{target!r} names no state; the outcomes are {', '.join(chain.outcomes)}.",
            next="Name an outcome, or at least one state by label, index or mask.",
        )
    where = np.flatnonzero(hit)
    name = str(chain.states[where[0]]) if len(where) == 1 else f"{len(where)} states"
    inside = tuple(x for x, index in chain.outcomes.items() if len(index) and hit[index].all())
    whole = sum(len(chain.outcomes[x]) for x in inside) == len(where)
    return hit, " or ".join(inside) if whole else name, inside if whole else None, 0.0


def _tail(chain: Chain, name: str) -> bool:
    return chain.is_layered and name == "truncated"


def _sides(certify: bool) -> int:
    return 3 if certify else 1


def check_method(method: str) -> None:
    """Raise where a method does not exist."""
    if method not in METHODS:
        raise InputError(
            f"The method {method!r} does not exist.",
            cause=f"The methods are {', '.join(METHODS)}.",
            next='Use method="auto".',
        )


def probability(w: Walk, method: str = "auto", certify: bool = True) -> Answer:
    """Probability of the hit from every state (and layer)."""
    check_method(method)
    if method == "device":
        from . import device  # loads jax

        return device.probability(w, certify)
    if w.chain.is_layered:
        return _layered_probability(w, method, certify)
    rates = rates_of(w.chain)
    known = graph.decided(rates.W, w.hit, w.moving, rates.memo)
    free = known.can & w.moving & ~known.sure
    one = w.hit | known.sure
    if method in ("exact", "symbolic"):
        source = "the floats as given" if w.chain.integer_counts is None else "integer counts"
        fractions, expression = _in_rationals(w.chain, rates, free, one, method)
        X = rational.to_columns(fractions)[:, : _sides(certify)]
        return Answer(X, method, f"rational, from {source}", fractions, (), expression)
    if not known.order.cyclic and rates.terms.max(initial=0) <= NARROW:
        order = known.order.sequence
        order = order[free[order]]
        X, report = layered.acyclic(rates, order, one, known.level if certify else None), Report(len(order))
    else:
        ends = np.broadcast_to(one.astype(np.float64)[:, None], (len(one), _sides(certify)))
        how = "recursion" if method == "layered" else method
        X, report = potential(rates, free, ends, None, how, 1.0, known.plan(free))
    return Answer(X, report.method, _graph_note(known) + report.why(), None, tuple(report.failed))


def _in_rationals(chain: Chain, rates: Rates, free: NDArray, one: NDArray, method: str) -> tuple[Any, Any]:
    """Fractions, and the same as sympy numbers if the method is symbolic."""
    if method == "exact":
        return rational.probability(chain, rates, free, one), None
    from . import symbolic

    return symbolic.fractions(rational.rows_of(chain)[0], rates.W, free, one)


def _graph_note(known: graph.Decided) -> str:
    found = f"no cycle, {known.levels} levels found; " if known.levels and not known.order.cyclic else ""
    zero, one = int((~known.can).sum()), int(known.sure.sum())
    return found + (f"the graph alone gives 0 to {zero} and 1 to {one} of the states; " if zero or one else "")


def _layered_probability(w: Walk, method: str, certify: bool) -> Answer:
    if method == "symbolic":
        raise InputError(
            "The symbolic method is for chains with one matrix.",
            cause=f"This chain has {w.chain.n_layers} layers; backward recursion needs no elimination.",
            next='Use method="exact".',
        )
    layers = w.chain.layers
    known = w.hit.astype(np.float64)
    if method == "exact":
        fractions = rational.backward(layers, ~w.moving, known, w.last(1)[:, 0])
        X = np.stack([rational.to_columns(row) for row in fractions])
        return Answer(X[..., : _sides(certify)], "exact", "rational, from the floats as given", fractions)
    X = layered.hitting(layers, w.hit, w.avoid, w.last(1)[:, 0], _sides(certify))
    return Answer(X, "layered", RECURSION)


def duration(w: Walk, gain: NDArray) -> Answer:
    """Expected sum of a non-negative gain over the steps before the hit; inf where a hit is not certain.

    Parameters
    ----------
    gain : array, shape (n, c) or (L, n, c)
        What a step from each state adds; c is 3 for value, lower, upper, or 1.
    """
    if w.chain.is_layered:
        return _layered_duration(w, gain)
    rates = rates_of(w.chain)
    known = graph.decided(rates.W, w.hit, w.moving, rates.memo)
    sure = known.sure
    gain = np.where(sure[:, None], rates.step[:, None] * np.where(sure[:, None], gain, 0.0), 0.0)
    _spread(gain, 2)
    X, report = potential(rates, sure, np.zeros_like(gain), gain, order=known.plan(sure))
    X[~(sure | w.hit)] = np.inf
    return Answer(X, report.method, report.why(), None, tuple(report.failed))


def _spread(gain: NDArray, roundings: int) -> None:
    """Widen a computed gain by the products it was made of."""
    if gain.shape[-1] == 3:
        room, slack = roundings * 2.0**-52, np.where(gain[..., 2] > 0, 4 * TINY, 0.0)
        gain[..., 1] = np.maximum(gain[..., 1] * (1 - room) - slack, 0.0)
        gain[..., 2] = gain[..., 2] * (1 + room) + slack


def _layered_duration(w: Walk, gain: NDArray) -> Answer:
    layers, n = w.chain.layers, w.chain.n_states
    alive = ~w.chain.outcome_mask & w.moving
    sure = layered.sure_layers(layers, w.hit, alive & (w.tail > 0))
    gain = np.broadcast_to(gain, (len(layers), n, gain.shape[-1]))
    gain = np.where(sure[:-1, :, None], gain, 0.0)
    zero = np.zeros((n, gain.shape[-1]))
    X = layered.backward(layers, w.hit, zero, zero, sure, gain)
    X[~sure] = np.inf
    return Answer(X, "layered", RECURSION)


def given_hit(w: Walk, gain: NDArray) -> Answer:
    """Expected sum of a gain over the steps before the hit, on walks that hit; 0 where no walk does.

    For a reward r per step the gain is ``r_i h_i``: ``u_i = E_i[sum; hit] = r_i h_i + sum_j P_ij u_j``, which is the
    time on the chain conditioned to hit (Doob's transform), times h.

    Parameters
    ----------
    gain : array, shape (n, c) or (L + 1, n, c)
    """
    if w.chain.is_layered:
        last = np.zeros((w.chain.n_states, gain.shape[-1]))
        live = layered.reaching_layers(w.chain.layers, w.hit, w.avoid, w.last(1)[:, 0] > 0)
        gain = np.where(w.moving[:, None], gain[:-1], 0.0)
        _spread(gain, 1)
        return Answer(layered.backward(w.chain.layers, ~w.moving, last, last, live, gain), "layered", RECURSION)
    rates = rates_of(w.chain)
    known = graph.decided(rates.W, w.hit, w.moving, rates.memo)
    free = known.can & w.moving
    gain = np.where(free[:, None], rates.step[:, None] * gain, 0.0)
    _spread(gain, 2)
    X, report = potential(rates, free, np.zeros_like(gain), gain, order=known.plan(free))
    return Answer(X, report.method, report.why(), None, tuple(report.failed))


def without_start(what: str) -> InputError:
    """The error of everything that needs a start law."""
    return InputError(
        f"{what} needs a start.",
        cause="The chain has no start law.",
        next="Give the chain `start=` (an index, a label or a law).",
    )


@dataclass(frozen=True)
class Occupation:
    """Expected visits.

    Attributes
    ----------
    Z : array, shape (n, c) or (L + 1, n, c)
        Visits in tokens, time 0 counted; on states that do not move, the probability of arriving there.
    """

    Z: NDArray[np.float64]
    rates: Rates | None
    report: Any


def occupation(chain: Chain, start: NDArray, moving: NDArray, columns: int = 3) -> Occupation:
    """Expected visits from a start law when only `moving` states move.

    For a homogeneous chain a non-moving state must be within reach of every moving one.
    """
    source = np.repeat(start[:, None], columns, axis=1)
    if chain.is_layered:
        return Occupation(layered.forward(chain.layers, moving, source), None, None)
    rates = rates_of(chain)
    Z, report = flow(rates, moving, source)
    scale = np.where(moving, rates.step, 1.0)[:, None]
    return Occupation(Z * scale, rates, report)


def law_mean(start: NDArray, X: NDArray, exact: Any = None) -> tuple[NDArray[np.float64], Fraction | None]:
    """Mean of the columns over a start law, with its rounding; shape (c,)."""
    on = np.flatnonzero(start)
    if exact is not None:
        mean = sum((Fraction(float(start[i])) * exact[i] for i in on), Fraction(0))
        return rational.to_columns([min(mean, Fraction(1))])[0, : X.shape[1]], min(mean, Fraction(1))
    with np.errstate(invalid="ignore"):
        mean = np.array([float(np.sum(start[on] * X[on, c])) for c in range(X.shape[1])])
    if len(mean) == 3 and not (len(on) == 1 and start[on[0]] == 1):
        # Signed rewards make signed ends, so the room is taken from sums of magnitudes; TINY is for underflow.
        with np.errstate(invalid="ignore"):
            size = np.nan_to_num(start[on] @ np.abs(X[on]), nan=0.0, posinf=0.0)
        room = (len(on) + 3) * 2.0**-52 * size + np.where(np.abs(X[on]).any(axis=0), len(on) * TINY, 0.0)
        least = 0.0 if (X[on, 1] >= 0).all() else -np.inf
        mean[1], mean[2] = max(mean[1] - room[1], least), mean[2] + room[2]
    return mean, None
