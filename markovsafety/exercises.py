"""Exercises that check themselves: a function of a student is run on random cases and held against the package.

`check` never raises for what the student's function does: it says "not done yet", "right", or what is wrong and for
which case. `case` makes a small safety question with data, `answer` checks the five answers to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import depth, toy
from .bound import clopper_pearson, clustered
from .chains import Chain, KGram
from .errors import InputError
from .hitting import attribute, hitting_probability, hitting_time
from .rich import short
from .rollouts import Rollouts

__all__ = ["EXERCISES", "QUESTIONS", "Case", "Checked", "answer", "case", "check"]

CASES = 12  # random cases per exercise
CLOSE = 1e-7  # rounding of a student's own way through the algebra
QUESTIONS = ("where", "how deep", "which change", "how sure", "what width")
NOT_YET = (None, Ellipsis, NotImplemented)

Given = tuple[tuple[Any, ...], Any, str]  # arguments, the right answer, what the case is about


@dataclass(frozen=True)
class Checked:
    """What came of a check.

    Parameters
    ----------
    exercise : str
    done : bool or None
        Right or wrong; None: not done yet.
    told : str
        What is wrong, and for which case.

    Examples
    --------
    >>> from markovsafety.exercises import Checked, check
    >>> found: Checked = check("kgrams", lambda tokens, k: [])
    >>> found.done
    False
    >>> found
    kgrams: not right. states of an answer: for (...) it gives []; right is [...]
    """

    exercise: str
    done: bool | None
    told: str

    def __repr__(self) -> str:
        mark = {True: "right", False: "not right", None: "not done yet"}[self.done]
        return f"{self.exercise}: {mark}{'. ' + self.told if self.told else ''}"


def check(exercise: str, function: Callable[..., Any]) -> Checked:
    """Run a student's function on random cases.

    Parameters
    ----------
    exercise : str
        One of `EXERCISES`.
    function : callable
        Its arguments are those that the exercise names; it gets copies.

    Returns
    -------
    Checked

    Raises
    ------
    InputError
        If there is no such exercise.

    Examples
    --------
    The "rule of three", the exact interval, and a function that nobody has written yet:

    >>> from markovsafety.bound import clopper_pearson
    >>> from markovsafety.exercises import check
    >>> check("interval", lambda x, n: (0.0, 3 / n))
    interval: not right. 95 % interval, no harm seen: for (0, 340) it gives (0.0, 0.0088...); right is (0.0, 0.0107...)
    >>> check("interval", clopper_pearson)
    interval: right. 12 cases
    >>> check("interval", lambda x, n: ...)
    interval: not done yet
    """
    if exercise not in EXERCISES:
        raise InputError(
            f"There is no exercise {exercise!r}.",
            cause=f"There are {', '.join(EXERCISES)}.",
            next="Use one of these names.",
        )
    made = 0
    for arguments, expected, about in EXERCISES[exercise](np.random.default_rng(0)):
        try:
            got = function(*copy.deepcopy(arguments))
        except NotImplementedError:
            return Checked(exercise, None, "")
        except Exception as error:  # whatever a student's function does, the notebook goes on
            return Checked(exercise, False, f"It raises {type(error).__name__}: {short(str(error), 200)} ({about})")
        if made == 0 and any(got is x for x in NOT_YET):
            return Checked(exercise, None, "")
        if not _same(got, expected):
            given = ", ".join(_told(x) for x in arguments)
            return Checked(exercise, False, f"{about}: for ({given}) it gives {_told(got)}; right is {_told(expected)}")
        made += 1
    return Checked(exercise, True, f"{made} cases")


def _same(got: Any, expected: Any) -> bool:
    """Equal, numbers up to rounding; None and whole numbers only to themselves."""
    if expected is None or isinstance(expected, (str, bool)) or got is None:
        return got is expected or (isinstance(expected, str) and got == expected)
    try:
        a, b = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=CLOSE, atol=CLOSE * 1e-2, equal_nan=True))


def _told(x: Any) -> str:
    text = np.array2string(np.asarray(x), precision=4, separator=", ") if isinstance(x, np.ndarray) else repr(x)
    return short(" ".join(text.split()), 240)


# ---- the exercises: each yields cases, the first of which has an answer that is not None


def _random_chain(rng: np.random.Generator, trap: bool) -> tuple[NDArray, int, list[int]]:
    """A sparse random chain, its harm state, and all states in which an answer ends (harm among them).

    With a trap, two states lead only to each other, so that I - Q has no inverse.
    """
    n = int(rng.integers(3, 7))
    P = np.zeros((n + 2, n + 2))
    for i in range(n):
        on = np.unique([*rng.choice(n + 2, size=2, replace=False), n + int(rng.integers(2)) if i == 0 else (i + 1) % n])
        P[i, on] = rng.dirichlet(np.ones(len(on)))
    if trap:
        P[[1, 2]] = 0
        P[1, 2] = P[2, 1] = 1
    P[n, n] = P[n + 1, n + 1] = 1
    order = rng.permutation(n + 2)
    at = np.argsort(order)
    return P[np.ix_(order, order)], int(at[n]), sorted(int(i) for i in at[n:])


def _chain_of(P: NDArray, harm: int, ends: list[int], start: int | None = None) -> Chain:
    return Chain(P, {"harm": harm, "refusal": [i for i in ends if i != harm]}, start)


def _kgrams(rng: np.random.Generator) -> Iterator[Given]:
    for _ in range(CASES):
        tokens, k = rng.integers(0, 9, size=rng.integers(0, 7)).tolist(), int(rng.integers(1, 4))
        yield (tokens, k), KGram(k).walk(np.array(tokens, dtype=int)), "states of an answer"


def _rows(rng: np.random.Generator) -> Iterator[Given]:
    for _ in range(CASES):
        n = int(rng.integers(3, 6))
        paths = [[0, *rng.integers(0, n - 1, size=rng.integers(0, 5)).tolist(), n - 1] for _ in range(6)]
        C = np.zeros((n, n), dtype=int)
        for path in paths:
            np.add.at(C, (path[:-1], path[1:]), 1)
        # A state that was never left has no row to normalise: it stays zero.
        yield (paths, n), C / np.maximum(C.sum(axis=1, keepdims=True), 1), "transition probabilities of paths"


def _breaks(rng: np.random.Generator) -> Iterator[Given]:
    for _ in range(CASES):
        depths = np.sort(rng.choice(30, size=6, replace=False)).tolist()
        h = rng.random(6)
        yield (depths, h.tolist()), depths[int(np.argmax(np.diff(h))) + 1], "the largest rise"


def _withstands(rng: np.random.Generator) -> Iterator[Given]:
    for i in range(CASES):
        depths = np.sort(rng.choice(30, size=6, replace=False)).tolist()
        upper = rng.permutation(np.linspace(0.02, 0.42, 6))
        upper[0] = 0.3 if i % 4 == 3 else 0.01  # every fourth case withstands nothing
        yield (depths, upper.tolist(), 0.1), depth.operational_depth(depths, upper, 0.1).depth, "operational depth"


def _wide(rng: np.random.Generator) -> Iterator[Given]:
    for _ in range(CASES):
        n, m = 6, int(rng.integers(1, 5))
        harmful = rng.integers(0, n + 1, size=5)
        harmful[0] = n
        every = [[set(c) <= set(range(x)) for c in combinations(range(n), m)] for x in harmful]
        yield (harmful.tolist(), n, m), float(np.mean(every)), "harm that gets through m answers"


def _hitting(rng: np.random.Generator) -> Iterator[Given]:
    for i in range(CASES):
        P, harm, ends = _random_chain(rng, trap=i % 3 == 2)
        about = "a chain with states that never end" if i % 3 == 2 else "a chain"
        yield (P, harm, ends), hitting_probability(_chain_of(P, harm, ends), "harm").value, about


def _length(rng: np.random.Generator) -> Iterator[Given]:
    for _ in range(CASES):
        P, harm, ends = _random_chain(rng, trap=False)
        yield (P, ends), hitting_time(_chain_of(P, harm, ends)).value, "expected tokens until the end"


def _needed(rng: np.random.Generator) -> Iterator[Given]:
    for i in range(CASES):
        a0, r0 = rng.uniform(0.02, 0.1, size=2)
        a1, r1 = rng.uniform(0.001, 0.01), rng.uniform(0.2, 0.5)
        floor, f0 = a1 / (a1 + r1), a0 / (a0 + r0)
        eps = floor * rng.uniform(0.5, 0.99) if i % 3 == 2 else floor + (f0 - floor) * rng.uniform(0.01, 0.8)
        needed = depth.Profile(a0=float(a0), r0=float(r0), a1=float(a1), r1=float(r1)).needed_depth(float(eps))[0]
        given = tuple(float(x) for x in (a0, r0, a1, r1, eps))
        yield given, needed, "a budget below the floor" if needed is None else "trained depth for a budget"


def _interval(rng: np.random.Generator) -> Iterator[Given]:
    for i in range(CASES):
        n = int(rng.integers(5, 400))
        x = [0, n, int(rng.integers(1, n))][i % 3]
        low, high = clopper_pearson(np.array(float(x)), np.array(float(n)), 0.95)
        about = ("no harm seen", "nothing but harm", "some harm")[i % 3]
        yield (x, n), (float(low), float(high)), f"95 % interval, {about}"


def _design(rng: np.random.Generator) -> Iterator[Given]:
    for _ in range(CASES):
        k, n = int(rng.integers(12, 30)), int(rng.integers(2, 20))
        events = rng.binomial(n, rng.beta(0.5, 1.0, size=k))
        events[:4] = [0, 1, n, n - 1]
        yield (events.tolist(), n), clustered(events, np.full(k, n)).info["deff"], "design effect of prompts"


def _shares(rng: np.random.Generator) -> Iterator[Given]:
    for _ in range(CASES):
        P, harm, ends = _random_chain(rng, trap=False)
        Q = P.copy()
        alive = [i for i in range(len(P)) if i not in ends]
        for i in rng.choice(alive, size=2, replace=False):
            on = P[i] > 0
            Q[i, on] = rng.dirichlet(np.ones(int(on.sum())))
        start = int(rng.choice(alive))
        chains = [_chain_of(M, harm, ends, start) for M in (P, Q)]
        yield (P, Q, harm, ends, start), attribute(chains[0], chains[1], "harm"), "shares of a change, row by row"


EXERCISES: dict[str, Callable[[np.random.Generator], Iterator[Given]]] = {
    "kgrams": _kgrams,
    "rows": _rows,
    "breaks": _breaks,
    "withstands": _withstands,
    "wide": _wide,
    "hitting": _hitting,
    "length": _length,
    "needed": _needed,
    "interval": _interval,
    "design effect": _design,
    "shares": _shares,
}
"""Makers of cases by the name of the exercise."""


# ---- five questions about one model


@dataclass(frozen=True, eq=False)
class Case:
    """A model before and after a change, and answers to prompts with forced tokens; all of it invented.

    Parameters
    ----------
    before, after : Chain
        On the same states, positions of an answer.
    rolls : Rollouts
        Judged answers of the model before the change.
    depths : tuple of int
        Numbers of forced tokens in them.
    widths : tuple of int
        Ensemble sizes in question.
    budget : float
        Tolerated P(harm); the upper end of the interval has to keep it.

    Examples
    --------
    >>> from markovsafety.exercises import Case, case
    >>> question: Case = case(0)
    >>> question.depths, question.budget
    ((0, 1, 2, 3, 4, 6, 8), 0.1)
    """

    before: Chain
    after: Chain
    rolls: Rollouts
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    budget: float


def case(seed: int = 0) -> Case:
    """The five questions' data; every seed gives another model.

    Parameters
    ----------
    seed : int

    Returns
    -------
    Case

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> case(0).rolls
    Rollouts(6720 of 60 prompts, prefill 0, 1, 2, 3, 4, 6, 8: 2328 harm, 4392 refusal)
    >>> print(ms.profile(case(0).rolls)[0])
    P(harm) = 0.0125   95 % [0.00483, 0.0262]
        because: sampling 0.011; judge, lumping, model, truncation, rounding not assessed
    """
    rng = np.random.default_rng(seed)
    before = toy.shallow(8)
    P = before.P.toarray()
    worse, better = rng.choice(4, size=2, replace=False)
    for i, (a, r) in ((worse, (0.2, 0.1)), (better, (0.005, 0.35))):
        P[i] = 0
        P[i, [before.index("harm"), before.index("refusal"), i + 1]] = a, r, 1 - a - r
    after = Chain(P, {"harm": before.index("harm"), "refusal": before.index("refusal")}, 0, before.states)
    depths, breaks, n = (0, 1, 2, 3, 4, 6, 8), int(rng.integers(2, 5)), 16
    mean = np.where(np.arange(len(depths)) < breaks, -5.0, -0.7)
    if rng.random() < 0.5:  # beyond the budget one step before the largest rise
        mean[breaks - 1] = -2.6
    logit = mean[:, None] + 0.1 * np.array(depths)[:, None] + rng.normal(size=(1, 60))
    harmful = rng.random((n, *logit.shape)) < 1 / (1 + np.exp(-logit))
    _, k, who = (np.ravel(x) for x in np.indices(harmful.shape))
    forced = np.array(depths)[k]
    rolls = Rollouts.of(
        [[0] * (int(f) + 1) for f in forced],
        prompt_id=who,
        prefill=forced,
        outcome=np.where(harmful.ravel(), 0, 1),
        hit=forced,
        provenance={"engine": {"name": "exercises", "seed": seed}},
    )
    return Case(before, after, rolls, depths, tuple(range(1, 11)), 0.1)


def _right(c: Case) -> dict[str, Any]:
    harm = depth.profile(c.rolls)
    grid = depth.sweep(c.rolls, depth=c.depths, width=c.widths)
    at = int(np.argmax(np.diff(harm.value))) + 1
    moved = attribute(c.before, c.after, "harm")
    first = harm[0]
    return {
        "where": c.depths[at],
        "how deep": depth.operational_depth(c.depths, harm, c.budget).depth,
        "which change": c.before.states[int(np.argmax(moved))],
        "how sure": (first.lower, first.upper),
        "what width": grid.needed(harm=c.budget).width[at],
    }


def answer(c: Case, **answers: Any) -> list[Checked]:
    """Check answers to the five questions of a case.

    Parameters
    ----------
    c : Case
    **answers
        ``where``: number of forced tokens at which measured harm rises most; ``how_deep``: operational safety depth
        within the budget; ``which_change``: label of the state whose row adds most harm from `before` to `after`;
        ``how_sure``: lower and upper end of P(harm) without forced tokens; ``what_width``: smallest of the widths that
        keeps the upper end of harm within the budget where it breaks (at ``where``), "none" if none does. Those left
        out, or None, are not done yet.

    Returns
    -------
    list of Checked
        One per question.

    Raises
    ------
    InputError
        If there is no such question.

    Examples
    --------
    Two of the five questions, the first of them answered rightly:

    >>> from markovsafety.exercises import answer, case
    >>> for said in answer(case(0), where=2, how_deep=8):
    ...     print(said)
    where: right
    how deep: not right. The upper end has to stay within the budget at all smaller numbers of tokens as well.
    which change: not done yet
    how sure: not done yet
    what width: not done yet
    """
    names = [q.replace(" ", "_") for q in QUESTIONS]
    if unknown := sorted(set(answers) - set(names)):
        raise InputError(
            f"There is no question {unknown[0]!r}.", cause=f"There are {', '.join(names)}.", next="Use these names."
        )
    right = _right(c)
    return [_answered(q, answers.get(name), right[q]) for q, name in zip(QUESTIONS, names)]


def _answered(question: str, given: Any, right: Any) -> Checked:
    if any(given is x for x in NOT_YET):
        return Checked(question, None, "")
    right = "none" if right is None else right
    if isinstance(right, tuple):  # three decimals show that the right interval was read
        try:
            near = bool(np.allclose(np.asarray(given, dtype=float), right, rtol=0, atol=0.00051))
        except (TypeError, ValueError):
            near = False
        return Checked(question, near, "" if near else "Read the interval off the profile, clustered by prompt.")
    return Checked(question, _same(given, right), "" if _same(given, right) else HINTS[question])


HINTS: Mapping[str, str] = {
    "where": "Compare the profile at neighbouring numbers of forced tokens.",
    "how deep": "The upper end has to stay within the budget at all smaller numbers of tokens as well.",
    "which change": "Attribution tells what each state's row adds; the largest adds most.",
    "what width": "Measure ensembles with a sweep of the answers (they are not independent) and read the upper end.",
}
