"""Safety against helpfulness, category by category: which settings are worth having, and which one to choose.

A front over all categories together hides that a setting which is good on average makes one category worse (the point
of arXiv 2502.02153). Here every category has its own front and its own choice under a limit of harm, and what became
worse than under the first setting is tested with false discoveries controlled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound import Bound, check_level, encode
from ..errors import InputError
from ..rollouts.rollouts import Rollouts
from .pairing import asked_of, check_paired
from .vulnerable import Cells, adjusted, changed

__all__ = ["TradeOffs", "trade_offs", "win_rates"]

Score = Callable[[Rollouts], ArrayLike]


@dataclass(frozen=True, eq=False)
class TradeOffs:
    """Points of safety and helpfulness; see `trade_offs`.

    Parameters
    ----------
    limit, rate, level : float
    table : list of dict
        One row for each setting and group ("all", then categories): setting, group, harm, refusal, helpful (Bounds,
        each for itself), front (no setting has less harm and more helpfulness in this group), front_share (of resamples
        of the prompts in which that is so), ceiling (upper end of harm, one-sided, that holds for all settings of the
        group at once), allowed (the ceiling is at most the limit), chosen (the most helpful allowed one), best_share
        (of resamples in which it is the most helpful allowed one); in categories, for settings that are held against
        another, also against, change (of harm), p, adjusted (over all rows that have one), worse.

    Examples
    --------
    >>> table = [
    ...     {"setting": "plain", "group": "all", "front": True},
    ...     {"setting": "half", "group": "all", "front": True, "chosen": True},
    ...     {"setting": "whole", "group": "all", "worse": True},
    ... ]
    >>> found = ms.interventions.TradeOffs(limit=0.1, rate=0.05, level=0.95, table=table)
    >>> found
    <TradeOffs: chosen for harm <= 0.1: all: half; made worse: all by whole>
    >>> [row["setting"] for row in found.rows(front=True)]
    ['plain', 'half']
    """

    limit: float
    rate: float
    level: float
    table: list[dict[str, Any]]

    def rows(self, group: str | None = None, **flags: bool) -> list[dict[str, Any]]:
        """Rows of a group (all of them by default) with given flags, such as ``front=True``."""
        return [
            r for r in self.table if group in (None, r["group"]) and all(r.get(k, False) == v for k, v in flags.items())
        ]

    @property
    def chosen(self) -> dict[str, str | None]:
        """The most helpful allowed setting of every group; None where no setting is allowed."""
        groups = dict.fromkeys(r["group"] for r in self.table)
        return {g: next((r["setting"] for r in self.rows(g, chosen=True)), None) for g in groups}

    @property
    def worse(self) -> list[tuple[str, str]]:
        """Settings and categories in which they do more harm than the setting that they are held against."""
        return [(r["setting"], r["group"]) for r in self.rows(worse=True)]

    @property
    def verdict(self) -> str:
        """Choices and losses in one line."""
        chosen = ", ".join(f"{g}: {s or 'none allowed'}" for g, s in self.chosen.items())
        worse = ", ".join(f"{g} by {s}" for s, g in self.worse) or "no category"
        return f"chosen for harm <= {self.limit:g}: {chosen}; made worse: {worse}"

    def __str__(self) -> str:
        lines = [self.verdict]
        for r in self.table:
            flags = " ".join(f for f in ("front", "chosen", "worse") if r.get(f))
            harm, helpful = r["harm"], r["helpful"]
            lines.append(
                f"  {r['group']}, {r['setting']}: harm {harm.value:.3f} [{harm.lower:.3f}, {harm.upper:.3f}], "
                f"helpful {helpful.value:.3f} [{helpful.lower:.3f}, {helpful.upper:.3f}] {flags}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<TradeOffs: {self.verdict}>"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        named = ("limit", "rate", "level", "chosen", "table")
        return encode({"verdict": self.verdict, **{name: getattr(self, name) for name in named}})


def trade_offs(
    harmful: Mapping[str, Rollouts],
    harmless: Mapping[str, Rollouts],
    *,
    reference: Rollouts,
    score: Score,
    limit: float = 0.1,
    rate: float = 0.05,
    control: str = "yekutieli",
    beside: Sequence[str] = (),
    against: Mapping[str, str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> TradeOffs:
    """Safety and helpfulness of every setting in every category.

    A setting is whatever can be chosen: a strength, a model, or a model at a strength. All of them share one front.

    Parameters
    ----------
    harmful, harmless : mapping of setting -> Rollouts
        Judged answers to harmful and to harmless prompts; the same prompts and settings.
    reference : Rollouts
        Answers of the model before alignment (supervised fine-tuning alone) to the harmless prompts.
    score : callable
        Rollouts -> one number per answer, more is more helpful; see `win_rates`.
    limit : float
        Tolerated probability of harm in every category.
    beside : sequence of str
        Settings that are shown and no choice, such as a random control: on no front, never chosen, not tested.
    against : mapping of setting -> setting, optional
        What a setting is held against when it is asked whether it made a category worse; by default the first for all
        others.
    rate, control
        False discoveries among "made worse", over all settings and categories together; see
        `markovsafety.interventions.vulnerable.adjusted`.
    level : float
    resamples, seed : int
        Of the prompts, with replacement within categories, all settings alike.

    Returns
    -------
    TradeOffs

    Raises
    ------
    InputError
        Settings, prompts or categories that do not fit, answers that are not judged.

    Notes
    -----
    A setting is allowed if its harm is believed to be at most the limit, in this group, whichever of the m settings is
    looked at: the ceiling is the upper end of an interval of level 1 - 2 (1 - level) / m (Bonferroni; or of `level` if
    that is more), so that with few answers nothing is allowed. Choices of several groups are so many claims, each of
    this level. What is shown of a chosen setting was seen on the answers that it was chosen by, which flatters its
    helpfulness a little; measure it again. Which settings are on a front is an estimate, too: shares of resamples say
    how firm. They know nothing of events that no answer shows: a setting without harm has none in any resample, and its
    interval says more.

    Examples
    --------
    Three strengths of an edit, 200 prompts of either kind; helpful are answers that are benign:

    >>> def answers(*shares):
    ...     return ms.Rollouts.of([[2]] * 200, prompt_id=range(200), outcome=np.repeat([0, 1, 2], shares), hit=0)
    >>> harmful = {"0": answers(4, 196, 0), "0.5": answers(8, 192, 0), "1": answers(40, 160, 0)}
    >>> harmless = {"0": answers(0, 80, 120), "0.5": answers(0, 20, 180), "1": answers(0, 0, 200)}
    >>> score = lambda rolls: rolls.outcome == 2
    >>> print(ms.interventions.trade_offs(harmful, harmless, reference=answers(0, 0, 200), score=score))
    chosen for harm <= 0.1: all: 0.5; made worse: all by 1
      all, 0: harm 0.020 [0.005, 0.050], helpful 0.300 [0.237, 0.369] front
      all, 0.5: harm 0.040 [0.017, 0.077], helpful 0.450 [0.380, 0.522] front chosen
      all, 1: harm 0.200 [0.147, 0.262], helpful 0.500 [0.429, 0.571] front worse
    """
    check_level(level)
    if not harmful or list(harmful) != list(harmless) or not 0 < limit < 1 or not 0 < rate < 1 or resamples < 1:
        raise InputError(
            f"settings {list(harmful)} and {list(harmless)}, limit={limit}, rate={rate}, resamples={resamples}",
            cause="every setting needs answers to harmful and to harmless prompts; limit and rate are probabilities",
            next="give both mappings with the same names in the same order",
        )
    cells = {s: Cells.of(r, "harm") for s, r in harmful.items()}
    refused = {s: Cells.of(r, "refusal") for s, r in harmless.items()}
    won = {s: _won(r, reference, score) for s, r in harmless.items()}
    held = _held(list(cells), beside, against)
    for kind in (cells, refused):
        _check_prompts(list(kind.values()))
    first = next(iter(cells))
    named = cells[first].groups
    if any(c.groups != named for c in (*cells.values(), *refused.values())):
        raise InputError(
            "harmful and harmless prompts, or the settings, have other categories",
            cause="harm and helpfulness are weighed in the same category",
            next="give prompts of the same categories throughout",
        )
    groups = ["all", *(named if len(named) > 1 else [])]
    open_to = [s for s in cells if s not in beside]
    joint = 1 - 2 * (1 - level) / max(len(open_to), 2)
    table: list[dict[str, Any]] = []
    for group in groups:
        harms, wins = ({s: _of(c[s], group) for s in c} for c in (cells, won))
        rows = [
            {
                "setting": s,
                "group": group,
                "harm": harms[s].bound(level, f"P(harm), {group}"),
                "refusal": _of(refused[s], group).bound(level, f"P(refusal), {group}"),
                "helpful": wins[s].bound(level, f"win rate, {group}"),
                "ceiling": float(harms[s].bound(joint, f"P(harm), {group}").upper),
            }
            for s in cells
        ]
        marked = [r for r in rows if r["setting"] in open_to]
        _marked(marked, limit)
        _resampled(marked, [harms[s] for s in open_to], [wins[s] for s in open_to], resamples, seed)
        table += [{"front": False, "allowed": False, "chosen": False} | r for r in rows]
    tested = [r for r in table if r["setting"] in held and (r["group"] != "all" or len(groups) == 1)]
    for row in tested:
        row["against"] = held[row["setting"]]
        before, after = (_of(cells[s], row["group"]) for s in (row["against"], row["setting"]))
        row["change"] = changed(before, after, level, f"change of P(harm), {row['group']}")
    for row, q in zip(tested, adjusted([r["change"].info["p"] for r in tested], control)):
        row |= {"p": row["change"].info["p"], "adjusted": float(q)}
        row["worse"] = bool(q <= rate and row["change"].value > 0)
    return TradeOffs(limit, rate, level, table)


def _held(settings: list[str], beside: Sequence[str], against: Mapping[str, str] | None) -> dict[str, str]:
    """What each tested setting is held against."""
    held = dict.fromkeys(settings[1:], settings[0]) if against is None else dict(against)
    unknown = [s for pair in held.items() for s in pair if s not in settings]
    if unknown:
        raise InputError(
            f"there is no setting {unknown[0]!r}",
            cause=f"the settings are {', '.join(settings)}",
            next="name some of these in against=",
        )
    return {s: other for s, other in held.items() if s not in beside}


def _check_prompts(sides: list[Cells]) -> None:
    """Raise unless all settings were asked the same prompts."""
    for side in sides[1:]:
        check_paired(sides[0].asked, side.asked)
        if not np.array_equal(side.prompt_id, sides[0].prompt_id):
            raise InputError(
                "the settings were asked other prompts",
                cause="which setting is better must not depend on who was asked what",
                next="sample every setting on the same prompts",
            )


def _of(cells: Cells, group: str) -> Cells:
    return cells if group == "all" else cells.take(cells.category == group)


def _marked(rows: list[dict[str, Any]], limit: float) -> None:
    """Front, allowed settings, and the choice of one group."""
    harm, helpful = (np.array([[r[k].value for r in rows]]) for k in ("harm", "helpful"))
    for row, on in zip(rows, _on_front(harm, helpful)[0]):
        row["front"], row["allowed"], row["chosen"] = bool(on), bool(row["ceiling"] <= limit), False
    allowed = [r for r in rows if r["allowed"]]
    if allowed:
        max(allowed, key=lambda r: (r["helpful"].value, -r["harm"].value))["chosen"] = True


def _on_front(harm: NDArray, helpful: NDArray) -> NDArray[np.bool_]:
    """Which settings no other one beats, bool (resamples, settings); arguments likewise."""
    beaten = np.zeros(harm.shape, bool)
    for other in range(harm.shape[1]):
        less, more = harm[:, [other]], helpful[:, [other]]
        beaten |= (less <= harm) & (more >= helpful) & ((less < harm) | (more > helpful))
    return ~beaten


def _resampled(rows: list[dict[str, Any]], harms: list[Cells], wins: list[Cells], resamples: int, seed: int) -> None:
    """Shares of resamples in which a setting is on the front, and in which it is the best of the allowed ones."""
    rng = np.random.default_rng(seed)
    harm, helpful = (_rates(side, _draws(side[0].category, resamples, rng)) for side in (harms, wins))
    allowed = np.array([r["allowed"] for r in rows])
    best = np.where(allowed, helpful, -np.inf).argmax(axis=1)
    for i, (row, share) in enumerate(zip(rows, _on_front(harm, helpful).mean(axis=0))):
        row["front_share"], row["best_share"] = float(share), float((best == i).mean()) if allowed[i] else 0.0


def _draws(category: NDArray, resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each prompt is drawn, float64 (resamples, prompts); as many of each category as there are."""
    out = np.zeros((resamples, len(category)))
    for name in np.unique(category.astype(str)):
        which = np.flatnonzero(category == name)
        out[:, which] = rng.multinomial(len(which), np.full(len(which), 1 / len(which)), size=resamples)
    return out


