"""Dirichlet posterior over the rows of a chain, and what it says of the hitting probability.

Given counts, the rows of a Markov chain are independent Dirichlet laws (conjugacy), and P(hit) is a function of them:
draw rows by gamma variates, solve every drawn chain, read off quantiles. That takes every transition for independent,
which rollouts of one prompt are not. By default the *prompts* are given random weights instead (Rubin's Bayesian
bootstrap: exponential weights, i.e. a flat Dirichlet law over prompts), and the prior's pseudo-transitions are gamma
variates beside them. Where each prompt made a single transition, the two are the same law.

A prior biases rare outcomes upwards, once per row on the way; `info` has what it did to the value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, clopper_pearson
from ..chains import Chain
from ..chains.estimate import PRIOR
from ..errors import InputError
from ..hitting import hitting_probability
from ..hitting.core import walk
from ..hitting.intervals import ONE_PROMPT, recorded
from .paired import FEW
from .prompt_rows import PromptRows, joined, prompt_rows, refuse_few
from .resample import FEWEST_DRAWS, blocks, solve

__all__ = ["posterior", "posterior_draws"]

PIECE = 250
"""Draws that one process makes at a time where they are spread over several."""


def posterior(
    source: Any,
    target: Any = "harm",
    *,
    draws: int = 2000,
    prior: float = PRIOR,
    by_prompt: bool = True,
    states: ArrayLike | None = None,
    seed: int = 0,
    level: float = 0.95,
    spread: Callable[..., list[Any]] | None = None,
) -> Bound:
    """Posterior of P(hit) from every state, at the start, and after every measured number of forced tokens.

    Parameters
    ----------
    source : Counts, Chain with counts, or Chain.from_counts(...)
        The last has no prompts: its transitions are taken for independent.
    target : as in `hitting_probability`
    draws : int
        Chains drawn, at least 100.
    prior : float
        Pseudo-transitions per row, shared equally by the targets observed in that row and the outcomes, as in
        ``estimate(counts, "dirichlet", prior)``.
    by_prompt : bool
        Whether rollouts of a prompt may resemble each other: random weights on prompts. False: independent gamma
        variates for every transition, the textbook Dirichlet posterior, too narrow where prompts differ.
    states : int or bool array, optional
        Answer for these states only.
    seed : int
    level : float
        Of the equal-tailed intervals.
    spread : callable, optional
        ``spread(function, items)`` returns a list as ``map`` would, over several processes: for a Ray cluster
        ``functools.partial(rollouts.spread, workers=8)``. Each 250 draws have random numbers of their own then: others
        than without it, the same for any number of processes. Not for a chain of integer counts.

    Returns
    -------
    Bound
        Shape (n,), or of `states`: posterior means and quantiles. `at_start` is that of the rollouts without prefill,
        ``info["entry"][k]`` that after k forced tokens. `info` also has prior, draws, plugin (the value without prior)
        and bias (what the prior adds to it), n_eff, prompts, and joined where few events made Clopper-Pearson
        necessary.

    Raises
    ------
    InputError
        Without counts, a prior that is not positive, or too few draws.
    UntrustedError
        Effective sample size of the start (without one: of every prefill) below 10; ``partial`` is the Bound.

    Notes
    -----
    D. B. Rubin, Annals of Statistics 9 (1981) 130. Departures: the interval by prompt is widened about its median by
    ``sqrt(c / (c - 1)) t / z`` on the logit scale, because c weighted prompts with a hit (or with a miss, if fewer)
    vary less than prompts do; and where fewer than five hits (or misses) were seen it is joined with the interval of
    Clopper and Pearson, since there the prior would decide.

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> counts = ms.count(case().rolls, states=ms.Position())
    >>> harm = ms.evidence.posterior(counts)
    >>> print(harm.at_start)
    P(harm) = 0.0125   95 % [0.00558, 0.022] (prior of 0.5 per row: 0.0125 without it)
        because: sampling 0.0082; judge, lumping, model, truncation, rounding not assessed
    >>> print(harm.info["entry"][8])
    P(harm) = 0.548   95 % [0.486, 0.61] (prior of 0.5 per row: 0.549 without it)
        because: sampling 0.062; judge, lumping, model, truncation, rounding not assessed
    """
    check_level(level)
    _check(draws, prior)
    if getattr(source, "counts", None) is None and getattr(source, "integer_counts", None) is not None:
        return _of_integers(source, target, draws, prior, states, seed, level)
    rows = prompt_rows(source, target, "dirichlet", prior)
    plain = prompt_rows(source, target)
    wanted = np.arange(rows.chain.n_states)
    wanted = wanted if states is None else np.atleast_1d(wanted[np.asarray(states)])
    by_prompt = by_prompt and rows.K > 1
    if spread is None:
        x, at = posterior_draws(rows, draws, prior, by_prompt, seed, wanted)
    else:
        sizes = [min(PIECE, draws - done) for done in range(0, draws, PIECE)]
        piece = functools.partial(_piece, rows, prior, by_prompt, seed, wanted)
        x, at = map(np.concatenate, zip(*spread(piece, list(enumerate(sizes)))))
    sizes = {k: plain.size(k, level) for k in rows.entries}
    wide = _student(max(s["seen"] for s in sizes.values()), level) if by_prompt else 1.0
    info = _told(rows, prior, draws, by_prompt)
    entry = {k: _of_start(plain, k, at[:, i], wide, level, info | sizes[k]) for i, k in enumerate(rows.entries)}
    value, (lower, upper) = x.mean(axis=0), _ends(x, wide, level)
    lower, upper = _states_joined(rows, wanted, value, np.minimum(lower, value), np.maximum(upper, value), level)
    about = info | {"entry": entry, "plugin": plain.h[wanted], "states": "joined with Clopper-Pearson where few hit"}
    reasons = {"sampling": (upper - lower) / 2}
    bound = Bound(value, lower, upper, level, reasons, entry.get(0), about)
    told = sizes[0] if 0 in entry else max(sizes.values(), key=lambda s: s["n_eff"])
    return refuse_few(bound, told)


def _check(draws: Any, prior: Any) -> None:
    if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < FEWEST_DRAWS:
        raise InputError(
            f"draws is {draws!r}.",
            cause=f"Quantiles of fewer than {FEWEST_DRAWS} draws are noise.",
            next="Pass a whole number, e.g. 2000.",
        )
    if isinstance(prior, bool) or not isinstance(prior, (int, float, np.number)) or not 0 < prior < np.inf:
        raise InputError(
            f"prior is {prior!r}.",
            cause="A prior is a positive number of pseudo-transitions per row.",
            next="Pass e.g. prior=0.5, or use evidence.delta or evidence.bootstrap, which have none.",
        )


def _told(rows: PromptRows, prior: float, draws: int, by_prompt: bool) -> dict[str, Any]:
    how = "Bayesian bootstrap over prompts with a Dirichlet prior" if by_prompt else "Dirichlet posterior of the rows"
    info: dict[str, Any] = {"name": f"P({rows.walk.name})", "method": how, "prior": prior, "draws": draws}
    return info | ({"note": ONE_PROMPT} if rows.K < 2 else {})


def _piece(
    rows: PromptRows, prior: float, by_prompt: bool, seed: int, wanted: NDArray, item: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    number, draws = item
    return posterior_draws(rows, draws, prior, by_prompt, (seed, number), wanted)


def posterior_draws(
    rows: PromptRows, draws: int, prior: float, by_prompt: bool, seed: int | tuple[int, int], wanted: NDArray
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Hitting probabilities of drawn chains.

    Parameters
    ----------
    rows : PromptRows
        Made with "dirichlet" and this prior.
    wanted : int array

    Returns
    -------
    by_state : float32 array, shape (draws, len(wanted))
    by_start : array, shape (draws, len(rows.entries))
        In the order of `rows.entries`.
    """
    rng = np.random.default_rng(seed)
    laws = list(rows.entries.values())
    needed = np.unique(np.concatenate([wanted, *(law.indices for law in laws)]))
    own = np.searchsorted(needed, wanted)
    # A share of the prior for every entry of a state's row: what the estimate has beyond the counts.
    share = np.maximum(rows.chain.P.data * (rows.visits + prior)[rows.row] - rows.total, 0.0)
    share[rows.chain.outcome_mask[rows.row]] = 0.0
    share = np.where(share > 1e-9 * prior, share, 0.0)
    by_state, by_start = np.empty((draws, len(wanted)), np.float32), np.empty((draws, len(laws)))
    done = 0
    for b in blocks(rows, draws):
        if by_prompt:
            weights = rng.standard_exponential((rows.K, b))
            values = rows.table.T @ weights + _gammas(rng, share, b)
            entered = [law[:, needed].T @ weights for law in laws]
        else:
            values = _gammas(rng, rows.total + share, b)
            entered = [_gammas(rng, np.asarray(law[:, needed].sum(axis=0)).ravel(), b) for law in laws]
        x = solve(rows, values, needed)
        by_state[done : done + b] = x[:, own]
        for i, w in enumerate(entered):
            by_start[done : done + b, i] = np.minimum((w.T * x).sum(axis=1) / w.sum(axis=0), 1.0)
        done += b
    return by_state, by_start


