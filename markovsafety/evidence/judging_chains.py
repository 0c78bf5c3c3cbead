"""Chains whose outcomes were named by a judge that errs: the harm that is left when its errors are taken out.

Let the errors depend on the true outcome and the category only. From a state, the chances of the *judged* outcomes are
then those of the true ones times the confusion matrix, whatever the roads between; and both solve the same linear
equations, with other right-hand sides. So the correction commutes with the solve: the chain is solved once with the
verdicts as they are, and every h is corrected afterwards, exactly as a rate is (`markovsafety.evidence.judging_rates`).
Drawing confusion matrices and solving again for each gives the same numbers at many times the cost.

What that needs differs between states. At the start and after every prefill, h is a share of whole rollouts, so the
errors need not depend on where in the answer the judge places the hit. Within the answer, a state is only passed by
rollouts that were not yet judged: there the errors must also not depend on the prefix. A judge that misses harm which
comes late gives a right h at the start, if its labels come from such rollouts, and too low an h deep inside."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, check_level, clopper_pearson
from ..chains import Chain, Counts, estimate
from ..chains.counts import Table, group
from ..errors import InputError
from ..hitting import hitting_probability
from ..outcomes import CODES, OUTCOMES
from .judging import Confusion
from .judging_rates import Rate, bound_of, check_options, corrected, corrected_rate, mixture, skill_of, trusted

__all__ = ["corrected_counts", "corrected_harm", "full_rates", "true_outcomes"]

HARM, SIZE = CODES["harm"], len(OUTCOMES)
STEPS, CLOSE = 20_000, 1e-13


def corrected_harm(
    source: Any, found: Confusion, *, level: float = 0.95, bias: str = "corrected", doubtful: str = "refuse"
) -> Bound:
    """Probability of harm from every state, with the judge's errors taken out.

    Parameters
    ----------
    source : Counts, or Chain estimated from Counts
        Made from the verdicts of the judge.
    found : Confusion
        Of that judge.
    level, bias, doubtful
        As in `corrected`.

    Returns
    -------
    Bound
        Shape (n,), as `hitting_probability` orders the states; outcome states are what they are called. ``at_start``
        is the corrected share of the rollouts without prefill, and ``info["entry"]`` holds the corrected Bound after
        every measured number of forced tokens: what the chain says there is the share of its rollouts, and no more.

    Raises
    ------
    InputError
        If the chain does not remember its counts, or a category was not labelled.
    UntrustedError
        If the labels do not show that the judge is better than chance; `partial` is the Bound.

    Examples
    --------
    A judge that misses half of the harm, seen from the state in which an answer that complies begins:

    >>> said = [[5, 9, 2], [5, 8, 2], [7, 2], [5, 6, 2]] * 100
    >>> rolls = ms.Rollouts.of(said, prompt_id=np.arange(400) // 4)
    >>> judged = ms.judge(rolls, "lexicon", harm=[9], refusal=[7], eos_ids=[2])
    >>> labels = ["harm", "harm", "refusal", "benign"] * 40 + [None] * 240
    >>> chain = ms.estimate(ms.count(judged, states=ms.KGram(1)))
    >>> print(ms.hitting_probability(chain, "harm")[chain.index((5,))])
    P(harm) = 0.333   95 % [0.28, 0.39]
        because: sampling 0.055, rounding 5e-16; judge, lumping, model, truncation not assessed
    >>> print(ms.evidence.corrected_harm(chain, ms.confusion(judged, labels))[chain.index((5,))])
    P(harm) = 0.667   95 % [0.488, 0.902]
        because: sampling 0.11, judge 0.17; lumping, model, truncation, rounding not assessed
    """
    check_level(level)
    check_options(found, None, level, bias, doubtful)
    counts = _counts_of(source)
    chain = source if isinstance(source, Chain) else estimate(counts)
    h = hitting_probability(chain, "harm", level=level)
    names = counts.categories if found.by else (None,)
    skills = {name: skill_of(found, name, level) for name in names}
    if found.by:
        inner = _by_category(counts, h, skills, level)
    else:
        inner = corrected_rate(h, skills[None].sensitivity, skills[None].alarms)
    entry = corrected(counts, found, level=level, bias=bias, doubtful="keep")
    S = len(counts.states)
    ends = [np.asarray(getattr(h, n)) for n in ("value", "lower", "upper")]
    none = np.zeros_like(ends[0])
    own = Rate(ends[0], ends[0], ends[1], ends[2], none, none)
    here = np.arange(chain.n_states) < S
    rate = Rate.of(lambda n: np.where(here, getattr(inner, n), getattr(own, n)))
    info = {
        "name": "P(harm)",
        "entry": {k: entry[i] for i, k in enumerate(entry.info["coords"]["depth"])},
        "why": "solved once; the correction commutes with the solve",
    }
    start = entry.start if chain.start is not None else None
    return trusted(bound_of(rate, ends, skills.values(), level, bias, info, start), skills.values(), doubtful)


def _counts_of(source: Any) -> Counts:
    counts = source if isinstance(source, Counts) else getattr(source, "counts", None)
    if not isinstance(counts, Counts):
        raise InputError(
            f"{type(source).__name__} does not say what its outcomes were counted from.",
            cause="A judge's errors are taken out of counts of its verdicts; a chain given by numbers has none.",
            next="Pass Counts, or the chain that estimate(counts) gave.",
        )
    return counts


def _by_category(counts: Counts, h: Bound, skills: dict[Any, Any], level: float) -> Rate:
    """Every state's h, from the chances of harm in each category and of each category."""
    S, names = len(counts.states), list(skills)
    split = estimate(counts, categories=True)
    assert split.evidence is not None
    trials = split.evidence.trials(HARM, level)[:S]
    harm, ended = _ends(counts, names), _ends(_all_harm(counts), names)
    share = ended / np.maximum(ended.sum(axis=0), 1e-300)
    rates = []
    for i, skill in enumerate(skills.values()):
        value = np.divide(harm[i], ended[i], out=np.zeros(S), where=ended[i] > 0)
        value, n = np.clip(value, 0.0, 1.0), trials * share[i]  # a category has that share of the independent trials
        lower, upper = clopper_pearson(value * n, n, level)
        q = Bound(value, np.minimum(lower, value), np.maximum(upper, value), level, {"sampling": (upper - lower) / 2})
        rates.append(corrected_rate(q, skill.sensitivity, skill.alarms))
    one = mixture(rates, share)
    pad = np.zeros(h.shape[0] - S)
    return Rate.of(lambda n: np.concatenate([getattr(one, n), pad]))


def _ends(counts: Counts, names: list[str]) -> NDArray[np.float64]:
    """Probability of ending in harm in each category, shape (categories, S)."""
    chain = estimate(counts, categories=True)
    h = hitting_probability(chain, {name: f"harm: {name}" for name in names}, certify=False)
    return np.asarray(h.value)[: len(counts.states)].T


def _all_harm(counts: Counts) -> Counts:
    """The same rollouts with every outcome called harm."""
    share = np.zeros((len(counts.tally), SIZE, SIZE))
    share[:, :, HARM] = 1
    return _shared_out(counts, share)


def true_outcomes(judged: Any, rates: Any) -> NDArray[np.float64]:
    """The most likely law of true outcomes behind shares of verdicts.

    Parameters
    ----------
    judged : array, shape (4,)
        Shares (or numbers) of verdicts.
    rates : array, shape (4, 4)
        P(judged | true), as `full_rates` gives it.

    Returns
    -------
    array, shape (4,)
        Not negative, sum 1. Where the plain inverse is not negative, it is the inverse.

    Notes
    -----
    The inverse, or else the expectation-maximisation of Y. Vardi, D. Lee (J. R. Stat. Soc. B 55 (1993) 569), which
    stays within the laws.
    """
    y, M = np.asarray(judged, dtype=np.float64), np.asarray(rates, dtype=np.float64)
    y = y / y.sum()
    if np.linalg.cond(M) < 1e12:
        x = np.linalg.solve(M.T, y)
        if (x >= -1e-12).all():
            x = np.maximum(x, 0.0)
            return x / x.sum()
    x = np.full(len(y), 1 / len(y))
    for _ in range(STEPS):
        expected, old = x @ M, x
        x = x * (M @ np.divide(y, expected, out=np.zeros_like(y), where=expected > 0))
        x = x / x.sum()
        if np.abs(x - old).max() < CLOSE:
            break
    return x


def full_rates(found: Confusion, category: str | None = None) -> NDArray[np.float64]:
    """P(judged | true), shape (4, 4), without gaps.

    An outcome without labels is taken as never mistaken, except that what is not harm is called harmful as often as the
    labelled rest.
    """
    M, counts = found.rates(category), found.matrix(category)
    rest = counts[[o != HARM for o in range(SIZE)]].sum(axis=0)
    alarms = rest[HARM] / rest.sum() if rest.sum() else 0.0
    for o in np.flatnonzero(np.isnan(M).any(axis=1)):
        M[o] = np.eye(SIZE)[o]
        if o != HARM:
            M[o, HARM], M[o, o] = alarms, 1 - alarms
    return M


def corrected_counts(counts: Counts, found: Confusion) -> Counts:
    """Counts with every verdict shared out among the true outcomes that it may stand for.

    Parameters
    ----------
    counts : Counts
        Of the judge's verdicts.
    found : Confusion

    Returns
    -------
    Counts
        Of weighted rollouts; nothing in them is negative, and their number is unchanged. Recorded class
        masses are left out: they are about tokens, not about truth.

    Raises
    ------
    InputError
        If a category was not labelled, or no verdict of some kind can be explained by the labels.

    Notes
    -----
    ``P(true | judged)`` of a category at a depth is Bayes' rule with the law of `true_outcomes` there as prior, the
    same in all states. So the share of harm at every depth is the corrected one: exactly where the plain inverse of
    the confusion matrix is a law, and that of `corrected` if what is not harm is mistaken for it alike.
    The plain inverse of every row would be unbiased row by row, but negative in rows without harm; cut off at 0, it
    would undo the correction. Intervals of the resulting chain know nothing of the judge: `corrected_harm` gives those.

    Examples
    --------
    A judge that misses half of the harm:

    >>> said = [[5, 9, 2], [5, 8, 2], [7, 2], [5, 6, 2]] * 100
    >>> rolls = ms.Rollouts.of(said, prompt_id=np.arange(400) // 4)
    >>> judged = ms.judge(rolls, "lexicon", harm=[9], refusal=[7], eos_ids=[2])
    >>> labels = ["harm", "harm", "refusal", "benign"] * 40 + [None] * 240
    >>> ms.count(judged).tally
    <Tally 400 rollouts (100 harm + 100 refusal + 200 benign + 0 truncated) in 100 groups,
        prefill 0>
    >>> ms.evidence.corrected_counts(ms.count(judged), ms.confusion(judged, labels)).tally
    <Tally 400 rollouts (200 harm + 100 refusal + 100 benign + 0 truncated) in 100 groups,
        prefill 0>
    """
    if not isinstance(counts, Counts):
        raise InputError(
            f"{type(counts).__name__} are no Counts.", cause="Verdicts are shared out in counts.", next="count(rolls)."
        )
    check_options(found, None, 0.95, "corrected", "keep")
    share = np.empty((len(counts.tally), SIZE, SIZE))  # group, judged, true
    t = counts.tally
    for name in counts.categories if found.by else (None,):
        rates = full_rates(found, name)
        for k in counts.prefills:
            rows = (t.prefill == k) & (True if name is None else t.category == name)
            share[rows] = _bayes(t.outcomes[rows].sum(axis=0), rates, name)
    return _shared_out(counts, share)


def _shared_out(counts: Counts, share: NDArray) -> Counts:
    """Counts whose outcomes are replaced, group by group, by `share`, shape (groups, judged, true)."""
    t, S = counts.tally, len(counts.states)
    tally, row = group(t.prompt_id, t.category, t.prefill, np.einsum("gj,gjt->gt", t.outcomes, share))
    moved, begun, passed = (_shared(x, share, S, row) for x in (counts.transitions, counts.entries, counts.passages))
    return Counts(counts.kind, counts.states, tally, moved, begun, passed, {})


def _bayes(judged: NDArray, rates: NDArray, name: str | None) -> NDArray[np.float64]:
    """P(true | judged), shape (judged, true)."""
    if not judged.sum():
        return np.eye(SIZE)
    joint = true_outcomes(judged, rates)[:, None] * rates
    total = joint.sum(axis=0)
    strange = (judged > 0) & (total <= 0)
    if strange.any():
        verdict = OUTCOMES[int(np.argmax(strange))]
        raise InputError(
            f"The labels do not explain the verdict {verdict!r}{'' if name is None else f' in category {name!r}'}.",
            cause="It occurs among the rollouts, but with no labelled one.",
            next="Label some of those rollouts.",
        )
    return np.where(total > 0, joint / np.where(total > 0, total, 1.0), np.eye(SIZE)).T


def _shared(table: Table, share: NDArray, S: int, row: NDArray) -> Table:
    """A table whose last key may be an outcome, with each outcome replaced by the true ones."""
    last = table.source if table.target is None else table.target
    out = last >= S
    again = np.repeat(np.flatnonzero(out), SIZE)
    truth = np.tile(np.arange(SIZE), int(out.sum()))
    weight = share[table.group[again], last[again] - S, truth]
    keep = weight > 0
    again, truth, weight = again[keep], truth[keep], weight[keep]
    stay = np.flatnonzero(~out)
    rows = np.concatenate([stay, again])
    key = np.concatenate([last[stay], S + truth])
    values = {n: v[rows] * np.concatenate([np.ones(len(stay)), weight]) for n, v in table.values.items()}
    source = key if table.target is None else table.source[rows]
    return Table(row[table.group[rows]], source, None if table.target is None else key, values)
