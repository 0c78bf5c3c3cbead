"""What a chain predicts against what held-out rollouts say."""

from __future__ import annotations

from typing import Any

import numpy as np

from .columns import remember
from .style import DEPTH_COLUMN, OUTCOME_COLOURS, SPOKEN, axes_or_new, errorbars, key_above, styled
from .themes import tone

__all__ = ["check"]

DIFFERENCE = "difference of probabilities of harm"


@styled
def check(check: Any, ax: Any = None) -> Any:
    """Prediction minus measurement after k forced tokens, with its interval, and the margin as a band.

    Parameters
    ----------
    check : Check
        Of `markovsafety.check`.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> from markovsafety.exercises import case
    >>> rolls = case().rolls
    >>> chain = ms.estimate(ms.count(rolls[rolls.prompt_id < 30], states=ms.Position()))
    >>> ax = ms.plot.check(ms.check(chain, rolls[rolls.prompt_id >= 30]))
    """
    ax = axes_or_new(ax, (6.0, 2.8))
    rows = check.table
    names = ("difference", "difference_lower", "difference_upper")
    at = np.array([[r[name] for name in names] for r in rows], dtype=float).reshape(-1, 3)
    x = np.arange(len(rows))
    band = {"color": OUTCOME_COLOURS["benign"], "alpha": 0.12, "linewidth": 0}
    ax.axhspan(-check.margin, check.margin, label=f"margin ±{check.margin:g}", **band)
    ax.axhline(0, color=tone().soft, linewidth=0.8)
    for verdict, (colour, marker, label) in _verdicts().items():
        mine = np.array([r["verdict"] == verdict for r in rows], dtype=bool)
        if mine.any():
            errorbars(ax, x[mine], at[mine], color=colour, marker=marker, markersize=5.5, label=label)
    where = {DEPTH_COLUMN: [r["k"] for r in rows], "verdict": [r["verdict"] for r in rows]}
    remember(ax, DIFFERENCE, where, at, kind="predicted minus measured")
    remember(ax, DIFFERENCE, {}, np.array([[np.nan, -check.margin, check.margin]]), kind="margin")
    known = at[np.isfinite(at)]
    low, high = min([-1.6 * check.margin, *known]), max([1.6 * check.margin, *known])
    ax.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    ax.set_xlim(-0.6, max(len(rows), 1) - 0.4)
    ax.set_xticks(x, [f"{r['k']:g}" for r in rows])
    ax.set_xlabel(SPOKEN)
    ax.set_ylabel("predicted − measured")
    key_above(ax, 5, handlelength=1.2)
    return ax


def _verdicts() -> dict[str, tuple[str, str, str]]:
    """Colour, marker and text of each verdict."""
    return {
        "within": (OUTCOME_COLOURS["benign"], "o", "within the margin"),
        "off": (OUTCOME_COLOURS["harm"], "X", "off"),
        "cannot tell": (tone().soft, "D", "cannot tell"),
        "not counted": (tone().gap, "s", "not counted"),
    }