def _gammas(rng: np.random.Generator, shape: NDArray, b: int) -> NDArray[np.float64]:
    """Standard gamma variates, shape (len(shape), b); 0 where the shape is 0."""
    return rng.standard_gamma(np.broadcast_to(shape[:, None], (len(shape), b)))


def _student(seen: float, level: float) -> float:
    from scipy.special import ndtri, stdtrit

    known, tail = max(seen, FEW), (1 + level) / 2
    return float(np.sqrt(known / (known - 1)) * stdtrit(known - 1.0, tail) / ndtri(tail))


def _ends(x: NDArray, wide: float, level: float) -> tuple[NDArray, NDArray]:
    """Quantiles of draws along the first axis, moved away from the median by a factor on the logit scale."""
    from scipy.special import expit, logit

    low, middle, high = np.quantile(x, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0).astype(np.float64)
    if wide == 1:
        return low, high
    inside = (low > 0) & (high < 1)
    parts = (np.where(inside, q, 0.5) for q in (low, middle, high))
    a, m, c = (logit(q) for q in parts)
    return np.where(inside, expit(m + wide * (a - m)), low), np.where(inside, expit(m + wide * (c - m)), high)


def _of_start(plain: PromptRows, k: int, x: NDArray, wide: float, level: float, info: dict[str, Any]) -> Bound:
    value, (low, high) = float(x.mean()), _ends(x, wide, level)
    plugin = float(plain.law(k) @ plain.h)
    lower, upper, why = joined(plain, k, (min(float(low), value), max(float(high), value)), level)
    told = info | {"prefill": k, "plugin": plugin, "bias": value - plugin}
    told |= {} if why is None else {"joined": why}
    told["note"] = "; ".join(
        x for x in (info.get("note"), f"prior of {info['prior']:g} per row: {plugin:.3g} without it") if x
    )
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, told)


