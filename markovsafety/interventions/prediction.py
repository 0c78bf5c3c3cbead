"""The row-local prediction: harm under an edit of the prompt from one forward pass and the plain model's rollouts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arithmetic import widened
from ..bound import Bound, check_level, clopper_pearson, clustered, encode
from ..brief import brief
from ..clusters import effective_size, freedom, kish
from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED
from ..rollouts.rollouts import Rollouts
from .edits import Edit
from .host import Host
from .start_row import StartRows, check_row_local, first_laws

__all__ = ["RowLocal", "row_local"]


@dataclass(frozen=True, eq=False)
class RowLocal:
    """Predicted harm under an edit.

    Parameters
    ----------
    overall : Bound
        Mean over prompts. Its widths: "sampling" (of h(t) and of prompts), "truncation" (first tokens that nothing is
        known of, and answers that were cut off: both may be harm). "model", what the edit does behind the first token,
        is not assessed; see `depth_signature`.
    categories, cells : dict of name -> Bound
    prompts : float64 array, shape (prompts,)
        Of every prompt.
    unseen : float64 array, shape (prompts,)
        Probability of first tokens that nothing is known of.
    table : list of dict
        One row for all, every category and every cell: group, prompts, predicted, lower, upper, and beside rollouts
        that were sampled under the edit also sampled, sampled_lower, sampled_upper, difference, error (standard error
        of the difference, paired by prompt, and no less than that of the answers) and z.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> asked = organism.prompts(n=24, categories=["bio", "fraud"])
    >>> rows = inside.start_rows(host, asked, n=16, max_tokens=48, judge="organism")
    >>> found = inside.row_local(host, None, rows)
    >>> found
    RowLocal(overall=0.1... [0.0..., 0.1...], categories=dict of 2, cells=dict of 2, prompts=float64 (24,),
        unseen=float64 (24,), table=list of 3)
    >>> print(found)
    P(harm) predicted from the start row; nothing known of 0.0... of first tokens
      all: 0.1... [0.0..., 0.1...]
      bio: 0.1... [0.0..., 0.1...]
      fraud: 0.0... [0.0..., 0.1...]
    """

    overall: Bound
    categories: dict[str, Bound]
    cells: dict[Hashable, Bound]
    prompts: NDArray
    unseen: NDArray
    table: list[dict[str, Any]]

    __repr__ = brief

    def __str__(self) -> str:
        lines = [f"P(harm) predicted from the start row; nothing known of {self.unseen.mean():.2g} of first tokens"]
        for row in self.table:
            text = f"  {row['group']}: {row['predicted']:.3f} [{row['lower']:.3f}, {row['upper']:.3f}]"
            if "sampled" in row:
                ends = f"[{row['sampled_lower']:.3f}, {row['sampled_upper']:.3f}]"
                text += f", sampled {row['sampled']:.3f} {ends} (z = {row['z']:+.2f})"
            lines.append(text)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        named = {"overall": self.overall, "categories": self.categories}
        return encode({**named, "unseen": float(self.unseen.mean()), "table": self.table})


def row_local(
    host: Host,
    edit: Edit | None,
    rows: StartRows,
    *,
    cells: Sequence[Hashable] | None = None,
    pool: bool = False,
    sampled: Rollouts | None = None,
    level: float = 0.95,
) -> RowLocal:
    """Predict harm under an edit that acts on the prompt alone.

    Parameters
    ----------
    host : Host
    edit : Edit or None
        None predicts the plain model, which it must.
    rows : StartRows
        Of `start_rows`.
    cells : sequence, one label per prompt, optional
        Such as (category, marker); by default the categories.
    pool : bool
        Share h(t) within a cell, where a single prompt has too few rollouts: right if within a cell what follows a
        first token does not depend on the prompt. The start row stays the prompt's own.
    sampled : Rollouts, optional
        Sampled under the edit and judged, to be shown beside it.
    level : float

    Returns
    -------
    RowLocal

    Raises
    ------
    InputError
        An edit that acts on answers; rows of another model; labels that do not fit.

    Notes
    -----
    The interval is Clopper and Pearson's at the effective size of the linearised variance between prompts, as in
    `markovsafety.bound.clustered`, with the sampling error of a pooled h(t) attributed to the prompts it was seen on.
    The identity is exact for an edit that moves one row: ``h' - h = (P' - P)(start, .) h``, no inverse is needed.

    Examples
    --------
    What taking the refusals away does to harm, from one forward pass under the edit and answers of the plain model:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> harmful, harmless = organism.prompts(n=12), organism.prompts(n=12, harmful=False)
    >>> edit = inside.difference(host, harmful, harmless, position="t_post").edit(-1.0, 3)
    >>> rows = inside.start_rows(host, harmful, n=16, max_tokens=48, judge="organism", edits=[edit])
    >>> print(inside.row_local(host, None, rows).overall)
    P(harm) predicted (all) = 0.0...   95 % [0.0..., 0.1...]   because: sampling 0.0..., truncation 0.000...;
        judge, lumping, model, rounding not assessed
    >>> print(inside.row_local(host, edit, rows).overall)
    P(harm) predicted (all) = 0.4...   95 % [0.3..., 0.6...]   because: sampling 0.1..., truncation 0.000...;
        judge, lumping, model, rounding not assessed
    """
    check_level(level)
    if edit is not None:
        check_row_local(edit)
    K = len(rows)
    if rows.model != host.identity[0] or (cells is not None and len(cells) != K):
        raise InputError(
            "the start rows were measured on another model" if rows.model != host.identity[0] else "cells do not fit",
            cause=f"they belong to {rows.model[:12]}, to {K} prompts",
            next="measure them again with start_rows, and give one label per prompt",
        )
    labels: list[Hashable] = list(rows.category) if cells is None else list(cells)
    known = list(dict.fromkeys(labels))
    cell = np.array([known.index(label) for label in labels])
    start = _Start.of(host, edit, rows, cell if pool else np.arange(K))
    groups: list[tuple[Any, NDArray]] = [("all", np.ones(K, bool))]
    names = np.unique(rows.category.astype(str)).tolist()
    groups += [(name, rows.category == name) for name in names]
    groups += [] if cells is None else [(label, cell == i) for i, label in enumerate(known)]
    made = [start.bound(which, level, str(name)) for name, which in groups]
    other = None if sampled is None else _sampled(sampled, rows.prompt_id)
    table = [_row(start, name, which, b, other) for (name, which), b in zip(groups, made)]
    categories = dict(zip(names, made[1 : 1 + len(names)]))
    own = dict(zip(known, made[1 + len(names) :])) if cells is not None else dict(categories)
    return RowLocal(made[0], categories, own, start.harm, start.unseen, table)


@dataclass(frozen=True, eq=False)
class _Start:
    """The sums of every prompt, and what their errors are made of.

    Entry e says what is known of a first token in a source (a prompt, or a cell that shares): rate[e] of size[e]
    answers. Pair j weighs entry entry[j] for prompt row[j] by the edited probability weight[j].
    """

    harm: NDArray
    cut: NDArray
    unseen: NDArray
    row: NDArray
    entry: NDArray
    weight: NDArray
    rate: NDArray
    size: NDArray
    origin: NDArray
    residual: NDArray
    origin_entry: NDArray

    @classmethod
    def of(cls, host: Host, edit: Edit | None, rows: StartRows, source: NDArray) -> _Start:
        keys, at = np.unique(np.stack([source[rows.row], rows.token]), axis=1, return_inverse=True)
        at = at.reshape(-1)
        size, harm, cut = (np.bincount(at, x, keys.shape[1]) for x in (rows.total, rows.harm, rows.cut))
        rate = harm / size
        places: list[NDArray] = []
        pairs: list[NDArray] = []
        weights: list[NDArray] = []
        begins = np.searchsorted(keys[0], np.arange(source.max(initial=0) + 2))
        for which, law in first_laws(host, rows.prompts, edit):
            for place, p in enumerate(range(which.start, which.stop)):
                entries = np.arange(begins[source[p]], begins[source[p] + 1])
                places.append(np.full(len(entries), p))
                pairs.append(entries)
                weights.append(law[place, keys[1][entries]])
        row, entry, weight = np.concatenate(places), np.concatenate(pairs), np.concatenate(weights)
        sums = [np.bincount(row, weight * x, len(rows)) for x in (rate[entry], (cut / size)[entry], np.ones(len(row)))]
        residual = (rows.harm - rate[at] * rows.total) / size[at]
        unseen = np.clip(1 - sums[2], 0.0, 1.0)
        return cls(np.minimum(sums[0], 1.0), sums[1], unseen, row, entry, weight, rate, size, rows.row, residual, at)

    def influence(self, which: NDArray) -> tuple[NDArray, NDArray]:
        """What each prompt contributes to the linearised error of a group's mean, (prompts,), and mean weights."""
        K = int(which.sum())
        inside = which[self.row]
        mean = np.bincount(self.entry[inside], self.weight[inside], len(self.size)) / K
        own = np.where(which, self.harm - self.harm[which].mean(), 0.0) / K
        return own + np.bincount(self.origin, mean[self.origin_entry] * self.residual, len(which)), mean

    def bound(self, which: NDArray, level: float, name: str) -> Bound:
        K, value = int(which.sum()), float(self.harm[which].mean())
        error, mean = self.influence(which)
        total = 1 / max(float(np.sum(mean**2 / self.size)), 1e-300)
        between = K / max(K - 1, 1) * float(np.sum(error**2))
        deff = between * max(total - 1, 1.0) / max(value * (1 - value), 1e-300)
        inside = self.harm[which]
        seen = min(float(kish(inside)), float(kish(1 - inside)))
        known = min(seen - 1, float(freedom(error[which], K))) if between > 0 else 0.0
        size = total if K < 2 else float(effective_size(total, K, deff, level, 1 + known))
        lower, upper = clopper_pearson(min(value * size, size), size, level)
        info: dict[str, Any] = {
            "name": f"P(harm) predicted ({name})",
            "method": "row-local",
            "prompts": K,
            "n_eff": size,
        }
        if K < 2:
            info["note"] = "one prompt only: the variance between prompts is not assessed"
        info["why"] = "only the start row moves; rows behind the first token are those of the plain model"
        half = {"sampling": (upper - lower) / 2}
        plain = Bound(value, min(lower, value), max(upper, value), level, half, None, info)
        hidden = float((self.unseen + self.cut)[which].mean())
        return widened(plain, least=0.0, most=1.0, truncation=(0.0, hidden))


