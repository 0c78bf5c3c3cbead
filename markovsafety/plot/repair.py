"""Repairs: predicted beside sampled tilts, the cosines of a filter, and what safety costs in helpfulness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .columns import ENDS, remember
from .style import (
    OUTCOME_COLOURS,
    PROBABILITY,
    axes_or_new,
    ceiling,
    errorbars,
    halo,
    key_above,
    palette,
    plain,
    points,
    styled,
)
from .themes import tone

__all__ = ["cosines", "tilts", "trade_offs"]

BINS = np.linspace(-1, 1, 41)
MANY = 12  # settings of a group above which only those on the front are drawn boldly
STRENGTH = "strength (share of the bias taken off)"


@styled
def tilts(
    forecast: Any,
    cells: Sequence[Mapping[str, Any]] = (),
    ax: Any = None,
    *,
    groups: Sequence[str] | None = None,
    limit: float | None = None,
) -> Any:
    """An outcome under tilts of growing strength: predicted (ring and pale bar), and sampled (mark), by group.

    Parameters
    ----------
    forecast : Tilted
        Of `markovsafety.interventions.predict_tilt`. Predictions that are not trusted are left out.
    cells : sequence of dict, optional
        Of ``forecast.beside``. The bar of a mark is two standard errors of the difference to its prediction.
    ax : Axes, optional
    groups : sequence of str, optional
        All groups by default.
    limit : float, optional
        Of the outcome, a dashed line.

    Returns
    -------
    Axes

    Raises
    ------
    InputError
        There is no such group.

    Examples
    --------
    >>> rows = [
    ...     {"group": group, "strength": a, "trusted": True, "predicted": ms.Bound(*ends)}
    ...     for group, line in {
    ...         "all": {0.1: (0.086, 0.071, 0.104), 0.25: (0.140, 0.122, 0.161), 0.5: (0.286, 0.256, 0.319)},
    ...         "bio": {0.1: (0.124, 0.081, 0.178), 0.25: (0.188, 0.138, 0.247), 0.5: (0.366, 0.291, 0.446)},
    ...     }.items()
    ...     for a, ends in line.items()
    ... ]
    >>> prompts = np.arange(1), np.array(["bio"]), np.zeros((3, 1, 2))
    >>> forecast = ms.interventions.Tilted("harm", (0.1, 0.25, 0.5), ("all", "bio"), rows, *prompts)
    >>> cells = [{"group": "all", "strength": a, "sampled": p, "error": 0.02} for a, p in ((0.1, 0.06), (0.5, 0.28))]
    >>> ax = ms.plot.tilts(forecast, cells, limit=0.25)
    """
    names = _known(forecast.groups if groups is None else groups, forecast.groups)
    ax = axes_or_new(ax, (8.0, 3.6))
    place = {a: i for i, a in enumerate(sorted(forecast.strengths))}
    shift = 0.1 * (np.arange(len(names)) - (len(names) - 1) / 2) * min(1.0, 6 / max(len(names) - 1, 1))
    tops = [0.0]
    for (name, (colour, marker)), move in zip(palette(names).items(), shift):
        rows = [forecast.at(name, a) for a in place if forecast.at(name, a)["trusted"]]
        at = points(r["predicted"] for r in rows)
        quantity = plain(f"P({forecast.outcome})")
        strengths = {STRENGTH: [r["strength"] for r in rows]}
        remember(ax, quantity, strengths, [r["predicted"] for r in rows], series=name, kind="predicted")
        x = np.array([place[r["strength"]] for r in rows], dtype=float) + move
        errorbars(ax, x, at, color=colour, elinewidth=5, alpha=0.25, marker="none", zorder=1)
        ax.plot(x, at[:, 0], "o", ms=8, mfc="none", mec=colour, mew=1.1, zorder=3, clip_on=False)
        seen = [c for c in cells if c["group"] == name]
        y = np.array([c["sampled"] for c in seen])
        half = 2 * np.array([c["error"] for c in seen])
        there = np.array([place[c["strength"]] for c in seen], dtype=float) + move
        drawn = np.stack([y, np.maximum(y - half, 0), np.minimum(y + half, 1)], axis=1) if seen else np.empty((0, 3))
        remember(ax, quantity, {STRENGTH: [c["strength"] for c in seen]}, drawn, series=name, kind="sampled")
        style = {"color": colour, "marker": marker, "markersize": 4.5, "zorder": 4, "clip_on": False}
        if seen:
            errorbars(ax, there, drawn, label=plain(name, 24), elinewidth=1, **style)
        else:
            ax.plot([], [], "o", mfc="none", mec=colour, label=plain(name, 24))
        tops += [*at[:, 2], *drawn[:, 2]]
    if limit is not None:
        ax.axhline(limit, color=tone().soft, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        remember(ax, plain(f"P({forecast.outcome})"), {}, [limit], kind="limit")
    ax.set_xticks(list(place.values()), [f"{a:g}" for a in place])
    ax.set_xlim(-0.55, len(place) - 0.45)
    ax.set_ylim(0, ceiling(tops, limit))
    ax.set_xlabel("share of the bias taken off")
    ax.set_ylabel(plain(f"P({forecast.outcome})"))
    ax.grid(axis="y")
    key_above(ax, 7, handlelength=1.2)
    return ax


@styled
def cosines(sifted: Any, ax: Any = None) -> Any:
    """Cosines of fine-tuning rows with the refusal feature, stacked by category, and where the filter cuts.

    Parameters
    ----------
    sifted : Sifted
        Of `markovsafety.interventions.sift`.
    ax : Axes, optional

    Returns
    -------
    Axes
        Green: rows labelled harmless; grey: no label; other colours: rows labelled harmful, by category. What lies to
        the right of the dashed line is dropped.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> rng = np.random.default_rng(0)
    >>> kinds = {"task": (False, -0.85, 120), "plain": (True, 0.7, 30), "jailbreak": (True, 0.45, 20)}
    >>> pairs = []
    >>> for name, (harmful, _, n) in kinds.items():
    ...     pairs += [ms.interventions.Pair((1,), (2,), harmful, name)] * n
    >>> scores = np.concatenate([rng.normal(at, 0.08, n) for _, at, n in kinds.values()]).clip(-1, 1)
    >>> sifted = SimpleNamespace(pairs=pairs, scores=scores, filter=SimpleNamespace(threshold=0.1))  # of `sift`
    >>> ax = ms.plot.cosines(sifted)
    """
    ax = axes_or_new(ax, (6.0, 2.8))
    kinds: dict[tuple[int, str], list[float]] = {}
    for pair, score in zip(sifted.pairs, sifted.scores):
        key = {False: 0, None: 1, True: 2}[pair.harmful]
        kinds.setdefault((key, pair.category), []).append(float(score))
    harmful = sorted(name for key, name in kinds if key == 2)
    looks = {name: look[0] for name, look in palette(["", *harmful]).items()}
    below = np.zeros(len(BINS) - 1)
    for key, name in sorted(kinds):
        tall = np.histogram(kinds[key, name], BINS)[0]
        colour = (OUTCOME_COLOURS["benign"], OUTCOME_COLOURS["truncated"], looks.get(name))[key]
        label = plain(name if key == 2 else f"{name}, " + ("harmless", "no label")[key], 32)
        style = {"width": np.diff(BINS), "align": "edge", "color": colour, "edgecolor": tone().paper, "linewidth": 0.4}
        ax.bar(BINS[:-1], tall, bottom=below, label=label, **style)
        below = below + tall
        full = tall > 0
        remember(ax, "rows", {"cosine from": BINS[:-1][full], "cosine to": BINS[1:][full]}, tall[full], series=label)
    ax.axvline(sifted.filter.threshold, color=tone().ink, linewidth=1.2, linestyle=(0, (4, 3)), zorder=4)
    remember(ax, "rows", {"cosine from": [sifted.filter.threshold]}, [None], kind="threshold of the filter")
    told = {"transform": ax.get_xaxis_transform(), "va": "top", "fontsize": tone().small, "path_effects": halo()}
    late = sifted.filter.threshold > 0.6
    ax.text(
        sifted.filter.threshold, 0.98, "dropped → " if late else " dropped →", ha="right" if late else "left", **told
    )
    ax.set_xlim(-1, 1)
    ax.set_ylim(0, 1.15 * max(1.0, float(below.max())))
    ax.set_xlabel("cosine of the prompt with the refusal feature")
    ax.set_ylabel("rows")
    key_above(ax, 4, handlelength=1.0)
    return ax


@styled
def trade_offs(found: Any, ax: Any = None, *, groups: Sequence[str] | None = None) -> Any:
    """Harm against helpfulness, setting by setting, a path for each group; the chosen setting has a ring.

    Of more than twelve settings those on the front (none has less harm and more helpfulness) are drawn boldly and
    joined, the others faintly.

    Parameters
    ----------
    found : TradeOffs
        Of `markovsafety.interventions.trade_offs`.
    ax : Axes, optional
    groups : sequence of str, optional
        All groups by default.

    Returns
    -------
    Axes

    Raises
    ------
    InputError
        There is no such group.

    Examples
    --------
    >>> def near(p, half):
    ...     return ms.Bound(p, max(p - half, 0), min(p + half, 1))
    >>> rng = np.random.default_rng(1)
    >>> rows = []
    >>> for i in range(40):
    ...     harm, front = 0.02 + 0.015 * i, i % 5 == 0
    ...     helpful = 0.95 - 0.5 * np.exp(-6 * harm) - (0 if front else rng.uniform(0.05, 0.3))
    ...     rows.append({"setting": f"{i / 40:g}", "group": "bio", "front": front, "chosen": i == 15})
    ...     rows[-1] |= {"harm": near(harm, 0.03), "helpful": near(helpful, 0.05)}
    >>> found = ms.interventions.TradeOffs(limit=0.25, rate=0.05, level=0.95, table=rows)
    >>> ax = ms.plot.trade_offs(found)
    """
    known = list(dict.fromkeys(r["group"] for r in found.table))
    names = _known(known if groups is None else groups, known)
    ax = axes_or_new(ax, (6.4, 3.8))
    for i, (name, (colour, marker)) in enumerate(palette(names).items()):
        rows = found.rows(name)
        harm, helpful = points(r["harm"] for r in rows), points(r["helpful"] for r in rows)
        x = {"setting": [r["setting"] for r in rows], "chosen": [r["chosen"] for r in rows]}
        x |= {f"{end} (probability of harm)": harm[:, i] for i, end in enumerate(ENDS)}
        remember(ax, "win rate", x, helpful, series=name)
        many = len(rows) > MANY
        bold = np.array([bool(r.get("front")) or not many for r in rows])
        _crosses(ax, harm[~bold], helpful[~bold], colour, marker, faint=True)
        order = np.flatnonzero(bold)
        order = order[np.argsort(harm[order, 0], kind="stable")] if many else order
        ax.plot(harm[order, 0], helpful[order, 0], color=colour, linewidth=1, alpha=0.6, zorder=2)
        _crosses(ax, harm[bold], helpful[bold], colour, marker, label=plain(name, 24))
        labels: dict[tuple[float, float], list[str]] = {}
        for row, clear, x, y in zip(rows, bold, harm[:, 0].tolist(), helpful[:, 0].tolist()):
            if clear:
                labels.setdefault((x, y), []).append(plain(row["setting"], 16))
            if row["chosen"]:
                ax.plot([x], [y], "o", ms=12, mfc="none", mec=colour, mew=1.6, zorder=4, clip_on=False)
        for place, settings in labels.items() if len(names) < 3 or not i else ():
            told = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": tone().small, "color": colour}
            ax.annotate(", ".join(settings), place, path_effects=halo(), zorder=5, **told)
    remember(ax, PROBABILITY, {}, [found.limit], kind="limit")
    ax.axvline(found.limit, color=tone().soft, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    ax.set_xlim(left=0)
    ax.set_xlabel("P(harm) of harmful prompts")
    ax.set_ylabel("helpfulness: win rate")
    ax.grid()
    key_above(ax, 7, handlelength=1.2)
    return ax


def _crosses(
    ax: Any,
    harm: np.ndarray,
    helpful: np.ndarray,
    colour: str,
    marker: str,
    label: str | None = None,
    faint: bool = False,
) -> None:
    """Marks with the intervals of both probabilities; small and pale where they are many and not on the front."""
    bars = {"color": colour, "elinewidth": 0.5 if faint else 0.9, "alpha": 0.12 if faint else 0.4}
    errorbars(ax, harm[:, 0], helpful, marker="none", zorder=1, **bars)
    errorbars(ax, helpful[:, 0], harm, horizontal=True, marker="none", zorder=1, **bars)
    style = {"color": colour, "clip_on": False, "linestyle": "none", "marker": marker}
    style |= {"markersize": 3, "alpha": 0.35, "zorder": 2} if faint else {"markersize": 5, "zorder": 3, "label": label}
    ax.plot(harm[:, 0], helpful[:, 0], **style)


def _known(names: Sequence[str], known: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"There is no group {unknown[0]!r}.",
            cause=f"The groups are {', '.join(known)}.",
            next="Draw some of these.",
        )
    return list(names)