def _states_joined(
    rows: PromptRows, wanted: NDArray, value: NDArray, lower: NDArray, upper: NDArray, level: float
) -> tuple[NDArray, NDArray]:
    """Clopper-Pearson at the rollouts through each state where few of them, or all but few, hit."""
    evidence, codes = rows.chain.evidence, recorded(rows.walk)
    assert evidence is not None
    n = evidence.trials(codes[0] if codes and len(codes) == 1 else None, level)
    plain_rate = np.clip(_through(rows, codes) if codes else rows.h, 0.0, 1.0)
    hits = plain_rate * evidence.through
    few = (np.minimum(hits, evidence.through - hits) < FEW) & ~rows.chain.outcome_mask & rows.walk.moving
    low, high = clopper_pearson(plain_rate * n, n, level)
    at = few[wanted]
    return (
        np.where(at, np.minimum(lower, np.minimum(low[wanted], value)), lower),
        np.where(at, np.maximum(upper, np.maximum(high[wanted], value)), upper),
    )


def _through(rows: PromptRows, codes: list[int]) -> NDArray[np.float64]:
    """Share of the rollouts through each state that ended in the target, shape (n,)."""
    t, S = rows.counts.passages, len(rows.counts.states)
    assert t.target is not None
    n = rows.chain.n_states
    hit = np.isin(t.target - S, codes)
    total = np.bincount(t.source, t.count, n)
    return np.bincount(t.source[hit], t.count[hit], n) / np.where(total > 0, total, 1.0)


