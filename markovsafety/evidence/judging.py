"""How often a judge errs: its confusion matrix, estimated from labelled rollouts and as uncertain as they are few.

A judge's verdict is not the truth. What is known about the difference comes from rollouts that were labelled as well,
by a person or a better judge, and is kept here as counts of (true, judged) outcomes by prompt and category.
`markovsafety.evidence.judging_rates` corrects rates with it, `judging_chains` chains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, check_level
from ..chains.tally import collect
from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED, OUTCOMES
from .cells import is_rollouts
from .labels import INDEPENDENT, codes_of, label_rate

__all__ = ["INDEPENDENT", "Confusion", "better_than_chance", "confusion", "error_rates"]


@dataclass(frozen=True, eq=False)
class Confusion:
    """Labelled rollouts by what they truly came to and what the judge said. Those of two sets add up with ``+``.

    Parameters
    ----------
    prompt_id : int array, shape (rows,)
        `INDEPENDENT` for labels that were not kept by prompt.
    category : str array, shape (rows,)
    counts : array, shape (rows, true outcome, judged outcome)
        Weighted numbers of rollouts, in the order of `markovsafety.OUTCOMES`.
    by : {None, "category"}
        Whether the judge's errors are taken to differ between categories.

    Raises
    ------
    InputError
        If shapes differ, counts are no counts, or `by` is unknown.

    Notes
    -----
    A row of the matrix, P(judged | true), can be read from labels only if rollouts were chosen for labelling without
    looking at the verdict: all, at random, or by prompt. If, say, 100 answers were labelled that the judge called
    harmful and 100 that it did not, weight every label by how many rollouts it stands for.

    Examples
    --------
    Labels that were counted by hand, a row for each true outcome:

    >>> labels = [[18, 0, 2, 0], [0, 40, 0, 0], [1, 0, 39, 0], [0, 0, 0, 0]]
    >>> ms.evidence.Confusion.of(labels)
    100 labelled rollouts; a row is a true outcome, a column a verdict
                 harm  refusal  benign  truncated
           harm    18        0       2          0
        refusal     0       40       0          0
         benign     1        0      39          0
      truncated     0        0       0          0
      P(judged harmful | harm) = 0.9   95 % [0.683, 0.988]
          because: sampling 0.15; judge, lumping, model, truncation, rounding not assessed
      P(judged harmful | no harm) = 0.0125   95 % [0.000316, 0.0677]
          because: sampling 0.034; judge, lumping, model, truncation, rounding not assessed
    """

    prompt_id: NDArray
    category: NDArray
    counts: NDArray
    by: str | None = None

    def __post_init__(self):
        ids, names = np.array(self.prompt_id, dtype=np.int64), np.array(self.category, dtype=str)
        counts, size = np.array(self.counts, dtype=np.float64), len(OUTCOMES)
        if ids.ndim != 1 or names.shape != ids.shape or counts.shape != (len(ids), size, size):
            raise InputError(
                f"A confusion matrix of {counts.shape} counts for {len(ids)} prompts and {len(names)} categories.",
                cause=f"Every row holds {size} true by {size} judged outcomes ({', '.join(OUTCOMES)}).",
                next="Use confusion(judged, labels), or Confusion.of(counts).",
            )
        if not (np.isfinite(counts) & (counts >= 0)).all():
            raise InputError(
                "A confusion matrix holds something that is no count.",
                cause="Counts of labelled rollouts are finite and not negative.",
                next="Pass numbers of rollouts, not rates.",
            )
        if self.by not in (None, "category"):
            raise _unknown_by(self.by)
        prompts, p = np.unique(ids, return_inverse=True)
        kinds, c = np.unique(names, return_inverse=True)
        (c, p), (flat,) = collect([c.reshape(-1), p.reshape(-1)], [counts.reshape(-1, size * size)])
        seen = flat.sum(axis=1) > 0
        values = prompts[p[seen]], kinds[c[seen]], flat[seen].reshape(-1, size, size)
        for name, value in zip(("prompt_id", "category", "counts"), values):
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, counts: Any, by: str | None = None) -> Confusion:
        """From totals, taken as independent labels.

        Parameters
        ----------
        counts : array, shape (4, 4), or dict from category to such arrays
            True by judged outcome, in the order of `markovsafety.OUTCOMES`; or shape (2, 2): harm and benign only.
        by : {None, "category"}
        """
        table = counts if isinstance(counts, Mapping) else {"all": counts}
        full = [_four_by_four(value) for value in table.values()]
        shape = (len(full), len(OUTCOMES), len(OUTCOMES))
        return cls(np.full(len(full), INDEPENDENT), np.array(list(table), dtype=str), np.reshape(full, shape), by)

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories with labels, sorted."""
        return tuple(np.unique(self.category).tolist())

    @property
    def labels(self) -> float:
        """Weighted number of labelled rollouts."""
        return float(self.counts.sum())

    def matrix(self, category: str | None = None) -> NDArray[np.float64]:
        """Labelled rollouts by true and judged outcome, shape (4, 4); of one category, or of all."""
        return self.counts[self._rows(category)].sum(axis=0)

    def rates(self, category: str | None = None) -> NDArray[np.float64]:
        """P(judged | true), shape (4, 4); nan in the row of an outcome without labels."""
        counts = self.matrix(category)
        total = counts.sum(axis=1, keepdims=True)
        return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)

    def rate(
        self, true: Any, judged: Any, category: str | None = None, level: float = 0.95, name: str | None = None
    ) -> Bound:
        """P(judged is one of some outcomes | truth is one of some outcomes).

        Parameters
        ----------
        true, judged : str or collection of str
            Outcome names.
        category : str, optional
        level : float
        name : str, optional

        Returns
        -------
        Bound
            Clopper-Pearson, clustered by the labelled prompts; nan and [0, 1] where no rollout has that truth.
        """
        rows, columns = (
            [CODES[o] for o in ([x] if isinstance(x, str) else x)] for x in (true, judged)
        )  # fmt: skip
        at = self._rows(category)
        part = self.counts[at][:, rows]
        events, totals = part[:, :, columns].sum(axis=(1, 2)), part.sum(axis=(1, 2))
        return label_rate(self.prompt_id[at], events, totals, level, name)

    def draws(self, n: int, seed: int = 0, category: str | None = None, prior: float = 0.5) -> NDArray[np.float64]:
        """Matrices P(judged | true) from the Dirichlet posterior of every row, shape (n, 4, 4).

        Parameters
        ----------
        n : int
        seed : int
        category : str, optional
        prior : float
            Pseudo-labels per cell; 0.5 is Jeffreys' prior.

        Notes
        -----
        Where labels of one prompt resemble each other, a row counts as the number of independent labels that its most
        frequent verdict is worth.
        """
        counts, random = self.matrix(category), np.random.default_rng(seed)
        out = np.empty((n, *counts.shape))
        for i, row in enumerate(counts):
            total = row.sum()
            if total > 0:
                most = self.rate(OUTCOMES[i], OUTCOMES[int(row.argmax())], category)
                row = row * (most.info["n_eff"] / total)
            out[:, i] = random.dirichlet(row + prior, n)
        return out

    def _rows(self, category: str | None) -> NDArray[np.bool_]:
        if category is None:
            return np.ones(len(self.category), dtype=bool)
        rows = self.category == category
        if not rows.any():
            raise InputError(
                f"No rollout of category {category!r} was labelled.",
                cause=f"There are labels in {', '.join(self.categories) or 'no category'}.",
                next="Label some, or take the errors as alike in all categories: confusion(..., by=None).",
            )
        return rows

    def __add__(self, other: Confusion) -> Confusion:
        if not isinstance(other, Confusion):
            return NotImplemented
        if self.by != other.by:
            raise InputError(
                "A confusion matrix by category and a pooled one cannot be added.",
                cause="They assume different things of the judge.",
                next="Make both with the same `by`.",
            )
        ids, names, counts = (np.concatenate([getattr(x, name) for x in (self, other)]) for name in _PARTS)
        return Confusion(ids, names, counts, self.by)

    def __radd__(self, other: Any) -> Confusion:
        """Let ``sum(parts)`` work, which begins at 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __str__(self) -> str:
        lines = [f"{self.labels:g} labelled rollouts; a row is a true outcome, a column a verdict"]
        for name in self.categories if self.by else (None,):
            table = [["" if name is None else name, *OUTCOMES]]
            table += [[o, *(f"{x:g}" for x in row)] for o, row in zip(OUTCOMES, self.matrix(name))]
            sizes = [max(map(len, column)) for column in zip(*table)]
            lines += ["  " + "  ".join(cell.rjust(s) for cell, s in zip(row, sizes)) for row in table]
            lines += [f"  {rate}" for rate in error_rates(self, name)]
        return "\n".join(lines)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` reads back."""
        return {
            "outcomes": list(OUTCOMES),
            "by": self.by,
            "prompt_id": self.prompt_id.tolist(),
            "category": self.category.tolist(),
            "counts": self.counts.tolist(),
        }

    @classmethod
    def from_json(cls, data: Any) -> Confusion:
        """The confusion matrix that `to_json` described.

        Raises
        ------
        InputError
            If the data are something else.
        """
        good = isinstance(data, Mapping) and {*_PARTS, "outcomes"} <= set(data)
        if not good or list(data["outcomes"]) != list(OUTCOMES):
            raise InputError(
                "This is no confusion matrix.",
                cause=f"It needs {', '.join(_PARTS)} and the outcomes {', '.join(OUTCOMES)}, in that order.",
                next="Write it with Confusion.to_json().",
            )
        try:
            size = len(OUTCOMES)
            counts = np.asarray(data["counts"], dtype=np.float64).reshape(-1, size, size)
            return cls(np.asarray(data["prompt_id"], np.int64), np.asarray(data["category"], str), counts,
                       data.get("by"))  # fmt: skip
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                "This confusion matrix is damaged.", cause=str(error), next="Write it again with to_json()."
            ) from None


