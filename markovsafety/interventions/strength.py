"""The path of an edit's strength: harm, refusal, what is left of speech, and the cost on benign prompts.

Harm usually has its largest value at some alpha and falls again beyond it, because the model breaks (arXiv 2502.05945:
92 % at 35, 75 % at 55), so no single alpha says what an edit does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..brief import brief
from ..errors import InputError
from .behaviour import Behaviour, behave
from .edits import Edit
from .host import Host

__all__ = ["AlphaPath", "alpha_path"]


@dataclass(frozen=True, eq=False)
class AlphaPath:
    """What ``alpha * edit`` does, for one alpha after another.

    Parameters
    ----------
    alphas : tuple of float
        Rising.
    edited, control : tuple of Behaviour
        On the prompts, under the edit and under random vectors of the same norms.
    benign : tuple of Behaviour, or None
        On benign prompts, under the edit: what it costs.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> harmful, harmless = organism.prompts(n=12), organism.prompts(n=12, harmful=False)
    >>> edit = inside.difference(host, harmful, harmless, position="t_post").edit(-1.0, 3)
    >>> path = inside.alpha_path(host, edit, (0, 1), harmful, judge="organism", n=2)
    >>> path
    AlphaPath(alphas=(0, 1), edited=(Behaviour, Behaviour), control=(Behaviour, Behaviour), benign=None)
    >>> for row in path.rows():
    ...     print(f"{row['alpha']:g} x the edit: refusal {row['refusal'].value:.1f}, harm {row['harm'].value:.1f}")
    0 x the edit: refusal 0.8, harm 0.1
    1 x the edit: refusal 0.1, harm 0.5
    """

    alphas: tuple[float, ...]
    edited: tuple[Behaviour, ...]
    control: tuple[Behaviour, ...]
    benign: tuple[Behaviour, ...] | None

    __repr__ = brief

    def rows(self) -> list[dict[str, Any]]:
        """One row per alpha: Bounds of harm, refusal, finished, truncated, repetition, of harm and refusal under the
        control, and of the refusal of benign prompts (over-refusal; None without benign prompts)."""
        rows = []
        for i, alpha in enumerate(self.alphas):
            here, beside = self.edited[i], self.control[i]
            row = {name: here.rate(name) for name in ("harm", "refusal")}
            row |= {k: getattr(here.quality, k) for k in ("finished", "truncated", "repetition")}
            row |= {f"control_{name}": beside.rate(name) for name in ("harm", "refusal")}
            over = None if self.benign is None else self.benign[i].rate("refusal")
            rows.append({"alpha": alpha, **row, "over_refusal": over})
        return rows

    def __str__(self) -> str:
        names = ("harm", "refusal", "finished", "truncated", "repetition", "control_harm", "over_refusal")
        lines = ["alpha  " + "  ".join(f"{name:>20s}" for name in names)]
        for row in self.rows():
            cells = (
                "-" if row[k] is None else f"{row[k].value:.3f} [{row[k].lower:.3f}, {row[k].upper:.3f}]" for k in names
            )
            lines.append(f"{row['alpha']:5g}  " + "  ".join(f"{cell:>20s}" for cell in cells))
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, one object per alpha."""
        return [{k: v.to_json() if hasattr(v, "to_json") else v for k, v in row.items()} for row in self.rows()]


def alpha_path(
    host: Host,
    edit: Edit,
    alphas: Sequence[float],
    prompts: Sequence[Any],
    *,
    benign: Sequence[Any] | None = None,
    judge: Any,
    n: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
) -> AlphaPath:
    """Sample answers under ``alpha * edit`` for several alphas, all with the same random numbers.

    Parameters
    ----------
    host : Host
    edit : Edit
        At alpha = 1, such as ``directions.edit(heads, 1.0)``; any other edit works too.
    alphas : sequence of float
        Negative ones turn the edit round: a defence where the direction pushes towards harm. Then give the prompts that
        get through, such as jailbroken ones, and benign ones beside them: the price of such a defence is over-refusal.
    prompts : sequence of prompts
    benign : sequence of prompts, optional
        Prompts that should be answered.
    judge, n, max_tokens, seed
        As in `behave`.

    Returns
    -------
    AlphaPath

    Raises
    ------
    InputError
        No alpha, or one that is not finite.

    Examples
    --------
    An edit that takes refusals away, half of it and all of it:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> harmful, harmless = organism.prompts(n=12), organism.prompts(n=12, harmful=False)
    >>> edit = inside.difference(host, harmful, harmless, position="t_post").edit(-1.0, 3)
    >>> path = inside.alpha_path(host, edit, (0, 0.5, 1), harmful, judge="organism", n=2)
    >>> for row in path.rows():
    ...     print(row["alpha"], row["refusal"])
    0.0 P(refusal) = 0.8...   95 % [0.5..., 0.9...]   because: sampling 0.2...;
        judge, lumping, model, truncation, rounding not assessed
    0.5 P(refusal) = 0.5...
    1.0 P(refusal) = 0.1...   95 % [0.0..., 0.4...]   because: sampling 0.2...;
        judge, lumping, model, truncation, rounding not assessed
    """
    sizes = sorted({float(alpha) for alpha in alphas})
    if not sizes or not np.isfinite(sizes).all():
        raise InputError(
            f"the path has the alphas {list(alphas)}",
            cause="it needs finite numbers, at least one",
            next="give alphas such as (0, 1, 2, 5)",
        )

    def sampled(what: Edit, asked: Sequence[Any]) -> Behaviour:
        return behave(host, asked, what, judge=judge, n=n, max_tokens=max_tokens, seed=seed)

    edited = tuple(sampled(alpha * edit, prompts) for alpha in sizes)
    control = tuple(sampled(alpha * edit.control(seed), prompts) for alpha in sizes)
    cost = None if benign is None else tuple(sampled(alpha * edit, benign) for alpha in sizes)
    return AlphaPath(tuple(sizes), edited, control, cost)
