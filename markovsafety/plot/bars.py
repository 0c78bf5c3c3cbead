"""Bars: harm by category, what answers come to, where harm strikes, what a change is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..bound import Bound
from .columns import remember
from .style import (
    DEPTH_COLUMN,
    HARM,
    OUTCOME_COLOURS,
    PROBABILITY,
    SPOKEN,
    axes_or_new,
    ceiling,
    errorbars,
    key_above,
    plain,
    points,
    state_text,
    styled,
)
from .themes import tone

__all__ = ["attribution", "categories", "outcomes", "strikes"]


@styled
def categories(bounds_by_category: Mapping[str, Any], ax: Any = None, truth: Mapping[str, Any] | None = None) -> Any:
    """Probability of harm per category, as horizontal bars with intervals.

    Parameters
    ----------
    bounds_by_category : dict
        Category -> Bound, or category -> {situation: Bound} for several bars per category.
    ax : Axes, optional
    truth : dict, optional
        Planted truth in the same shape, of numbers; drawn as a black tick.

    Returns
    -------
    Axes

    Examples
    --------
    >>> measured = {
    ...     "bio": {"free": ms.Bound(0.09, 0.02, 0.25), "5 tokens forced": ms.Bound(0.72, 0.53, 0.86)},
    ...     "cyber": {"free": ms.Bound(0.09, 0.02, 0.25), "5 tokens forced": ms.Bound(0.47, 0.29, 0.65)},
    ...     "fraud": {"free": ms.Bound(0.16, 0.05, 0.33), "5 tokens forced": ms.Bound(0.41, 0.24, 0.59)},
    ...     "privacy": {"free": ms.Bound(0.06, 0.01, 0.21), "5 tokens forced": ms.Bound(0.22, 0.09, 0.40)},
    ... }
    >>> ax = ms.plot.categories(measured)
    """
    from matplotlib.ticker import MaxNLocator

    rows = {c: dict(b) if isinstance(b, Mapping) else {"": b} for c, b in bounds_by_category.items()}
    groups = list(dict.fromkeys(g for row in rows.values() for g in row))
    ax = axes_or_new(ax, (6.0, 0.9 + 0.22 * max(1, len(rows)) * max(1, len(groups))))
    thick = 0.8 / max(1, len(groups))
    strengths = np.linspace(0.35, 0.95, len(groups)) if len(groups) > 1 else [0.85]
    tops: list[float] = []
    for g, (group, strength) in enumerate(zip(groups, strengths)):
        there = [(i, c) for i, (c, row) in enumerate(rows.items()) if group in row]
        y = np.array([i for i, _ in there]) + (g - (len(groups) - 1) / 2) * thick
        at = points(rows[c][group] for _, c in there)
        ax.barh(y, np.nan_to_num(at[:, 0]), 0.9 * thick, color=HARM, alpha=strength, label=plain(group) or None)
        errorbars(ax, y, at, horizontal=True, marker="none", color=tone().ink)
        tops.extend(at[:, 2])
        remember(ax, PROBABILITY, {"category": [c for _, c in there]}, [rows[c][group] for _, c in there], series=group)
        for where, (_, c) in zip(y, there):
            told = (truth or {}).get(c)
            told = told.get(group) if isinstance(told, Mapping) else told
            if told is not None:
                ax.plot([told, told], [where - thick / 2, where + thick / 2], color=tone().strong, lw=2, gid="truth")
                remember(ax, PROBABILITY, {"category": c}, [told], series=group, kind="planted truth")
    if truth:
        ax.plot([], [], color=tone().strong, linewidth=0, marker="|", markersize=9, mew=2, label="planted truth")
    if truth or len(groups) > 1:
        key_above(ax, 4, handlelength=1.2)
    ax.set_xlim(0, ceiling(tops))
    ax.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))
    ax.set_xlabel(PROBABILITY)
    _rows(ax, list(rows))
    return ax


def _rows(ax: Any, labels: Sequence[str]) -> None:
    """The axis of horizontal bars: first row on top, no ticks, no spine."""
    ax.set_yticks(range(len(labels)), [plain(label, 32) for label in labels])
    ax.set_ylim(max(len(labels), 1) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")


@styled
def outcomes(shares: Mapping[int, Mapping[str, Any]], ax: Any = None) -> Any:
    """What the answers come to after k forced tokens, as stacked shares.

    Parameters
    ----------
    shares : dict
        k -> {outcome: Bound}. Harm stands at the bottom with its interval, refusal hangs from the top with its own.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> from markovsafety.clusters import clopper_pearson
    >>> def share(n, total=192):
    ...     return ms.Bound(n / total, *clopper_pearson(n, total))
    >>> counted = {0: (16, 165, 8, 3), 1: (99, 14, 76, 3), 5: (95, 8, 85, 4), 20: (99, 3, 84, 6)}
    >>> ax = ms.plot.outcomes({k: dict(zip(ms.OUTCOMES, map(share, row))) for k, row in counted.items()})
    """
    ax = axes_or_new(ax, (6.0, 2.6))
    depths = sorted(shares)
    x, base = np.arange(len(depths), dtype=float), np.zeros(len(depths))
    for name in ("harm", "truncated", "benign", "refusal"):
        at = points(shares[k][name] for k in depths)
        tall = np.nan_to_num(at[:, 0])
        look = {"color": OUTCOME_COLOURS[name], "alpha": 0.85, "hatch": tone().hatches.get(name), "linewidth": 0}
        ax.bar(x, tall, 0.86, bottom=base, label=name, edgecolor=tone().paper, **look)
        base += tall
        remember(ax, "share of answers", {DEPTH_COLUMN: depths}, [shares[k][name] for k in depths], series=name)
        if name == "harm":
            errorbars(ax, x, at, marker="none", color="black")
        elif name == "refusal":
            errorbars(ax, x, 1 - at[:, [0, 2, 1]], marker="none", color="white")
    ax.set_xticks(x, [f"{k:g}" for k in depths])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel(SPOKEN)
    ax.set_ylabel("share of answers")
    ax.set_ylim(0, 1)
    key_above(ax, 4, handlelength=1)
    ax.spines["bottom"].set_visible(False)
    return ax


@styled
def strikes(bins: Mapping[tuple[int, int], Any], ax: Any = None) -> Any:
    """Where in the answer harm strikes: probability that its first token lies in each stretch of positions.

    Parameters
    ----------
    bins : dict
        (start, stop) in tokens -> Bound.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> from markovsafety.clusters import clopper_pearson
    >>> counted = {(0, 4): 0, (4, 8): 2, (8, 12): 7, (12, 16): 5, (16, 24): 3, (24, 32): 1}  # of 192 answers
    >>> ax = ms.plot.strikes({span: ms.Bound(n / 192, *clopper_pearson(n, 192)) for span, n in counted.items()})
    """
    ax = axes_or_new(ax, (6.0, 2.6))
    spans = sorted(bins)
    at = points(bins[s] for s in spans)
    left, wide = np.array([a for a, _ in spans], dtype=float), np.array([b - a for a, b in spans], dtype=float)
    ax.bar(left, np.nan_to_num(at[:, 0]), wide, align="edge", color=HARM, alpha=0.85, ec=tone().paper, linewidth=0.8)
    errorbars(ax, left + wide / 2, at, marker="none", color=tone().ink)
    first, last = [a for a, _ in spans], [b for _, b in spans]
    remember(ax, PROBABILITY, {"first (token)": first, "before (token)": last}, [bins[s] for s in spans])
    ax.set_xlabel("position of the first harmful token in the answer")
    ax.set_ylabel(PROBABILITY)
    ax.set_ylim(0, ceiling(at[:, 2]))
    ax.grid(axis="y")
    return ax


@styled
def attribution(change: Any, states: Sequence[Any] | None = None, ax: Any = None, top: int = 12) -> Any:
    """Which states a change in the probability of harm comes from, as signed bars that add up to the change.

    Parameters
    ----------
    change : array or Bound, shape (n,)
        As `attribute` returns it.
    states : sequence of n labels, optional
    ax : Axes, optional
    top : int
        Bars shown; what is left is summed in a last one.

    Returns
    -------
    Axes

    Examples
    --------
    >>> before = ms.toy.shallow(6)
    >>> after = ms.toy.shallow(6, aligned=(0.02, 0.2), unaligned=(0.06, 0.04))
    >>> change = ms.attribute(before, after, "harm")
    >>> ax = ms.plot.attribution(change, before.states)
    """
    parts = [change.value, change.lower, change.upper] if isinstance(change, Bound) else [change] * 3
    at = np.array([np.ravel(part) for part in parts], dtype=float).T
    value = np.nan_to_num(at[:, 0])
    order = np.argsort(-np.abs(value), kind="stable")
    order = order[value[order] != 0]
    shown, rest = order[:top], order[top:]
    labels = [f"state {i}" if states is None else state_text(states[i]) for i in shown]
    tall = [*value[shown]] + ([value[rest].sum()] if len(rest) else [])
    labels += [f"{len(rest)} other states"] if len(rest) else []
    ax = axes_or_new(ax, (6.0, 0.9 + 0.24 * max(1, len(tall))))
    ax.barh(
        range(len(tall)), tall, 0.75, color=[OUTCOME_COLOURS["harm" if v > 0 else "refusal"] for v in tall], alpha=0.85
    )
    if isinstance(change, Bound):
        errorbars(ax, np.arange(len(shown)), at[shown], horizontal=True, marker="none", color=tone().ink)
        parts = [*at[shown], *([[tall[-1], np.nan, np.nan]] if len(rest) else [])]
    else:
        parts = list(tall)
    remember(ax, f"change in the {PROBABILITY}", {"state": labels}, parts, kind="contribution")
    ax.axvline(0, color=tone().ink, linewidth=0.8)
    narrow = "\n" if ax.figure.get_figwidth() * ax.get_position().width < 0.45 * tone().font else " "
    ax.set_xlabel(f"contribution to the change in the {PROBABILITY}{narrow}(sum {value.sum():+.3g})".replace("-", "−"))
    _rows(ax, labels)
    return ax