def _of_integers(chain: Chain, target: Any, draws: int, prior: float, states: Any, seed: int, level: float) -> Bound:
    """Rows of a chain from integer counts, all transitions independent, from its own start law."""
    n, done = chain.n_states, chain.outcome_mask
    C = sp.coo_array(chain.integer_counts)
    counted = np.bincount(C.row, minlength=n) > 0
    open_, ends = np.flatnonzero(counted & ~done), np.flatnonzero(done)
    # The pattern: what was counted, and every outcome; each cell once, with its count or 0.
    row, col = np.concatenate([C.row, np.repeat(open_, len(ends))]), np.concatenate([C.col, np.tile(ends, len(open_))])
    key, where = np.unique(row * np.int64(n) + col, return_inverse=True)
    row, col = np.divmod(key, n)
    shape = np.bincount(where.ravel(), np.concatenate([C.data, np.zeros(len(open_) * len(ends))]), len(key))
    shape += np.where(done[row], 0.0, prior / np.bincount(row, minlength=n)[row])
    total = np.bincount(row, shape, n)
    smooth = Chain(sp.csr_array((shape / total[row], (row, col)), shape=(n, n)), chain.outcomes)
    P = smooth.P  # with a one on the diagonal of an absorbing outcome, which is never read
    shape = np.where(total > 0, total, 1.0)[np.repeat(np.arange(n), np.diff(P.indptr))] * P.data
    w = walk(smooth, target)
    from ..hitting.device_batch import batch

    problem, rng = batch(smooth, w.hit), np.random.default_rng(seed)
    size = int(np.clip(2e7 // max(len(shape), 1), 1, 256))
    x = np.concatenate(
        [problem.solve(_gammas(rng, shape, min(size, draws - b)), innermost=True).value for b in range(0, draws, size)]
    )
    info: dict[str, Any] = {"name": f"P({w.name})", "method": "Dirichlet posterior of the rows", "prior": prior}
    info |= {"draws": draws, "note": "no prompts: all transitions are taken for independent"}
    plugin = np.asarray(hitting_probability(chain, target, certify=False).value)
    start = None
    if chain.start is not None:
        at = x @ chain.start
        told = info | {"plugin": float(plugin @ chain.start), "bias": float(at.mean() - plugin @ chain.start)}
        start = _bound(at, level, None, told)
    wanted = np.arange(n) if states is None else np.atleast_1d(np.arange(n)[np.asarray(states)])
    return _bound(x[:, wanted], level, start, info | {"plugin": plugin[wanted]})


def _bound(x: NDArray, level: float, start: Bound | None, info: dict[str, Any]) -> Bound:
    value, (low, high) = np.minimum(x.mean(axis=0), 1.0), _ends(x, 1.0, level)
    lower, upper = np.minimum(low, value), np.maximum(high, value)
    return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, start, info)