_PARTS = ("prompt_id", "category", "counts")


def confusion(judged: Any, truth: Any, by: str | None = None, *, weight: Any = None) -> Confusion:
    """How often a judge errs, from rollouts whose true outcome is known.

    Parameters
    ----------
    judged : Rollouts
        With the judge's verdicts.
    truth : Rollouts, sequence, or dict from row to outcome
        The labels: the same rollouts under a judge that is taken as right; or one outcome per rollout, by name or code,
        where None, "" and -1 mean not labelled; or the outcomes of some rows.
    by : {None, "category"}
        Whether the judge's errors may differ between categories of prompts.
    weight : array, shape (n,), optional
        How many rollouts each label stands for, where those to label were chosen by their verdict. Only their ratios
        matter: they are scaled to the number of equal labels that they are worth (L. Kish, Survey Sampling (1965)).

    Returns
    -------
    Confusion

    Raises
    ------
    InputError
        If nothing is labelled and judged, a label is no outcome, or the labels belong to other rollouts.

    Examples
    --------
    A judge that knows one of two harmful words, and labels of the answers to 40 of 100 prompts:

    >>> said = [[5, 9, 2], [5, 8, 2], [7, 2], [5, 6, 2]] * 100
    >>> rolls = ms.Rollouts.of(said, prompt_id=np.arange(400) // 4)
    >>> judged = ms.judge(rolls, "lexicon", harm=[9], refusal=[7], eos_ids=[2])
    >>> labels = ["harm", "harm", "refusal", "benign"] * 40 + [None] * 240
    >>> found = ms.confusion(judged, labels)
    >>> found.matrix().astype(int)
    array([[40,  0, 40,  0],
           [ 0, 40,  0,  0],
           [ 0,  0, 40,  0],
           [ 0,  0,  0,  0]])
    >>> print(found.rate("harm", "harm", name="P(judged harmful | harm)"))
    P(judged harmful | harm) = 0.5   95 % [0.386, 0.614]
        because: sampling 0.11; judge, lumping, model, truncation, rounding not assessed
    """
    if not is_rollouts(judged):
        raise InputError(
            f"{type(judged).__name__} holds no verdicts.",
            cause="A judge's errors are counted on the rollouts that it judged.",
            next="confusion(judge(rolls, ...), labels).",
        )
    if by not in (None, "category"):
        raise _unknown_by(by)
    said, true = np.asarray(judged.outcome, dtype=np.int64), codes_of(judged, truth)
    both = (said != NOT_JUDGED) & (true != NOT_JUDGED)
    if not both.any():
        raise InputError(
            f"None of {len(said)} rollouts is both labelled and judged.",
            cause="A judge's errors show only where its verdict meets a label.",
            next="Label some of the rollouts that were judged.",
        )
    w = np.ones(len(said)) if weight is None else np.asarray(weight, dtype=np.float64)
    if w.shape != said.shape:
        raise InputError(
            f"{w.size} weights for {len(said)} rollouts.", cause="There is one per rollout.", next="Pass as many."
        )
    at = np.flatnonzero(both)
    w = w * (w[at].sum() / max(float((w[at] ** 2).sum()), 1e-300))  # they add up to Kish's effective number of labels
    counts = np.zeros((len(at), len(OUTCOMES), len(OUTCOMES)))
    counts[np.arange(len(at)), true[at], said[at]] = w[at]
    return Confusion(np.asarray(judged.prompt_id)[at], np.asarray(judged.category, dtype=str)[at], counts, by)