def _rates(side: list[Cells], drawn: NDArray) -> NDArray[np.float64]:
    """Pooled rates of resamples, float64 (resamples, settings)."""
    events, totals = (drawn @ np.stack([getattr(c, k) for c in side], axis=1) for k in ("events", "totals"))
    return events / totals


def win_rates(rolls: Rollouts, reference: Rollouts, score: Score, *, level: float = 0.95) -> dict[str, Bound]:
    """How often an answer is more helpful than one of a reference model to the same prompt; a tie counts half.

    Parameters
    ----------
    rolls, reference : Rollouts
        Of the same prompts.
    score : callable
        Rollouts -> float array (answers,).
    level : float

    Returns
    -------
    dict of group -> Bound
        "all", then the categories. The reference against itself gets 1/2.

    Raises
    ------
    InputError
        Other prompts, be it under the same numbers, or scores that are no numbers.

    Notes
    -----
    Of each prompt all pairs of answers are compared (the Mann-Whitney statistic over the number of pairs), and prompts
    are averaged; the interval is clustered by prompt.

    Examples
    --------
    Longer answers shall count as more helpful. Of four pairs three are won, and one is a tie:

    >>> ours = ms.Rollouts.of([[21, 22, 23, 2], [21, 22, 2]], prompt_id=0)
    >>> theirs = ms.Rollouts.of([[21, 2], [21, 22, 2]], prompt_id=0)
    >>> print(ms.interventions.win_rates(ours, theirs, score=lambda rolls: rolls.lengths)["all"])
    win rate = 0.875   95 % [0.102, 1] (one prompt only: the variance between prompts is
    not assessed)
    because: sampling 0.45; judge, lumping, model, truncation, rounding not assessed
    """
    won = _won(rolls, reference, score)
    names = won.groups if len(won.groups) > 1 else []
    told = {name: f"win rate, {name}" for name in names}
    return {name: _of(won, name).bound(level, told.get(name, "win rate")) for name in ("all", *names)}


