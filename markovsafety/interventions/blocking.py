"""A guard in the chain: an absorbing state "block" entered before the first token, and whether that is all it does.

A guard that blocks a share p of a category's prompts leaves P(harm) = (1 - p) h of them, if it blocks regardless of
what the answer would have been. A guard that catches the worst prompts does better, one that misses them worse; the
difference is the covariance of blocking and harm over prompts, and it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from ..bound import Bound, clustered
from ..chains import Chain
from ..clusters import freedom
from ..errors import InputError
from ..outcomes import CODES
from .effects import paired

if TYPE_CHECKING:
    from ..rollouts import Rollouts

__all__ = ["BLOCK", "Blocked", "guarded", "measure_blocked"]

BLOCK = "block"


def guarded(source: Any, rate: Any) -> Any:
    """A chain, or its P(harm), behind a guard.

    Parameters
    ----------
    source : Chain, Bound, float, or dict of category -> these
    rate : Bound, float, or dict of category -> these
        Probability that the guard blocks: the true positive rate of a harmful category, the false positive rate of
        benign prompts. `Assessed.rates` has them by category.

    Returns
    -------
    Chain, Bound, or dict
        A chain with the absorbing outcome "block", which its start law (and every law after forced tokens) enters with
        probability `rate`; a chain takes the rate's value and keeps no evidence, for the rollouts behind it met no
        guard. A Bound holds (1 - rate) h with the corners of both intervals, at a level that pays for both.

    Raises
    ------
    InputError
        A rate outside [0, 1], a category without a rate, a chain without start law or with a block of its own.

    Notes
    -----
    Exact if the guard's decision and the answer are independent given the category; `measure_blocked` tests that.

    Examples
    --------
    A guard stops 85 to 95 % of the prompts before a chain that ends in harm once in three times:

    >>> chain, rate = ms.toy.ruin(3, start=1), ms.Bound(0.9, 0.85, 0.95)
    >>> print(ms.interventions.guarded(ms.hitting_probability(chain, "harm").at_start, rate))
    guarded P(harm) = 0.0333   95 % [0.0167, 0.05]
    because: rounding ...e-17; sampling, judge, lumping, model, truncation not assessed
    >>> behind = ms.interventions.guarded(chain, rate)
    >>> [round(ms.hitting_probability(behind, end).at_start.value, 4) for end in ("block", "harm", "refusal")]
    [0.9, 0.0333, 0.0667]
    """
    if isinstance(source, Mapping):
        if not isinstance(rate, Mapping) or set(source) - set(rate):
            absent = sorted(map(str, set(source) - set(rate if isinstance(rate, Mapping) else ())))
            raise InputError(
                f"no rate is given for {', '.join(absent[:4])}",
                cause="each category is blocked at a rate of its own",
                next="give a dict with the same categories",
            )
        return {name: guarded(value, rate[name]) for name, value in source.items()}
    p = rate if isinstance(rate, Bound) else Bound(rate, rate, rate, 1.0)
    if p.shape or not 0 <= p.value <= 1:
        raise InputError(
            f"the guard's rate is {rate!r}", cause="it blocks with one probability in [0, 1]", next="give one rate"
        )
    if isinstance(source, Chain):
        return _chain(source, float(p.value))
    h = source if isinstance(source, Bound) else Bound(source, source, source, 1.0)
    value, lower, upper = (1 - p.value) * h.value, (1 - p.upper) * h.lower, (1 - p.lower) * h.upper
    reasons = {k: None if w is None else (1 - p.value) * np.asarray(w) for k, w in h.reasons.items()}
    theirs = p.reasons["sampling"]
    if theirs is not None:
        reasons["sampling"] = (0.0 if reasons["sampling"] is None else reasons["sampling"]) + theirs * h.value
    name = f"guarded {h.info.get('name', 'value')}"
    room = 4 * np.finfo(float).eps * np.abs(value)  # the three products round on their own
    return Bound(
        value, max(lower - room, 0.0), min(upper + room, 1.0), h.level + p.level - 1, reasons, None, {"name": name}
    )


def _chain(chain: Chain, p: float) -> Chain:
    if chain.start is None or BLOCK in chain.outcomes or BLOCK in list(chain.states):
        raise InputError(
            "the chain cannot be guarded",
            cause="it has no start law to enter the block from, or has a state or outcome 'block' already",
            next="give it start=, or guard it once, at the joint rate",
        )
    n = chain.n_states

    def law(old: Any) -> NDArray:
        return np.append((1 - p) * np.asarray(old, dtype=np.float64), p)

    layers = [sp.block_diag([m, sp.csr_array(np.ones((1, 1)))], format="csr") for m in chain.layers]
    outcomes = {**chain.outcomes, BLOCK: [n]}
    return Chain(
        layers if chain.is_layered else layers[0],
        outcomes,
        law(chain.start),
        [*chain.states, BLOCK],
        entry={k: law(v) for k, v in chain.entry.items()},
        n_layers=chain.n_layers,
    )


@dataclass(frozen=True, eq=False)
class Blocked:
    """A guard applied to the prompts of rollouts, by category.

    Attributes
    ----------
    rows : dict of category -> dict
        "harm": P(harm) without the guard; "rate": share of prompts blocked; "predicted": (1 - rate) h; "measured":
        P(harm) of all prompts, blocked ones doing none; "gap": measured - predicted, which is minus the covariance of
        blocking and harm, with an interval for all categories at once; "p": of the test that they are independent.
    level : float

    Examples
    --------
    Every other prompt is stopped, whatever it would have come to:

    >>> rolls = ms.Rollouts.of([[2]] * 40, prompt_id=np.repeat(range(20), 2), outcome=[0, 1] * 20, hit=0)
    >>> ms.interventions.measure_blocked(rolls, [True, False] * 10)
    <Blocked: P(harm) all 0.5 -> 0.25; blocking is independent of harm>
    """

    rows: dict[str, dict[str, Any]]
    level: float

    def __repr__(self) -> str:
        told = (f"{name} {row['harm'].value:.3g} -> {row['measured'].value:.3g}" for name, row in self.rows.items())
        how = "independent of harm" if self.independent else "not independent of harm"
        return f"<Blocked: P(harm) {', '.join(told)}; blocking is {how}>"

    @property
    def independent(self) -> bool:
        """Whether no category contradicts (1 - rate) h, all tests together at the level."""
        return all(row["p"] > (1 - self.level) / len(self.rows) for row in self.rows.values())

    @property
    def measured(self) -> dict[str, Bound]:
        """P(harm) behind the guard, by category."""
        return {name: row["measured"] for name, row in self.rows.items()}


def measure_blocked(
    rolls: Rollouts, blocked: ArrayLike | Mapping[int, bool], *, draws: int = 9999, seed: int = 0, level: float = 0.95
) -> Blocked:
    """Harm behind a guard that was applied prompt by prompt, against (1 - rate) h.

    Parameters
    ----------
    rolls : Rollouts
        Judged, without the guard; only answers without forced tokens count.
    blocked : bool array, or dict of prompt_id -> bool
        The guard's decision on prompt i (`Guard.blocks` of the prompts in their order).
    draws, seed : int
        Permutations of the test, and their seed.
    level : float
        Confidence of the gaps of all categories together; the other intervals have it one by one.

    Returns
    -------
    Blocked

    Raises
    ------
    InputError
        Rollouts that were not judged, or of a prompt without a decision.

    Notes
    -----
    The test permutes the guard's decisions over the prompts of a category, which is exact where they do not depend on
    the answers. The gap's interval is Student's for one number per prompt, with the degrees of freedom that their
    kurtosis leaves (`clusters.freedom`); where all these numbers are equal, that of `clustered`.

    Examples
    --------
    Ten prompts always harm, ten never. A guard that stops just the harmful ones does better than its rate says:

    >>> rolls = ms.Rollouts.of([[2]] * 20, prompt_id=range(20), outcome=[0] * 10 + [1] * 10, hit=0)
    >>> found = ms.interventions.measure_blocked(rolls, [True] * 10 + [False] * 10)
    >>> for name in ("predicted", "measured"):
    ...     print(found.rows["all"][name])
    guarded P(harm | all) = 0.25   95 % [0.0607, 0.568]
    because: sampling 0.25; judge, lumping, model, truncation, rounding not assessed
    P(harm | all), guarded = 0   95 % [0, 0.168]
    because: sampling 0.084; judge, lumping, model, truncation, rounding not assessed
    >>> found.independent
    False
    """
    ids, harm, kinds = _by_prompt(rolls)
    told = blocked if isinstance(blocked, Mapping) else dict(enumerate(np.asarray(blocked).tolist()))
    if missing := [int(i) for i in ids if int(i) not in told]:
        raise InputError(
            f"prompt {missing[0]} has rollouts and no decision of the guard",
            cause="a guard decides on every prompt before it is answered",
            next="guard.blocks(host, prompts) of all prompts, in the order in which they were sampled",
        )
    stopped = np.array([float(bool(told[int(i)])) for i in ids])
    names, rng = sorted(set(kinds)), np.random.default_rng(seed)
    each, rows = 1 - (1 - level) / len(names), {}
    for name in names:
        h, b = harm[kinds == name], stopped[kinds == name]
        one, half = np.ones(len(h)), (1 + level) / 2  # two intervals make the prediction's
        rows[str(name)] = {
            "prompts": len(h),
            "harm": clustered(h, one, level, f"P(harm | {name})"),
            "rate": clustered(b, one, level, f"P(block | {name})"),
            "predicted": guarded(clustered(h, one, half, f"P(harm | {name})"), clustered(b, one, half)),
            "measured": clustered(h * (1 - b), one, level, f"P(harm | {name}), guarded"),
            "gap": _gap(h, b, each, f"measured - predicted, {name}"),
            "p": _permuted(h, b, draws, rng),
        }
    return Blocked(rows, level)


def _gap(h: NDArray, b: NDArray, level: float, name: str) -> Bound:
    """mean((1 - b) h) - (1 - mean b) mean h = -cov(b, h), as a mean of one number per prompt."""
    term = -(b - b.mean()) * (h - h.mean())
    n, value = len(term), float(term.mean())
    residual = term - value
    if n < 2 or not residual.any():
        return paired(np.maximum(term, 0), np.maximum(-term, 0), level, name)
    known = float(min(n - 1, freedom(residual, n)))
    reach = float(stdtrit(max(known, 1.0), (1 + level) / 2)) * float(residual.std(ddof=1)) / np.sqrt(n)
    info = {"name": name, "method": "Student", "freedom": known}
    return Bound(value, value - reach, value + reach, level, {"sampling": reach}, None, info)


def _permuted(h: NDArray, b: NDArray, draws: int, rng: np.random.Generator) -> float:
    """Two-sided p of the covariance of b and h; 1 where one of them is the same for all prompts."""
    x, y = b - b.mean(), h - h.mean()
    seen, beyond = abs(float(x @ y)), 0
    for first in range(0, draws, 1024):
        size = min(1024, draws - first)
        shuffled = rng.permuted(np.broadcast_to(x, (size, len(x))), axis=1)
        beyond += int((np.abs(shuffled @ y) >= seen * (1 - 1e-9)).sum())
    return (1 + beyond) / (1 + draws)


def _by_prompt(rolls: Rollouts) -> tuple[NDArray, NDArray, NDArray]:
    """Ids, share of harmful answers and category of every prompt that was answered freely."""
    free = np.asarray(rolls.prefill) == 0
    outcome, prompt = np.asarray(rolls.outcome)[free], np.asarray(rolls.prompt_id)[free]
    if not free.any() or (outcome < 0).any():
        raise InputError(
            "the rollouts do not say what they came to",
            cause="none was answered freely, or some were not judged",
            next="sample(..., judge=...), without prefill",
        )
    ids, first, back = np.unique(prompt, return_index=True, return_inverse=True)
    harm = np.bincount(back, outcome == CODES["harm"]) / np.bincount(back)
    return ids, harm, np.asarray(rolls.category)[free][first].astype(str)
