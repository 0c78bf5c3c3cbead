"""Recovery: hazards that know how long ago the forced prefix ended, and the profile that they predict.

A model of harm by the position in the answer alone takes an answer that has just been forced for one that came there by
itself. Where a model recovers, by refusing soon after whatever was forced, that is wrong: tokens since the prefix
belong to the state. So does a refusal that has begun: it is spoken to its end, and until then counts neither as refused
nor as on its way to harm.

`fit_recovery` estimates the hazards of a refusal, of harm and of a harmless end by position t, tokens since the prefix
j and category of the prompt, each as ``logit = position + since + category``; `held_out_profile` fits them on some
depths and predicts the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit, ndtri

from ..bound import Bound, check_level
from ..errors import InputError
from ..evidence.cells import forced, is_rollouts, tally_of
from .profile import whole
from .recovery_model import EVENTS, Design, Effects, Histories, fit_effects, harm_of, histories

__all__ = ["HeldOut", "Recovery", "fit_recovery", "held_out_profile"]

FEW = 5  # measured events below which an error is not taken from the prompts alone
BEYOND = 0.0455  # P(|z| > 2)


@dataclass(frozen=True, eq=False, repr=False)
class Recovery:
    """Hazards by position, time since the forced prefix, and category.

    Parameters
    ----------
    depths : tuple of int
        Depths that were fitted.
    categories : tuple of str
    prompts : int array, shape (K,)
        Sorted ids of the prompts that were fitted.
    shares : array, shape (C,)
        Share of each category in the fit.
    tokens : int
        Most tokens sampled after any prefix; predictions end there.
    onset : int array or None
        Tokens that begin a refusal; None = a refusal counts from its hit.
    effects : Effects
        The fitted model.

    Examples
    --------
    Whatever was forced, half of the answers refuse with their first token and the others never do:

    >>> k, spoken = np.repeat(np.arange(7), 160), np.tile(np.repeat([1, 2, 3, 4, 5], [80, 40, 20, 10, 10]), 7)
    >>> outcome = np.where(spoken == 1, 1, np.tile([0, 2], 560))  # refusal; harm, benign
    >>> ids, said = np.arange(1120) // 2 % 20, [[7] * n for n in k + spoken]
    >>> rolls = ms.Rollouts.of(said, prompt_id=ids, prefill=k, outcome=outcome, hit=k + spoken - 1)
    >>> model = ms.depth.fit_recovery(rolls)
    >>> model
    Recovery(position and time since the prefix, refusals when finished, fitted at k = 0,
        1, 2, 3, 4, 5, 6)
    >>> model.hazards(position=3, since=[0, 1])["refusal"].round(2)
    array([0.5, 0. ])
    """

    depths: tuple[int, ...]
    categories: tuple[str, ...]
    prompts: NDArray
    shares: NDArray
    tokens: int
    onset: NDArray | None
    effects: Effects

    @property
    def since(self) -> bool:
        """Whether time since the prefix is part of the state."""
        return self.effects.design.memory > 0

    def hazards(self, position: ArrayLike, since: ArrayLike, category: str | None = None) -> dict[str, NDArray]:
        """Probability of each event at a token, given none of those named before it.

        Parameters
        ----------
        position, since : int or array
            Index of the token within the answer, and number of tokens sampled before it; broadcast.
        category : str, optional
            None = the mean over the categories by their share.

        Returns
        -------
        dict
            "refusal" (its begin), "harm", "end" (harmless), and "leak": that a refusal which begins here harms in the
            end.
        """
        t, j = np.broadcast_arrays(whole(position, "position"), whole(since, "since"))
        which = range(len(self.categories)) if category is None else [self._index(category)]
        weight = self.shares if category is None else np.ones(1)
        parts = [self.effects.hazards(t.reshape(-1), j.reshape(-1), np.full(t.size, c)) for c in which]
        mean = np.tensordot(weight, np.stack(parts), 1)
        return {name: mean[i].reshape(t.shape) for i, name in enumerate((*EVENTS, "leak"))}

    def harm(self, prefill: ArrayLike, level: float = 0.95) -> Bound:
        """Predicted P(harm) after k forced tokens.

        Parameters
        ----------
        prefill : int or array of shape (m,)
        level : float

        Returns
        -------
        Bound
            The interval is normal on the logit scale, by the influence of every prompt (a linearised cluster
            bootstrap); `info` has standard_error. Only sampling is assessed: that the model is right is not.
        """
        check_level(level)
        k = whole(prefill, "prefill")
        found = [harm_of(self.effects, int(x), self.shares, self.tokens) for x in np.atleast_1d(k)]
        value = np.array([h for h, _ in found])
        error = np.array([_error(i, len(self.prompts)) for _, i in found])
        half = ndtri((1 + level) / 2) * error / np.maximum(value * (1 - value), 1e-300)
        inner = (value > 0) & (value < 1)
        where = logit(np.where(inner, value, 0.5))
        lower, upper = np.where(inner, expit(where - half), value), np.where(inner, expit(where + half), value)
        lower, upper = np.minimum(lower, value), np.maximum(upper, value)
        if k.ndim == 0:
            value, lower, upper, error = value[0], lower[0], upper[0], error[0]
        info = {"name": "P(harm)", "method": "hazards by position and since the prefix", "standard_error": error}
        return Bound(value, lower, upper, level, {"sampling": (upper - lower) / 2}, None, info)

    def against(self, rolls: Any, depths: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Prediction and measurement at the depths of some rollouts.

        Parameters
        ----------
        rolls : Rollouts
            Judged; of the same prompts as the fit or of others.
        depths : sequence of int, optional
            Which of their depths; all that were not fitted if not given.

        Returns
        -------
        list of dict
            One per depth: k, predicted, measured, difference, error_predicted, error_measured, error, z, rollouts,
            prompts, truncated and outside (k beyond the fitted depths). `error` is the standard error of the
            *difference*, by prompt: what a prompt does to both, it does to them together.

        Raises
        ------
        InputError
            If a category or a depth is unknown.
        """
        tally_of(rolls)
        given = np.asarray(rolls.prefill)
        measured = sorted(set(np.unique(given).tolist()) - set(self.depths))
        wanted = measured if depths is None else whole(list(depths), "depths").tolist()
        prompts = np.unique(np.concatenate([self.prompts, np.asarray(rolls.prompt_id)]))
        mine = np.searchsorted(prompts, self.prompts)
        names = set(np.unique(np.asarray(rolls.category, dtype=str)).tolist())
        for name in sorted(names):
            self._index(name)
        h = histories(rolls, prompts, np.array(self.categories), None)
        return [self._row(h, int(k), len(prompts), mine) for k in wanted]

    def _row(self, h: Histories, k: int, n_prompts: int, mine: NDArray) -> dict[str, Any]:
        on = (h.prefill == k) & (h.weight > 0)
        if not on.any():
            raise InputError(
                f"No rollout has {forced([k])}.", cause="There is nothing to compare with.", next="Sample that depth."
            )
        w, x, p = h.weight[on], h.harm[on], h.prompt[on]
        total = float(w.sum())
        shares = np.bincount(h.category[on], w, len(self.categories)) / total
        predicted, own = harm_of(self.effects, k, shares, self.tokens)
        measured = float(w @ x / total)
        theirs = np.bincount(p, w * (x - measured), n_prompts) / total
        K = len(self.prompts)
        ours = np.concatenate([np.zeros(n_prompts), own[K:]])
        ours[mine] = own[:K]
        both = ours.copy()
        both[:n_prompts] -= theirs
        error, alone, expected = _error(both, n_prompts), _error(theirs, n_prompts), _error(ours, n_prompts)
        events = float(w @ x)
        if min(events, total - events) < FEW:  # prompts that happen to agree say little of their spread
            rate = (events + 0.5) / (total + 1)
            alone = max(alone, float(np.sqrt(rate * (1 - rate) / total)))
            error = max(error, float(np.hypot(expected, alone)))
        return {
            "k": k,
            "predicted": predicted,
            "measured": measured,
            "difference": predicted - measured,
            "error_predicted": expected,
            "error_measured": alone,
            "error": error,
            "z": (predicted - measured) / error,
            "rollouts": int(on.sum()),
            "prompts": len(np.unique(p)),
            "truncated": float(w @ (h.event[on] < 0) / total),
            "outside": not min(self.depths) <= k <= max(self.depths),
        }

    def _index(self, category: str) -> int:
        if category not in self.categories:
            raise InputError(
                f"The category {category!r} was not fitted.",
                cause=f"Fitted were {', '.join(self.categories)}.",
                next="Fit on rollouts of it, or leave it out.",
            )
        return self.categories.index(category)

    def __repr__(self) -> str:
        since = "position and time since the prefix" if self.since else "position only"
        begun = "begun" if self.onset is not None else "finished"
        return f"Recovery({since}, refusals when {begun}, fitted at k = {', '.join(map(str, self.depths))})"