def error_rates(found: Confusion, category: str | None = None, level: float = 0.95) -> tuple[Bound, Bound]:
    """Sensitivity, P(judged harmful | harm), and rate of false alarms, P(judged harmful | no harm).

    Parameters
    ----------
    found : Confusion
    category : str, optional
        None takes all labels together.
    level : float

    Returns
    -------
    sensitivity, alarms : Bound
        Each Clopper-Pearson, clustered by prompt.

    Notes
    -----
    What is not harm counts as labelled: a judge that errs differently on refusals and on harmless help has an alarm
    rate that depends on their mix.
    """
    check_level(level)
    return (
        found.rate("harm", "harm", category, level, "P(judged harmful | harm)"),
        found.rate(OUTCOMES[1:], "harm", category, level, "P(judged harmful | no harm)"),
    )


def better_than_chance(sensitivity: Bound, alarms: Bound) -> Bound:
    """Youden's index: sensitivity minus the rate of false alarms; 0 is a coin, 1 a judge that never errs.

    Notes
    -----
    W. J. Youden, Cancer 3 (1950) 32. The interval is Newcombe's for a difference of independent rates. Where one of
    the two has no labels, the value is nan.
    """
    value = sensitivity.value - alarms.value
    s, a = (0.5 if np.isnan(x.value) else x.value for x in (sensitivity, alarms))
    middle = s - a
    lower = max(middle - float(np.hypot(s - sensitivity.lower, alarms.upper - a)), -1.0)
    upper = min(middle + float(np.hypot(sensitivity.upper - s, a - alarms.lower)), 1.0)
    info = {"name": "sensitivity - false alarms", "method": "MOVER"}
    return Bound(value, lower, upper, sensitivity.level, {"sampling": (upper - lower) / 2}, None, info)


def _four_by_four(counts: Any) -> NDArray[np.float64]:
    table = np.asarray(counts, dtype=np.float64)
    if table.shape == (2, 2):
        at = [CODES["harm"], CODES["benign"]]
        full = np.zeros((len(OUTCOMES), len(OUTCOMES)))
        full[np.ix_(at, at)] = table
        return full
    if table.shape != (len(OUTCOMES), len(OUTCOMES)):
        raise InputError(
            f"A confusion matrix of shape {table.shape}.",
            cause=f"It has a row and a column for each of {', '.join(OUTCOMES)}, or for harm and benign.",
            next="Pass a 4 x 4 or 2 x 2 table of counts.",
        )
    return table


def _unknown_by(by: Any) -> InputError:
    return InputError(
        f"by is {by!r}.",
        cause="A judge's errors are alike in all categories, or their own in each.",
        next='Pass by=None or by="category".',
    )
