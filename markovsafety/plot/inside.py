"""Inside a model: beliefs, where they are encoded, guards, monitors, and predictions beside samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from .columns import remember
from .style import (
    OUTCOME_COLOURS,
    PROBABILITY,
    axes_or_new,
    errorbars,
    key_above,
    palette,
    plain,
    points,
    styled,
    whole_ticks,
)
from .themes import tone

__all__ = ["beliefs", "compared", "detected", "predicted", "roc", "separated"]

LOOKS = {
    "refused_harmful": ("refusal", "o", True),
    "accepted_harmful": ("harm", "^", True),
    "refused_harmless": ("refusal", "o", False),
    "accepted_harmless": ("harm", "^", False),
}
"""Colour by what the model does, filled where the prompt is harmful."""


@styled
def beliefs(found: Any, buckets: Any, ax: Any = None, *, threshold: float = 0.0) -> Any:
    """Every prompt by what the model believes of it (to the right: harmful) and is about to do (up: refuse).

    Parameters
    ----------
    found : Beliefs
        Of `markovsafety.interventions.believe`.
    buckets : Buckets
        Of the same prompts.
    ax : Axes, optional
    threshold : float
        Of the guard, a dashed line.

    Returns
    -------
    Axes

    Raises
    ------
    InputError
        Beliefs of other prompts.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> harmful, refuses = np.repeat([1, 1, 0, 0], 24), np.tile(np.repeat([1, 0], 24), 2)
    >>> believed = rng.normal(0.4 * harmful - 0.2, 0.08)
    >>> about = rng.normal(0.5 * refuses - 0.25, 0.1)
    >>> prompts = tuple(f"prompt {i}" for i in range(96))
    >>> nothing = np.zeros((96, 1))
    >>> found = ms.interventions.Beliefs(prompts, believed, about, nothing, nothing)
    >>> buckets = ms.interventions.Buckets(prompts, harmful, refuses.astype(float))
    >>> ax = ms.plot.beliefs(found, buckets)
    """
    if len(found.harm) != len(buckets.prompts):
        raise InputError(
            f"{len(found.harm)} beliefs stand beside {len(buckets.prompts)} prompts.",
            cause="Each prompt has one.",
            next="Pass believe(host, centres, buckets.prompts).",
        )
    ax = axes_or_new(ax, (5.4, 4.2))
    for name, (outcome, marker, filled) in LOOKS.items():
        at = buckets.rows(name)
        colour = OUTCOME_COLOURS[outcome]
        style = {"markersize": 5.5, "markeredgewidth": 1.2, "markeredgecolor": colour, "alpha": 0.85}
        label = f"{name.replace('_', ' ')} ({len(at)})"
        face = colour if filled else "none"
        x = {"prompt": at, "belief of harm (Δ harm)": found.harm[at]}
        remember(ax, "about to refuse, Δ refuse", x, found.refusal[at], series=name)
        ax.plot(found.harm[at], found.refusal[at], marker, label=label, markerfacecolor=face, **style)
    ax.axvline(threshold, color=tone().soft, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.axhline(0, color=tone().soft, linewidth=0.8, zorder=1)
    ax.set_xlabel(r"believed harmful  $\Delta_{\mathrm{harm}}$ →")
    ax.set_ylabel(r"about to refuse  $\Delta_{\mathrm{refuse}}$ →")
    key_above(ax, 2, handlelength=1.2)
    return ax


@styled
def separated(found: Any, ax: Any = None) -> Any:
    """Where harmfulness is encoded and where refusal, by level: AUC of the prompts in which the two disagree.

    Parameters
    ----------
    found : Separation or its rows
        Of `markovsafety.interventions.separate`.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> rows = [
    ...     {"position": "t_inst", "level": 1, "mismatch": ms.Bound(0.97, 0.89, 1.0)},
    ...     {"position": "t_inst", "level": 2, "mismatch": ms.Bound(1.0, 0.94, 1.0)},
    ...     {"position": "t_inst", "level": 3, "mismatch": ms.Bound(0.69, 0.49, 0.85)},
    ...     {"position": "t_inst", "level": 4, "mismatch": ms.Bound(0.72, 0.54, 0.87)},
    ... ]
    >>> rows += [{"position": "t_post", "level": k, "mismatch": ms.Bound(0.0, 0.0, 0.11)} for k in (1, 2, 3, 4)]
    >>> ax = ms.plot.separated(rows)
    """
    rows = list(getattr(found, "rows", found))
    ax = axes_or_new(ax, (5.4, 3.4))
    names = {"t_inst": "at the instruction's end", "t_post": "at the prompt's end"}
    looks = dict(zip(names, ((tone().models[5], "s"), (tone().models[2], "o"))))
    for (position, name), move in zip(names.items(), (-0.06, 0.06)):
        mine = [r for r in rows if r["position"] == position]
        level = np.array([r["level"] for r in mine], dtype=float) + move
        colour, marker = looks[position]
        at = points(r["mismatch"] for r in mine)
        remember(ax, "mismatch AUC", {"level": [r["level"] for r in mine]}, [r["mismatch"] for r in mine], series=name)
        ax.plot(level, at[:, 0], color=colour, linewidth=1.2, alpha=0.6, zorder=2)
        errorbars(ax, level, at, color=colour, marker=marker, markersize=5.5, label=name, zorder=3, clip_on=False)
    ax.axhline(0.5, color=tone().soft, linewidth=0.8, zorder=1)
    ax.set_ylim(-0.02, 1.02)
    ax.set_yticks([0, 0.5, 1], ["refusal 0", "0.5", "harmfulness 1"])
    whole_ticks(ax)
    ax.set_xlabel("level of the residual stream")
    ax.set_ylabel("mismatch AUC: what is encoded")
    key_above(ax, 2, handlelength=1.2)
    return ax


@styled
def roc(categories: Any, ax: Any = None, *, threshold: float | None = None) -> Any:
    """Receiver operating characteristic of a guard, a curve for each category of harmful prompts.

    Parameters
    ----------
    categories : Assessed, or dict of category -> {"auc": Bound, "curve": dict of arrays}
        Of `markovsafety.interventions.assess`.
    ax : Axes, optional
    threshold : float, optional
        Marked on every curve; that of `Assessed` if not given.

    Returns
    -------
    Axes

    Examples
    --------
    >>> from markovsafety.interventions import auc, curve
    >>> rng = np.random.default_rng(0)
    >>> harmless = rng.normal(0, 1, 60)
    >>> scores = {"bio": rng.normal(3, 1, 40), "fraud": rng.normal(1.5, 1, 40), "privacy": rng.normal(0.8, 1, 40)}
    >>> guard = {name: {"auc": auc(s, harmless), "curve": curve(s, harmless)} for name, s in scores.items()}
    >>> ax = ms.plot.roc(guard, threshold=1.2)
    """
    if not isinstance(categories, Mapping):
        threshold = categories.threshold if threshold is None else threshold
        categories = categories.categories
    ax = axes_or_new(ax, (4.6, 4.2))
    ax.plot([0, 1], [0, 1], color=tone().soft, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for i, (name, (colour, marker)) in enumerate(palette(list(categories)).items()):
        told, b = categories[name]["curve"], categories[name]["auc"]
        order = np.argsort(told["threshold"])[::-1]
        fpr, tpr = told["fpr"][order], told["tpr"][order]
        x = {"threshold": told["threshold"][order], "harmless prompts blocked (share)": fpr}
        remember(ax, "harmful prompts blocked, share", x, tpr, series=name, kind="curve")
        remember(ax, "AUC", {}, [b], series=name, kind="AUC")
        # Curves of equal shares lie on each other: a hair's breadth apart they can be counted.
        shift = 0.005 * (i - (len(categories) - 1) / 2)
        label = f"{plain(name, 24)}: {b.value:.2f} [{b.lower:.2f}, {b.upper:.2f}]"
        style = {"color": colour, "linewidth": 1.5, "clip_on": False, "zorder": 2}
        ax.plot(fpr + shift, tpr - shift, drawstyle="steps-post", label=label, **style)
        if threshold is not None:
            here = int(np.argmax(told["threshold"][order] <= threshold))
            style = {"color": colour, "markersize": 6, "mec": tone().paper, "mew": 0.8, "clip_on": False, "zorder": 4}
            ax.plot(fpr[here] + shift, tpr[here] - shift, marker, **style)
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.set_aspect("equal")
    ax.set_xlabel("harmless prompts blocked")
    ax.set_ylabel("harmful prompts blocked")
    key = ax.legend(loc="lower right", title="AUC" + ("" if threshold is None else ", mark: the threshold"))
    key.get_title().set_fontsize(tone().small)
    return ax


@styled
def predicted(
    forecast: Mapping[str, Any], sampled: Mapping[str, Any], ax: Any = None, *, label: str = PROBABILITY
) -> Any:
    """What was predicted beside what was sampled: a cross of both intervals for each name, on the diagonal if equal.

    Parameters
    ----------
    forecast, sampled : dict of name -> Bound or number
        The same names, such as edits of several scales.
    ax : Axes, optional
    label : str
        Of what.

    Returns
    -------
    Axes

    Raises
    ------
    InputError
        The names differ.

    Examples
    --------
    >>> forecast = {
    ...     "scale −0.5": ms.Bound(0.351, 0.294, 0.431),
    ...     "scale 0.25": ms.Bound(0.173, 0.134, 0.220),
    ...     "scale 1": ms.Bound(0.044, 0.029, 0.066),
    ... }
    >>> sampled = {
    ...     "scale −0.5": ms.Bound(0.370, 0.313, 0.429),
    ...     "scale 0.25": ms.Bound(0.151, 0.109, 0.201),
    ...     "scale 1": ms.Bound(0.050, 0.031, 0.076),
    ... }
    >>> ax = ms.plot.predicted(forecast, sampled)
    """
    if set(forecast) != set(sampled):
        raise InputError(
            f"{len(forecast)} predictions stand beside {len(sampled)} samples, of other names.",
            cause="Each prediction is held against the sample of its name.",
            next="Pass two dicts with the same names.",
        )
    ax = axes_or_new(ax, (4.6, 4.2))
    x, y = points(forecast.values()), points(sampled[name] for name in forecast)
    top = min(1.0, 1.06 * float(np.nanmax([x[:, 2], y[:, 2]], initial=0.02)))
    ax.plot([0, 1], [0, 1], color=tone().soft, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for i, (name, (colour, marker)) in enumerate(palette(list(forecast)).items()):
        style = {"color": colour, "elinewidth": 1.2, "zorder": 3}
        errorbars(ax, x[[i], 0], y[[i]], marker=marker, markersize=6, label=plain(name, 32), **style)
        errorbars(ax, y[[i], 0], x[[i]], horizontal=True, marker="none", **style)
        remember(ax, label, {}, [forecast[name]], series=name, kind="predicted")
        remember(ax, label, {}, [sampled[name]], series=name, kind="sampled")
    ax.set_xlim(-0.01 * top, top)
    ax.set_ylim(-0.01 * top, top)
    ax.set_aspect("equal")
    ax.set_xlabel(f"{label}, predicted")
    ax.set_ylabel(f"{label}, sampled")
    ax.grid()
    ax.legend(loc="upper left")
    return ax


@styled
def compared(
    rows: Mapping[str, Mapping[str, Any]], ax: Any = None, *, label: str = "probability", budget: float | None = None
) -> Any:
    """Probabilities of several things side by side: a row each, a mark with its interval for each situation.

    Parameters
    ----------
    rows : dict of row -> {situation: Bound or number}
        A situation that is the name of an outcome has its colour.
    ax : Axes, optional
    label : str
        Of what.
    budget : float, optional
        A dashed line.

    Returns
    -------
    Axes

    Examples
    --------
    >>> rates = {
    ...     "no edit": {"harm": ms.Bound(0.06, 0.02, 0.14), "refusal": ms.Bound(0.88, 0.80, 0.94)},
    ...     "one head": {"harm": ms.Bound(0.42, 0.33, 0.51), "refusal": ms.Bound(0.25, 0.17, 0.35)},
    ...     "random vector": {"harm": ms.Bound(0.05, 0.01, 0.14), "refusal": ms.Bound(0.91, 0.82, 0.96)},
    ...     "whole layer": {"harm": ms.Bound(0.42, 0.34, 0.51), "refusal": ms.Bound(0.21, 0.14, 0.30)},
    ... }
    >>> ax = ms.plot.compared(rates, budget=0.1)
    """
    names = list(rows)
    series = list(dict.fromkeys(s for row in rows.values() for s in row))
    ax = axes_or_new(ax, (7.0, 0.9 + 0.36 * max(1, len(names))))
    looks = palette(series)
    looks |= {s: (OUTCOME_COLOURS[s], looks[s][1]) for s in series if s in OUTCOME_COLOURS}
    shift = np.linspace(-0.2, 0.2, len(series)) if len(series) > 1 else np.zeros(1)
    for s, move in zip(series, shift):
        there = [i for i, name in enumerate(names) if s in rows[name]]
        at = points(rows[names[i]][s] for i in there)
        remember(ax, label, {"row": [names[i] for i in there]}, [rows[names[i]][s] for i in there], series=s)
        style = {"color": looks[s][0], "marker": looks[s][1], "markersize": 6, "label": plain(s, 32), "clip_on": False}
        errorbars(ax, np.array(there, dtype=float) + move, at, horizontal=True, zorder=3, **style)
    for i in range(0, len(names), 2):
        ax.axhspan(i - 0.5, i + 0.5, color=tone().stripe, linewidth=0, zorder=0)
    if budget is not None:
        ax.axvline(budget, color=tone().ink, linewidth=1, linestyle="--")
        remember(ax, label, {}, [budget], kind="budget")
    ax.set_yticks(range(len(names)), [plain(name, 48) for name in names])
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(-0.01, 1.01)
    ax.set_xlabel(plain(label))
    ax.grid(axis="x")
    if series:
        key_above(ax, 4, handlelength=1.2)
    return ax


@styled
def detected(found: Any, ax: Any = None) -> Any:
    """How well a monitor sees an edit of growing size.

    Parameters
    ----------
    found : Detection
        Of `markovsafety.interventions.detection`.
    ax : Axes, optional

    Returns
    -------
    Axes

    Examples
    --------
    >>> def bounds(*ends):
    ...     return tuple(ms.Bound(*three) for three in ends)
    >>> sure = (1.0, 0.98, 1.0)
    >>> found = ms.interventions.Detection(
    ...     scales=(0.02, 0.05, 0.1, 0.2),
    ...     auc=bounds((0.55, 0.49, 0.61), (0.81, 0.77, 0.85), (0.98, 0.95, 0.99), sure),
    ...     caught=bounds((0.02, 0.01, 0.05), (0.05, 0.03, 0.09), (0.51, 0.43, 0.58), sure),
    ...     control=bounds((0.14, 0.09, 0.2), sure, sure, sure),
    ...     false_alarms=ms.Bound(0.026, 0.009, 0.06),
    ...     visible=0.1,
    ... )
    >>> ax = ms.plot.detected(found)
    """
    ax = axes_or_new(ax, (5.4, 3.4))
    x = np.asarray(found.scales, dtype=float)
    lines = {
        "caught": (found.caught, tone().models[1], "o"),
        "caught, random vectors": (found.control, tone().soft, "s"),
    }
    lines = {"AUC, edited over clean": (found.auc, tone().ink, "D"), **lines}
    for name, (bounds, colour, marker) in lines.items():
        at = points(bounds)
        quantity = "AUC" if name.startswith("AUC") else "share of edits caught"
        remember(ax, quantity, {"size of the edit": x}, [*bounds], series=name)
        ax.plot(x, at[:, 0], color=colour, linewidth=1, alpha=0.5, zorder=2)
        errorbars(ax, x, at, color=colour, marker=marker, markersize=5, label=name, zorder=3, clip_on=False)
    false = found.false_alarms
    remember(ax, "share of edits caught", {}, [false], series="false alarms")
    ax.axhspan(false.lower, false.upper, color=OUTCOME_COLOURS["benign"], alpha=0.18, linewidth=0)
    ax.axhline(false.value, color=OUTCOME_COLOURS["benign"], linewidth=1.2, label="false alarms")
    if (x > 0).all():
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{s:g}" for s in x])
        ax.minorticks_off()
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("size of the edit")
    ax.grid(axis="y")
    key_above(ax, 2, handlelength=1.4)
    return ax