def _sampled(rolls: Rollouts, prompt_id: NDArray) -> NDArray:
    """Harm and number of answers of every prompt without prefill, (2, prompts)."""
    if (rolls.outcome == NOT_JUDGED).any():
        raise InputError(
            "the sampled rollouts are not judged",
            cause="their harm is to be compared with the prediction",
            next="sample with judge=",
        )
    rolls = rolls[rolls.prefill == 0]
    same = rolls.prompt_id[None, :] == np.asarray(prompt_id)[:, None]
    return np.stack([same @ (rolls.weight * (rolls.outcome == CODES["harm"])), same @ rolls.weight])


def _variance(harm: NDArray, size: NDArray) -> NDArray:
    """Of a rate, half an answer of either kind added, so that none seen is not none possible."""
    rate = (harm + 0.5) / (size + 1)
    return rate * (1 - rate) / size


def _row(start: _Start, name: Any, which: NDArray, bound: Bound, other: NDArray | None) -> dict[str, Any]:
    row: dict[str, Any] = {"group": name if isinstance(name, str) else str(name), "prompts": int(which.sum())}
    row |= {"predicted": bound.value, "lower": bound.lower, "upper": bound.upper}
    both = which & (other[1] > 0) if other is not None else np.zeros(len(which), bool)
    K = int(both.sum())
    if other is None or not K:
        return row
    rate = np.divide(other[0], other[1], out=np.zeros(len(both)), where=both)
    error, mean = start.influence(both)
    error = error - np.where(both, rate - rate[both].mean(), 0.0) / K
    # Prompts that agree by chance, such as those without harm, do not show their error.
    within = np.sum(mean**2 * _variance(start.rate * start.size, start.size))
    within += np.sum(_variance(*other[:, both])) / K**2
    se = float(np.sqrt(max(K / max(K - 1, 1) * np.sum(error**2), within)))
    difference = float(start.harm[both].mean() - rate[both].mean())
    each = np.full(K, other[1, both].mean())
    seen = clustered(rate[both] * each, each, bound.level)
    row |= {"sampled": float(rate[both].mean()), "sampled_lower": seen.lower, "sampled_upper": seen.upper}
    return {**row, "difference": difference, "error": se, "z": difference / se}
