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

from ..bound import Bound, check_level, clustered, encode
from ..errors import InputError
from ..rollouts.rollouts import Rollouts
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
        One row for each setting and group ("all", then categories): setting, group, harm, refusal, helpful (Bounds),
        front (no setting has less harm and more helpfulness in this group), allowed (harm is believed to be at most the
        limit), chosen; in categories, for settings after the first, also change (of harm, from the first), p, adjusted,
        worse.
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
        """Settings and categories in which they do more harm than the first setting."""
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
    level: float = 0.95,
) -> TradeOffs:
    """Safety and helpfulness of every setting in every category.

    Parameters
    ----------
    harmful, harmless : mapping of setting -> Rollouts
        Judged answers to harmful and to harmless prompts; the same prompts and settings. The first setting is what the
        others are held against.
    reference : Rollouts
        Answers of the model before alignment (supervised fine-tuning alone) to the harmless prompts.
    score : callable
        Rollouts -> one number per answer, more is more helpful; see `win_rates`.
    limit : float
        Tolerated probability of harm in every category.
    beside : sequence of str
        Settings that are shown and no choice, such as a random control: on no front, never chosen, not tested.
    rate, control
        False discoveries among "made worse"; see `markovsafety.interventions.vulnerable.adjusted`.
    level : float

    Returns
    -------
    TradeOffs

    Raises
    ------
    InputError
        Settings or categories that do not fit, answers that are not judged.

    Notes
    -----
    A setting is allowed if the upper end of its harm is at most the limit: with few answers nothing is. Choosing the
    most helpful of several by the same answers flatters it a little; measure the chosen one again.
    """
    check_level(level)
    if not harmful or list(harmful) != list(harmless) or not 0 < limit < 1 or not 0 < rate < 1:
        raise InputError(
            f"settings {list(harmful)} and {list(harmless)}, limit={limit}, rate={rate}",
            cause="every setting needs answers to harmful and to harmless prompts; limit and rate are probabilities",
            next="give both mappings with the same names in the same order",
        )
    cells = {s: Cells.of(r, "harm") for s, r in harmful.items()}
    refused = {s: Cells.of(r, "refusal") for s, r in harmless.items()}
    wins = {s: win_rates(r, reference, score, level=level) for s, r in harmless.items()}
    first = next(iter(cells))
    named = cells[first].groups
    if any(c.groups != named for c in (*cells.values(), *refused.values())):
        raise InputError(
            "harmful and harmless prompts, or the settings, have other categories",
            cause="harm and helpfulness are weighed in the same category",
            next="give prompts of the same categories throughout",
        )
    groups = ["all", *(named if len(named) > 1 else [])]
    table: list[dict[str, Any]] = []
    for group in groups:
        rows = [
            {
                "setting": s,
                "group": group,
                "harm": _of(cells[s], group).bound(level, f"P(harm), {group}"),
                "refusal": _of(refused[s], group).bound(level, f"P(refusal), {group}"),
                "helpful": wins[s][group],
            }
            for s in cells
        ]
        _marked([r for r in rows if r["setting"] not in beside], limit)
        table += [{"front": False, "allowed": False, "chosen": False} | r for r in rows]
    untested = {first, *beside}
    tested = [r for r in table if r["setting"] not in untested and (r["group"] != "all" or len(groups) == 1)]
    for row in tested:
        before, after = (_of(cells[s], row["group"]) for s in (first, row["setting"]))
        row["change"] = changed(before, after, level, f"change of P(harm), {row['group']}")
    for row, q in zip(tested, adjusted([r["change"].info["p"] for r in tested], control)):
        row |= {"p": row["change"].info["p"], "adjusted": float(q)}
        row["worse"] = bool(q <= rate and row["change"].value > 0)
    return TradeOffs(limit, rate, level, table)


def _of(cells: Cells, group: str) -> Cells:
    return cells if group == "all" else cells.take(cells.category == group)


def _marked(rows: list[dict[str, Any]], limit: float) -> None:
    """Front, allowed settings, and the choice of one group."""
    points = np.array([[-r["harm"].value, r["helpful"].value] for r in rows])
    for row, point in zip(rows, points):
        row["front"] = not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
        row["allowed"], row["chosen"] = bool(row["harm"].upper <= limit), False
    allowed = [r for r in rows if r["allowed"]]
    if allowed:
        max(allowed, key=lambda r: (r["helpful"].value, -r["harm"].value))["chosen"] = True


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
        Other prompts, or scores that are no numbers.

    Notes
    -----
    Of each prompt all pairs of answers are compared (the Mann-Whitney statistic over the number of pairs), and prompts
    are averaged; the interval is clustered by prompt.
    """
    scores = [np.asarray(score(r), dtype=np.float64) for r in (rolls, reference)]
    same = set(rolls.prompt_id.tolist()) <= set(reference.prompt_id.tolist())
    if not same or any(s.shape != (len(r),) or not np.isfinite(s).all() for s, r in zip(scores, (rolls, reference))):
        raise InputError(
            "the answers cannot be compared pair by pair",
            cause="the reference has not answered the same prompts, or a score is no finite number",
            next="sample both on the same prompts, and give one finite score per answer",
        )
    ids, first = np.unique(rolls.prompt_id, return_index=True)
    share, size = np.zeros(len(ids)), np.zeros(len(ids))
    for k, prompt in enumerate(ids):
        ours, theirs = scores[0][rolls.prompt_id == prompt], scores[1][reference.prompt_id == prompt]
        share[k], size[k] = _wins(ours, theirs), min(len(ours), len(theirs))
    category = rolls.category[first].astype(str)
    out = {"all": clustered(share * size, size, level, "win rate")}
    names = sorted(set(category.tolist()))
    for name in names if len(names) > 1 else []:
        which = category == name
        out[name] = clustered(share[which] * size[which], size[which], level, f"win rate, {name}")
    return out


def _wins(ours: NDArray, theirs: NDArray) -> float:
    """Share of pairs won, ties half."""
    ordered = np.sort(theirs)
    below, upto = np.searchsorted(ordered, ours, "left"), np.searchsorted(ordered, ours, "right")
    return float((below + upto).mean() / 2 / len(ordered))