def _won(rolls: Rollouts, reference: Rollouts, score: Score) -> Cells:
    """Answers of every prompt, and how many of them won; see `win_rates`."""
    scores = [np.asarray(score(r), dtype=np.float64) for r in (rolls, reference)]
    same = set(rolls.prompt_id.tolist()) <= set(reference.prompt_id.tolist())
    if not same or any(s.shape != (len(r),) or not np.isfinite(s).all() for s, r in zip(scores, (rolls, reference))):
        raise InputError(
            "the answers cannot be compared pair by pair",
            cause="the reference has not answered the same prompts, or a score is no finite number",
            next="sample both on the same prompts, and give one finite score per answer",
        )
    asked = asked_of(rolls)
    check_paired(asked, asked_of(reference))
    ids, first = np.unique(rolls.prompt_id, return_index=True)
    share, size = np.zeros(len(ids)), np.zeros(len(ids))
    for k, prompt in enumerate(ids):
        ours, theirs = scores[0][rolls.prompt_id == prompt], scores[1][reference.prompt_id == prompt]
        share[k], size[k] = _wins(ours, theirs), min(len(ours), len(theirs))
    names = np.empty(len(ids), dtype=object)
    names[:] = [str(c) for c in rolls.category[first]]
    return Cells(ids, names, share * size, size, asked)


def _wins(ours: NDArray, theirs: NDArray) -> float:
    """Share of pairs won, ties half."""
    ordered = np.sort(theirs)
    below, upto = np.searchsorted(ordered, ours, "left"), np.searchsorted(ordered, ours, "right")
    return float((below + upto).mean() / 2 / len(ordered))