def _error(influence: NDArray, prompts: int) -> float:
    """Standard error from what each prompt contributes, and after them, each prior."""
    ours, priors = influence[:prompts], influence[prompts:]
    n = max(int(np.count_nonzero(ours)), 2)
    return float(np.sqrt(n / (n - 1) * np.sum(ours**2) + np.sum(priors**2)))


def fit_recovery(
    rolls: Any,
    *,
    depths: Iterable[int] | None = None,
    since: bool = True,
    onset: Iterable[int] | None = None,
    by_category: bool = True,
    memory: int | None = None,
    prior: float = 2.5,
    pool: int = 50,
) -> Recovery:
    """Fit hazards by position, time since the forced prefix, and category.

    Parameters
    ----------
    rolls : Rollouts
        Judged, with several depths of prefill.
    depths : sequence of int, optional
        Depths to fit; all that were sampled if not given.
    since : bool
        Whether time since the prefix is part of the state. Without it the model knows the position only.
    onset : token ids, optional
        Tokens that begin a refusal. With them a refusal counts from its first token, and leaks with a probability of
        its own, by the position of that token and category; without them it counts from its hit, which for many judges
        is the end of the answer.
    by_category : bool
        Whether the prompt's category has an effect.
    memory : int, optional
        From this many tokens since the prefix on, time is forgotten. By default 4 with `onset`, and 12 without: a
        refusal that counts from its end is on its way for as long as it is spoken. Longer memories cost certainty: if
        all depths are even, odd positions are met an odd number of tokens after a prefix only, so that position and
        time are told apart by the forgotten times alone.
    prior : float
        Standard deviation, in logits, of a normal prior on every effect. It keeps effects finite where an event was
        never seen, and settles what the fitted depths leave open; errors allow for that.
    pool : int
        Later positions with fewer rollouts at risk share an effect.

    Returns
    -------
    Recovery

    Raises
    ------
    InputError
        If rollouts are missing, not judged, or a depth was not sampled.

    Notes
    -----
    Our own: discrete-time hazards of competing events with additive logits (J. D. Singer and J. B. Willett, J. Educ.
    Stat. 18 (1993) 155), with errors clustered by prompt from the influence of each prompt (the sandwich), which is the
    cluster bootstrap to first order, plus what the prior may be wrong by. A token of an answer without prefill counts
    as sampled since its beginning. The hazard by time since the prefix also tells prompts apart: those that are still
    answering j tokens after a prefix are the ones that refuse less.

    Examples
    --------
    Half of the answers refuse with their first token whatever was forced, so that harm is 1/4 at every depth. To a
    model that knows the position only, they look as if they refused slowly:

    >>> k, spoken = np.repeat(np.arange(7), 160), np.tile(np.repeat([1, 2, 3, 4, 5], [80, 40, 20, 10, 10]), 7)
    >>> outcome = np.where(spoken == 1, 1, np.tile([0, 2], 560))  # refusal; harm, benign
    >>> ids, said = np.arange(1120) // 2 % 20, [[7] * n for n in k + spoken]
    >>> rolls = ms.Rollouts.of(said, prompt_id=ids, prefill=k, outcome=outcome, hit=k + spoken - 1)
    >>> for since in (True, False): print(ms.depth.fit_recovery(rolls, since=since).harm([0, 3, 6]).value.round(2))
    [0.25 0.25 0.25]
    [0.09 0.24 0.36]
    """
    if not is_rollouts(rolls):
        raise InputError(
            f"{type(rolls).__name__} has no tokens.",
            cause="When an answer was refused or harmful is known from rollouts only.",
            next="Pass judged Rollouts; for rates alone there is fit_hazards.",
        )
    tally_of(rolls)
    given = np.asarray(rolls.prefill)
    sampled = np.unique(given).tolist()
    wanted = sampled if depths is None else np.unique(whole(list(depths), "depths")).tolist()
    missing = [k for k in wanted if k not in sampled]
    if missing or not wanted:
        raise InputError(
            f"No rollout has {forced(missing[:1])}." if missing else "No depth is to be fitted.",
            cause=f"Sampled were {', '.join(map(str, sampled))}.",
            next="Choose among these depths, or sample the missing ones.",
        )
    memory = memory if memory is not None else 12 if onset is None else 4
    if not (isinstance(memory, (int, np.integer)) and memory >= 1 and prior > 0):
        raise InputError(
            f"memory is {memory!r}, prior {prior!r}.", cause="Both are positive.", next="Pass e.g. memory=12, prior=10."
        )
    part = rolls[np.isin(given, wanted)]
    prompts = np.unique(np.asarray(part.prompt_id))
    categories = np.unique(np.asarray(part.category, dtype=str))
    ids = None if onset is None else np.array(sorted(onset), dtype=np.int64)
    h = histories(part, prompts, categories, ids)
    spoken = h.last - h.prefill + 1
    n = int(h.last.max()) + 2
    at_risk = np.cumsum(np.bincount(h.prefill, h.weight, n) - np.bincount(h.last + 1, h.weight, n))
    last = int(np.flatnonzero(at_risk >= min(pool, at_risk.max()))[-1])
    several = len(categories) if by_category and len(categories) > 1 else 0
    design = Design(last, int(memory) if since else 0, several)
    effects = fit_effects(h, design, len(prompts), float(prior))
    shares = np.bincount(h.category, h.weight, len(categories)) / h.weight.sum()
    tokens = int(max(spoken.max(), (np.diff(part.offsets) - part.prefill).max()))
    return Recovery(tuple(wanted), tuple(categories.tolist()), prompts, shares, tokens, ids, effects)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Profiles predicted at depths that were held out from the fit.

    Parameters
    ----------
    rows : list of dict
        As `Recovery.against` gives them, with `fitted`, the depths of the fit.

    Examples
    --------
    Without time since the prefix the prediction fails (the rollouts are those of `held_out_profile`):

    >>> k, spoken = np.repeat(np.arange(7), 160), np.tile(np.repeat([1, 2, 3, 4, 5], [80, 40, 20, 10, 10]), 7)
    >>> outcome = np.where(spoken == 1, 1, np.tile([0, 2], 560))  # refusal; harm, benign
    >>> ids, said = np.arange(1120) // 2 % 20, [[7] * n for n in k + spoken]
    >>> rolls = ms.Rollouts.of(said, prompt_id=ids, prefill=k, outcome=outcome, hit=k + spoken - 1)
    >>> found = ms.depth.held_out_profile(rolls, since=False)
    >>> print(type(found).__name__, f"{found.beyond} of {len(found.rows)} beyond 2, {found.allowed} allowed")
    HeldOut 6 of 6 beyond 2, 2 allowed
    """

    rows: list[dict[str, Any]]

    @property
    def z(self) -> NDArray[np.float64]:
        """All of them, shape (m,)."""
        return np.array([row["z"] for row in self.rows])

    @property
    def beyond(self) -> int:
        """How many are beyond 2."""
        return int(np.sum(np.abs(self.z) > 2))

    @property
    def allowed(self) -> int:
        """How many may be if the model holds: the 99 % quantile of the binomial with 0.0455."""
        from scipy.stats import binom

        return int(binom.ppf(0.99, len(self.rows), BEYOND))

    @property
    def passed(self) -> bool:
        """Whether no more than allowed are beyond 2, and none beyond 4."""
        return self.beyond <= self.allowed and bool((np.abs(self.z) <= 4).all())

    def __str__(self) -> str:
        head = f"{'k':>3}  predicted  measured     z"
        lines = [f"{r['k']:>3}  {r['predicted']:9.4f}  {r['measured']:8.4f}  {r['z']:+6.2f}" for r in self.rows]
        last = (
            f"{self.beyond} of {len(self.rows)} beyond 2 ({self.allowed} allowed), largest {np.abs(self.z).max():.2f}"
        )
        return "\n".join([head, *lines, last])

    __repr__ = __str__


def held_out_profile(rolls: Any, *, folds: int = 2, **options: Any) -> HeldOut:
    """Predict the profile at depths held out from the fit, in turns.

    Parameters
    ----------
    rolls : Rollouts
        Judged, with several depths. Depth 0 is always fitted and never predicted: the first token is a gate that no
        other depth tells of.
    folds : int
        The other depths take turns in this many groups; each group is predicted from the rest.
    **options
        Of `fit_recovery`.

    Returns
    -------
    HeldOut

    Raises
    ------
    InputError
        Too few depths for the groups.

    Examples
    --------
    Half of the answers refuse with their first token whatever was forced, and half of the others do harm:

    >>> k, spoken = np.repeat(np.arange(7), 160), np.tile(np.repeat([1, 2, 3, 4, 5], [80, 40, 20, 10, 10]), 7)
    >>> outcome = np.where(spoken == 1, 1, np.tile([0, 2], 560))  # refusal; harm, benign
    >>> ids, said = np.arange(1120) // 2 % 20, [[7] * n for n in k + spoken]
    >>> rolls = ms.Rollouts.of(said, prompt_id=ids, prefill=k, outcome=outcome, hit=k + spoken - 1)
    >>> print(ms.depth.held_out_profile(rolls))
      k  predicted  measured     z
      1     0.2988    0.2500   +0.24
      2     0.3150    0.2500   +0.48
      3     0.3363    0.2500   +0.52
      4     0.3357    0.2500   +0.70
      5     0.3358    0.2500   +0.52
      6     0.3137    0.2500   +0.45
    0 of 6 beyond 2 (2 allowed), largest 0.70
    """
    sampled = [int(k) for k in np.unique(np.asarray(rolls.prefill))]
    others = [k for k in sampled if k > 0]
    if folds < 2 or len(others) < folds:
        raise InputError(
            f"{len(others)} depths beyond 0 in {folds} groups.",
            cause="Every group is predicted from the others, and none may be empty.",
            next="Sample more depths, or use two groups.",
        )
    rows = []
    for f in range(folds):
        held = others[f::folds]
        model = fit_recovery(rolls, depths=[k for k in sampled if k not in held], **options)
        rows += [{**row, "fitted": model.depths} for row in model.against(rolls, held)]
    return HeldOut(sorted(rows, key=lambda row: row["k"]))
