"""From counts to a chain: plain frequencies, a smoothed posterior mean, or rows from recorded class masses.

The plain estimate has one property worth knowing before trusting it: if all rollouts begin in the same state law and
none of them is censored, its hitting probability at the start *equals* the raw fraction of harmful rollouts, whatever
the states are. The flow of the counts is conserved, so their visits solve the chain's own equations. The start value
therefore says nothing about the states; other starts, horizons and interventions do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import CODES, OUTCOMES
from .chain import Chain, Evidence
from .counts import Counts, Table
from .tally import collect

__all__ = ["METHODS", "PRIOR", "estimate", "scaled", "single_token_outcomes", "smoothed", "stacked"]

METHODS = ("mle", "dirichlet", "mass")
PRIOR = 0.5  # pseudo-transitions added to a whole row
_LAST = CODES["truncated"]


def estimate(counts: Counts, method: str = "mle", prior: float | None = None, *, categories: bool = False) -> Chain:
    """Estimate a chain from counts.

    Parameters
    ----------
    counts : Counts
    method : {"mle", "dirichlet", "mass"}
        "mle": relative frequencies. "dirichlet": posterior mean under a symmetric prior. "mass": the probability of
        the next token being in an outcome's class as the model reported it, instead of how often it was sampled; see
        Notes.
    prior : float, optional
        "dirichlet" only: pseudo-transitions per row, `PRIOR` if not given, shared equally by the targets observed in
        that row and the outcomes.
    categories : bool
        Split the harm outcome into one state per prompt category, labelled ``"harm: <category>"``.

    Returns
    -------
    Chain
        The visited states, then harm, refusal, benign and truncated, seen or not. `start` is the state law of the
        rollouts without prefill (None if there are none), `entry` the law after each measured number of forced
        tokens, `counts` the counts, `evidence` what sampling intervals need.

    Raises
    ------
    InputError
        If `counts` are no Counts, the method is unknown, every rollout was truncated, the prior is not positive, or
        class masses are missing or do not fit the hits.

    Notes
    -----
    Smoothing biases rare outcomes upwards: a row with n visits gives an outcome never seen there the probability
    ``prior / (n + prior) / (number of targets)``, and a path adds this up over its rows. With 100 rollouts of an answer
    of five positions with P(harm) = 0.0139, one pseudo-count for *every* target (Laplace's rule) gives 0.057 on the
    average, and a tenth of one 0.019. Use it to keep doors open, not to measure; bounds computed from such a chain say
    so. "mle" and "mass" have no prior.

    "mass": one visit's chance of harm is the mean recorded mass of the harm class. Truncation is no token and keeps
    its own frequency; the rest is shared by the other observed targets in proportion to their counts. If there is
    none (the state was seen only with the hit), the rest goes to "truncated", which means not observed, rather than
    to harm. An outcome's mass is its chance of being hit only where the hit is the event "a token of the class is
    sampled"; `single_token_outcomes` tests this. Harm must pass; the masses of refusal and benign are used if they
    pass and ignored otherwise.

    Examples
    --------
    >>> rolls = ms.Rollouts.of(
    ...     [[5, 9], [7, 2], [5, 8, 2], [7, 2]],
    ...     prompt_id=[0, 0, 1, 1],
    ...     outcome=["harm", "refusal", "benign", "refusal"],
    ...     hit=[1, 1, 2, 1],
    ... )
    >>> chain = ms.estimate(ms.count(rolls, states=ms.KGram(1)))
    >>> chain
    <Chain 8 states, homogeneous, 10 transitions; outcomes harm (1), refusal (1), benign (1),
        truncated (1); start: state 0 ((-1,))>
    >>> print(ms.hitting_probability(chain, "harm")[chain.index((5,))])
    P(harm) = 0.5   95 % [0.0126, 0.987]
        because: sampling 0.49, rounding 7e-16; judge, lumping, model, truncation not assessed
    """
    if not isinstance(counts, Counts):
        raise InputError(
            f"estimate() was given a {type(counts).__name__}, not Counts.",
            cause="A chain is estimated from transition counts.",
            next="Call estimate(count(rolls)), or read_counts(path) for a file of counts.",
        )
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}.", cause=f"Methods are {METHODS}.", next="Use one of these.")
    if prior is not None and not (method == "dirichlet" and np.isfinite(prior) and prior > 0):
        raise InputError(
            f"prior is {prior} with method {method!r}.",
            cause="A prior is a positive number of pseudo-transitions per row, and only 'dirichlet' has one.",
            next="Drop it, or pass method='dirichlet', prior=0.5.",
        )
    ends = counts.tally.outcomes.sum(axis=0)
    if ends[:_LAST].sum() == 0:
        raise InputError(
            f"All {counts.rollouts:g} rollouts were truncated.",
            cause="None reached harm, refusal or its end within the token limit: nothing is known about the outcomes.",
            next="Sample with a larger max_tokens.",
            partial=counts,
        )
    names, column = _outcome_columns(counts, categories)
    inner, outer = _split(counts, len(names), column)
    visits = np.asarray(inner.sum(axis=1)).ravel() + outer.sum(axis=1)
    added = 0.0
    if method == "dirichlet":
        added = PRIOR if prior is None else float(prior)
        inner, outer = smoothed(inner, outer, added)
    elif method == "mass":
        inner, outer = _from_mass(counts, inner, outer, visits, column)
    return _assemble(counts, inner, outer, visits, names, column, added)


def _outcome_columns(counts: Counts, categories: bool) -> tuple[list[str], NDArray]:
    """Labels of the outcome states, and the label's number for every (group, outcome code), shape (groups, 4)."""
    harm, where = [OUTCOMES[0]], np.zeros(len(counts.tally), dtype=np.int64)
    if categories:
        kinds, where = np.unique(counts.tally.category, return_inverse=True)
        harm = [f"harm: {kind}" for kind in kinds]
    others = len(harm) + np.arange(_LAST)
    return [*harm, *OUTCOMES[1:]], np.column_stack([where.reshape(-1), np.tile(others, (len(where), 1))])


def _split(counts: Counts, k: int, column: NDArray) -> tuple[sp.csr_array, NDArray]:
    """Counts between states, shape (S, S), and into the k outcome states, shape (S, k)."""
    t, S = counts.transitions, len(counts.states)
    assert t.target is not None
    out = t.target >= S
    inner = sp.csr_array(sp.coo_array((t.count[~out], (t.source[~out], t.target[~out])), shape=(S, S)))
    inner.sum_duplicates()
    outer = np.zeros((S, k))
    np.add.at(outer, (t.source[out], column[t.group[out], t.target[out] - S]), t.count[out])
    return inner, outer


def scaled(inner: sp.csr_array, scale: NDArray) -> sp.csr_array:
    """Each row times a number."""
    result = inner.copy()
    result.data = result.data * np.repeat(scale, np.diff(result.indptr))
    return result


def smoothed(inner: sp.csr_array, outer: NDArray, prior: float) -> tuple[sp.csr_array, NDArray]:
    """Counts with pseudo-transitions, shared equally by a row's observed targets and the outcomes."""
    share = prior / (np.diff(inner.indptr) + outer.shape[1])
    smooth = inner.copy()
    smooth.data = smooth.data + np.repeat(share, np.diff(smooth.indptr))
    return smooth, outer + share[:, None]


def stacked(inner: sp.csr_array, outer: NDArray) -> sp.csr_array:
    """Relative frequencies of counts between S states and into k outcomes, shape (S + k, S + k); outcomes are empty."""
    S, k = outer.shape
    scale = 1 / (np.asarray(inner.sum(axis=1)).ravel() + outer.sum(axis=1))
    top = sp.hstack([scaled(inner, scale), sp.csr_array(outer * scale[:, None])], format="csr")
    return sp.csr_array(sp.vstack([top, sp.csr_array((k, S + k))], format="csr"))


def _from_mass(
    counts: Counts, inner: sp.csr_array, outer: NDArray, visits: NDArray, column: NDArray
) -> tuple[sp.csr_array, NDArray]:
    """Expected counts of the outcomes with a recorded mass; the other counts are scaled to fill the row."""
    used = single_token_outcomes(counts)
    _need_harm(counts, used)
    truncated = outer[:, -1]
    expected, fixed = outer.copy(), np.zeros(outer.shape[1], dtype=bool)
    fixed[-1] = True
    for name in used:
        table, code = counts.mass[name], CODES[name]
        total, steps = np.zeros_like(outer), np.bincount(table.source, table.values["steps"], len(visits))
        np.add.at(total, (table.source, column[table.group, code]), table.values["total"])
        seen, mine = steps > 0, np.unique(column[:, code])
        # Mean mass per recorded token, times the tokens; the two differ where some shards recorded no masses.
        expected[np.ix_(seen, mine)] = total[np.ix_(seen, mine)] * ((visits - truncated)[seen] / steps[seen])[:, None]
        fixed[mine] = True
    free = np.asarray(inner.sum(axis=1)).ravel() + outer[:, ~fixed].sum(axis=1)
    rest = np.maximum(visits - expected[:, fixed].sum(axis=1), 0.0)
    scale = np.divide(rest, free, out=np.zeros_like(rest), where=free > 0)
    expected[:, ~fixed] *= scale[:, None]
    expected[:, -1] += np.where(free > 0, 0.0, rest)
    return scaled(inner, scale), expected


def single_token_outcomes(counts: Counts) -> tuple[str, ...]:
    """Outcomes whose recorded class mass explains their hits.

    If a hit is the event "a token of the class is sampled", hits minus summed mass is a martingale with steps of at
    most one, and Freedman's inequality (Annals of Probability 3 (1975) 100) bounds it. An outcome is dropped where
    the bound of false alarm 1e-8 is exceeded: a refusal that takes several tokens, or masses recorded at another
    temperature than sampled.

    Parameters
    ----------
    counts : Counts

    Returns
    -------
    tuple of str

    Examples
    --------
    Token 9 is harm, and the model gave it a half each time: the mass explains the hits. No masses of refusal were
    recorded.

    >>> rolls = ms.Rollouts.of(
    ...     [[5, 9], [5, 7]],
    ...     prompt_id=0,
    ...     outcome=["harm", "refusal"],
    ...     hit=1,
    ...     columns={"mass_harm": [0.0, 0.5, 0.0, 0.5]},
    ... )
    >>> ms.chains.single_token_outcomes(ms.count(rolls))
    ('harm',)
    """
    log, names = np.log(2e8), []
    for name in OUTCOMES[:_LAST]:
        table = counts.mass.get(name)
        if table is None or table.values["steps"].sum() == 0:
            continue
        surprise, variance = abs(table.values["surprise"].sum()), table.values["variance"].sum()
        if surprise <= log / 3 + np.sqrt(log**2 / 9 + 2 * log * variance):
            names.append(name)
    return tuple(names)


def _need_harm(counts: Counts, used: tuple[str, ...]) -> None:
    if "harm" in used:
        return
    table: Table | None = counts.mass.get("harm")
    if table is None or table.values["steps"].sum() == 0:
        raise InputError(
            "No mass of the harm class was recorded.",
            cause="The rollouts have no finite mass_harm at a counted token.",
            next="Sample with classes={'harm': ids}, or use method='mle'.",
        )
    hits = counts.tally.outcomes[:, CODES["harm"]].sum()
    raise InputError(
        f"The recorded harm mass does not explain the harm hits ({hits:g} hits, off by "
        f"{table.values['surprise'].sum():g} from the summed mass).",
        cause="Harm is not the event that one token of the class is sampled, or the masses belong to another "
        "temperature or truncation of the distribution than the one sampled from.",
        next="Use method='mle', or judge and record the same class of tokens.",
    )


def _assemble(
    counts: Counts,
    inner: sp.csr_array,
    outer: NDArray,
    visits: NDArray,
    names: list[str],
    column: NDArray,
    prior: float,
) -> Chain:
    S, k = outer.shape
    P = stacked(inner, outer)
    harm = k - len(OUTCOMES) + 1
    outcomes = {"harm": range(S, S + harm)} | {name: S + harm + i for i, name in enumerate(OUTCOMES[1:])}
    t, size = counts.transitions, S + k
    e = counts.entries
    place = np.where(e.source < S, e.source, S + column[e.group, np.maximum(e.source - S, 0)])
    entry: dict[int, Any] = {}
    for forced in counts.prefills:
        rows = counts.tally.prefill[e.group] == forced
        law = np.bincount(place[rows], e.count[rows], size)
        entry[forced] = law / law.sum()
    assert t.target is not None
    arrived = np.zeros(k)
    np.add.at(arrived, np.maximum(place - S, 0), np.where(place >= S, e.count, 0.0))
    out = t.target >= S
    np.add.at(arrived, column[t.group[out], t.target[out] - S], t.count[out])
    tally = counts.tally
    through, prompts, deff = _trials(counts)
    evidence = Evidence(
        np.concatenate([visits, arrived]),
        *(tally.prompt_id, tally.category, tally.prefill, tally.outcomes),
        np.concatenate([through, arrived]),
        np.concatenate([prompts, np.zeros((k, 1 + len(OUTCOMES)))]),
        np.concatenate([deff, np.zeros((k, len(OUTCOMES)))]),
        prior,
    )
    return Chain(P, outcomes, entry.get(0), (*counts.states, *names), counts=counts, evidence=evidence, entry=entry)


def _trials(counts: Counts) -> tuple[NDArray, NDArray, NDArray]:
    """`through`, `prompts` and `deff` of `Evidence`, for the states that are no outcomes."""
    t, S = counts.passages, len(counts.states)
    assert t.target is not None
    ends = np.zeros((len(t.source), len(OUTCOMES)))
    ends[np.arange(len(t.source)), t.target - S] = t.count
    (state, _), (x,) = collect([t.source, counts.tally.cluster[t.group]], [ends])
    n = x.sum(axis=1)
    add = lambda v: np.stack([np.bincount(state, column, S) for column in v.T], axis=1)  # noqa: E731
    through, prompts = np.bincount(state, n, S), add(np.column_stack([n > 0, x > 0]))
    total, K = np.maximum(through, 1e-300)[:, None], prompts[:, :1]
    p = add(x) / total
    # The linearised variance between prompts over that of independent trials, as in `markovsafety.bound.clustered`.
    between = K / np.maximum(K - 1, 1) * add((x - p[state] * n[:, None]) ** 2) / total**2
    mixed = (K >= 2) & (prompts[:, 1:] > 0) & (add(n[:, None] - x) > 0)
    deff = between * np.maximum(total - 1, 1.0) / np.where(mixed, p * (1 - p), 1.0)
    return through, prompts, np.where(mixed, np.maximum(deff, 1.0), 0.0)
