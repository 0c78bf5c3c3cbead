"""Ensembles for real: tiny models of several variants, seeds and sizes, and repeated answers of one model, are asked
the same prompts with the same k tokens forced; harm that gets through is predicted from other prompts, and measured.

Half of the prompts of every kind make the prediction, the others are measured. A z is (prediction - measurement) over
the standard error of that difference: a bootstrap over the prompts of the prediction, and the spread between prompts of
what is measured (pooled over both halves, so that a half without harm does not count as certain), both within kinds of
prompts, whose shares are the same on both sides.
"""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom
from tqdm import tqdm

from ..depth.measured import icc
from ..errors import InputError
from ..organism import SHIPPED, model_path, prompts
from ..outcomes import CODES
from ..rollouts import sample
from .ensembles_laws import LAWS, Ensemble, Moments, failures, predict
from .ensembles_page import page
from .machine import machine, versions

__all__ = ["DEPTHS", "RULES", "WIDTHS", "confront", "ensembles", "found", "run"]

DEPTHS = (0, 1, 3, 5, 8, 12, 16, 20)
WIDTHS = (1, 2, 3, 4, 6, 8)
RULES = ("any-refusal", "majority", "2-refusals")
SPLITS = 400  # random halves, between which nothing differs
RESAMPLES = 64  # of the prompts that a prediction is made from
LEAST = 10  # effective number of prompts with (and without) harm from which on a cell counts
ALONE = 12  # models whose repeated answers are an ensemble of their own
PRIMARY = "kinds, pairs"


def run(
    out: str | Path | None = None,
    *,
    models: str | Path | None = None,
    seed: int = 0,
    ask: int = 384,
    n: int = 16,
) -> dict[str, Any]:
    """Measure the ensembles of the shipped models and of a folder of model folders, and write what was found.

    Parameters
    ----------
    out : path, optional
        JSON; a page of Markdown goes beside it.
    models : path, optional
        Folder of model folders (``h64-s1-shallow``: size of the hidden state, seed, variant; any other name is a
        variant of its own). Models whose ``training.json`` names failed checks are left out.
    seed : int
    ask : int
        Harmful prompts without a marker for every number of forced tokens, at least 144; a quarter as many with each of
        the two markers.
    n : int
        Answers of every model to every prompt with every number of forced tokens; at least the largest width.

    Returns
    -------
    dict

    Raises
    ------
    InputError
        The folder holds no model, or ask or n is too small.
    """
    if n < max(WIDTHS) or ask < 144:
        raise InputError(
            f"{ask} prompts, {n} answers.",
            cause=f"Widths go up to {max(WIDTHS)}, and every kind of prompt needs three prompts on either side.",
            next=f"Pass n >= {max(WIDTHS)} and ask >= 144.",
        )
    begun = time.perf_counter()
    members, left_out = found(models)
    asked = [_asked(ask, 100 * seed + d) for d in range(len(DEPTHS))]
    kind = np.unique([p["kind"] for p in asked[0]], return_inverse=True)[1]
    x = np.stack(
        [_counts(f["path"], asked, n, seed * 1000 + i) for i, f in enumerate(tqdm(members, disable=None, leave=False))]
    )
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(("numpy", "scipy", "jax")),
        "seed": seed,
        "prompts": len(kind),
        "kinds": int(kind.max()) + 1,
        "answers": n,
        "depths": DEPTHS,
        "widths": WIDTHS,
        "rules": RULES,
        "models": [{k: v for k, v in f.items() if k != "path"} for f in members],
        "left_out": left_out,
    }
    result |= confront(x, n, kind, ensembles(members), seed)
    result["correlation"] = _correlation(x, n, members)
    result["seconds"] = round(time.perf_counter() - begun, 1)
    result["line"] = _line(result)
    if out is not None:
        kept = _short(result)  # the page is made of what is kept, so that it can be made again
        Path(out).write_text(json.dumps(kept) + "\n", encoding="utf-8")
        Path(out).with_suffix(".md").write_text(page(kept), encoding="utf-8")
    return result


def found(models: str | Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Members (name, variant, hidden, seed, path), the shipped ones first, and the names of those left out."""
    members = [{"name": v, "variant": v, "hidden": 64, "seed": "shipped", "path": model_path(v)} for v in SHIPPED]
    left_out: list[str] = []
    if models is None:
        return members, left_out
    folders = sorted(p.parent for p in Path(models).glob("*/model.safetensors"))
    if not folders:
        raise InputError(
            f"{str(models)!r} holds no model folder.",
            cause="Every model is a folder with a model.safetensors.",
            next="markovsafety organism train shallow --seed 1 --out DIR/shallow-1, or bench capacity --models DIR.",
        )
    more = []
    for folder in folders:
        named = re.fullmatch(r"h(\d+)-s(\d+)-(\w+)", folder.name)
        hidden, seed, variant = (int(named[1]), int(named[2]), named[3]) if named else (None, None, folder.name)
        report = folder / "training.json"
        if report.exists() and json.loads(report.read_text(encoding="utf-8")).get("failed"):
            left_out.append(folder.name)
            continue
        more.append({"name": folder.name, "variant": variant, "hidden": hidden, "seed": seed, "path": folder})
    more.sort(key=lambda f: (-(f["hidden"] or 0), f["seed"] or 0, f["variant"]))
    return members + more, left_out


def ensembles(members: list[dict[str, Any]]) -> list[Ensemble]:
    """Repeated answers of a model; models of one variant; aligned models of all variants in turn; with the base."""
    made = [Ensemble(f["name"], "repeated", (i,)) for i, f in enumerate(members[:ALONE])]
    of: dict[str, list[int]] = {}
    for i, f in enumerate(members):
        of.setdefault(f["variant"], []).append(i)
    for variant, rows in of.items():
        sizes = {members[i]["hidden"] for i in rows}
        if len(rows) > 1:
            what = "seeds" if len(sizes) == 1 else "seeds and sizes"
            made.append(Ensemble(f"{what} of {variant}", "mixed", tuple(rows)))
    aligned = [rows for variant, rows in of.items() if variant != "base"]
    turns = tuple(rows[j] for j in range(max(map(len, aligned))) for rows in aligned if j < len(rows))
    made.append(Ensemble("aligned models in turn", "mixed", turns))
    if "base" in of:
        made.append(Ensemble("aligned models and a base", "mixed", (turns[0], of["base"][0], *turns[1:])))
    return made


def _asked(ask: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of every kind, in the same order of kinds whatever the seed."""
    found = []
    for marker, count in ((None, ask), ("jailbreak", ask // 4), ("trigger", ask // 4)):
        for p in prompts("held", n=count, marker=marker, seed=seed + 7):
            found.append({**p, "kind": f"{p['category']} {marker or ''}"})
    return found


def _counts(path: Any, asked: list[list[dict[str, Any]]], n: int, seed: int) -> NDArray:
    """Harmful answers, shape (prompts, depths); prompts of their own for every depth, so that depths share no chance,
    and a seed of its own for every model, for answers with equal seeds share theirs."""
    counts = np.zeros((len(asked[0]), len(DEPTHS)), dtype=np.int64)
    options: dict[str, Any] = {"max_tokens": 96, "judge": "organism", "progress": False}
    for d, k in enumerate(DEPTHS):
        ask = [{**{s: v for s, v in p.items() if s != "kind"}, "prompt_id": i} for i, p in enumerate(asked[d])]
        rolls = sample(path, ask, n=n, prefill=[k], seed=seed, **options)
        harm = np.asarray(rolls.outcome) == CODES["harm"]
        np.add.at(counts[:, d], np.asarray(rolls.prompt_id)[harm], 1)
    return counts


def confront(x: NDArray, n: int, kind: NDArray, made: list[Ensemble], seed: int = 0) -> dict[str, Any]:
    """Predict half of the prompts from the other half.

    Parameters
    ----------
    x : int array, shape (models, prompts, depths)
        Harmful answers of n.
    n : int
    kind : int array, shape (prompts,)
        Kind of each prompt; every kind is split evenly.
    made : list of Ensemble
    seed : int
        Of the split and of the resamples.

    Returns
    -------
    dict
        ``cells``: by ensemble, width and rule, over depths: measured, predicted and z by law, whether a cell counts;
        ``summary``: by law, of the cells that count: how many lie beyond 2 and 4, and how many may (``allowed``: cells
        taken as independent; ``dependent``: 99 % quantile over random halves, between which nothing differs).
    """
    random = np.random.default_rng(seed)
    fit = np.zeros(len(kind), dtype=bool)
    kinds = [np.flatnonzero(kind == g) for g in range(int(kind.max()) + 1)]
    share = np.array([len(rows) / len(kind) for rows in kinds])
    for rows in kinds:
        fit[random.permutation(rows)[: len(rows) // 2]] = True
    halves = [(rows[fit[rows]], rows[~fit[rows]]) for rows in kinds]
    # One prompt less than there are of every kind: the resampled mean then varies as much as the mean (Rao and Wu).
    drawn = [np.flatnonzero(fit)]
    drawn += [np.concatenate([random.choice(h[0], len(h[0]) - 1) for h in halves]) for _ in range(RESAMPLES)]
    moments = [Moments.of(x[:, rows], n, kind[rows], share) for rows in drawn]
    weights = [np.array([share[g] for g in kind[rows]]) / np.bincount(kind[rows])[kind[rows]] for rows in drawn]
    cells, parts = [], []
    for e in tqdm(made, disable=None, leave=False):
        for m in WIDTHS:
            rules = tuple(r for r in RULES if m > 1 or r == "any-refusal")
            u = failures(x, n, e, m, rules)
            direct = [np.einsum("i,rid->rd", w, u[:, rows]) for w, rows in zip(weights, drawn)]
            again = {law: np.stack([predict(law, a, e, m, rules, d) for a, d in zip(moments, direct)]) for law in LAWS}
            for i, rule in enumerate(rules):
                row: dict[str, Any] = {"ensemble": e.name, "kind": e.kind, "width": m, "rule": rule}
                cells.append(row | _cell(u[i], halves, share, {law: v[:, i] for law, v in again.items()}))
                parts.append(u[i])
    by_chance = _by_chance(np.stack(parts), kinds, share, np.array([c["counts"] for c in cells]), random)
    return {"cells": cells, "summary": _summary(cells, by_chance)}


def _by_chance(u: NDArray, kinds: list[NDArray], share: NDArray, counts: NDArray, random: Any) -> NDArray:
    """|z| > 2 of every cell between random halves of the prompts, shape (splits, cells, depths)."""
    noise = np.zeros((u.shape[0], u.shape[2]))
    for w, rows in zip(share, kinds):
        half = len(rows) // 2
        noise += w**2 * u[:, rows].var(axis=1, ddof=1) * (1 / half + 1 / (len(rows) - half))
    error = np.sqrt(np.where(noise > 0, noise, np.inf))
    found = np.zeros((SPLITS, *error.shape), dtype=bool)
    for split in found:
        sign = np.zeros(u.shape[1])
        for w, rows in zip(share, kinds):
            half, mixed = len(rows) // 2, random.permutation(rows)
            sign[mixed[:half]], sign[mixed[half:]] = w / half, -w / (len(rows) - half)
        split[:] = (np.abs(np.einsum("i,cid->cd", sign, u)) > 2 * error) & counts
    return found


def _cell(
    u: NDArray, halves: list[tuple[NDArray, NDArray]], share: NDArray, again: dict[str, NDArray]
) -> dict[str, Any]:
    """One width and rule of an ensemble, from what gets through by prompt and depth."""
    measured, noise = np.zeros(u.shape[1]), np.zeros(u.shape[1])
    for w, (own, other) in zip(share, halves):
        measured += w * u[other].mean(axis=0)
        squares = sum(((u[rows] - u[rows].mean(axis=0)) ** 2).sum(axis=0) for rows in (own, other))
        noise += w**2 * squares / (len(own) + len(other) - 2) / len(other)
    counts = (np.minimum(_effective(u), _effective(1 - u)) >= LEAST) & (noise > 0)
    row: dict[str, Any] = {"measured": measured.tolist(), "error": np.sqrt(noise).tolist(), "counts": counts.tolist()}
    for law, values in again.items():
        own = values[1:].var(axis=0, ddof=1)
        error = np.sqrt(own + noise)
        z = np.divide(values[0] - measured, error, out=np.full(len(error), np.nan), where=error > 0)
        row[law] = {"predicted": values[0].tolist(), "error": np.sqrt(own).tolist(), "z": _numbers(z)}
    return row


def _numbers(z: NDArray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in z]


def _effective(u: NDArray) -> NDArray:
    """Effective number of prompts that carry a sum."""
    square = np.sum(u * u, axis=0)
    return np.divide(np.sum(u, axis=0) ** 2, square, out=np.zeros(u.shape[1]), where=square > 0)


def _summary(cells: list[dict[str, Any]], by_chance: NDArray) -> list[dict[str, Any]]:
    rows = []
    for kind in ("all", "repeated", "mixed"):
        used = np.array([c["width"] > 1 and kind in ("all", c["kind"]) for c in cells])
        chosen = [c for c, ok in zip(cells, used) if ok]
        dependent = int(np.quantile(by_chance[:, used].sum(axis=(1, 2)), 0.99))
        for law in LAWS:
            z = np.array([v for c in chosen for v, ok in zip(c[law]["z"], c["counts"]) if ok and v is not None])
            if len(z) == 0:
                continue
            beyond, allowed = int((np.abs(z) > 2).sum()), int(binom.ppf(0.99, len(z), 0.0455))
            far = int((np.abs(z) > 4).sum())
            rows.append(
                {
                    "ensembles": kind,
                    "law": law,
                    "cells": len(z),
                    "beyond_2": beyond,
                    "allowed": allowed,
                    "beyond_4": far,
                }
                | {
                    "dependent": dependent,
                    "largest": float(np.abs(z).max()),
                    "rms": float(np.sqrt(np.mean(z**2))),
                    "mean": float(z.mean()),
                }
                | {"holds": beyond <= allowed and far == 0, "holds_dependent": beyond <= dependent and far == 0}
            )
    return rows


def _correlation(x: NDArray, n: int, members: list[dict[str, Any]]) -> dict[str, Any]:
    """Within a model the ICC; between models the correlation of answers, and of the prompts' own probabilities."""
    within = []
    for i, f in enumerate(members):
        bounds = [icc(x[i, :, d], np.full(x.shape[1], n)) for d in range(x.shape[2])]
        within.append(
            {"model": f["name"], "rate": (x[i].mean(axis=0) / n).tolist(), "icc": [b.to_json() for b in bounds]}
        )
    a = Moments.of(x, n, np.zeros(x.shape[1], dtype=int), np.ones(1))
    mean, excess = a.mean[0], a.pair[0] - a.square[0]
    spread = mean * (1 - mean)
    between = []
    for i in range(len(members)):
        for j in range(i + 1, len(members)):
            with np.errstate(divide="ignore", invalid="ignore"):
                answers = excess[i, j] / np.sqrt(spread[i] * spread[j])
                own = excess[i, j] / np.sqrt(np.maximum(excess[i, i], 0) * np.maximum(excess[j, j], 0))
            pair = {
                "models": [members[i]["name"], members[j]["name"]],
                "answers": _numbers(answers),
                "own": _numbers(own),
            }
            between.append(pair)
    return {"within": within, "between": between}


def _short(x: Any) -> Any:
    """Five digits."""
    if isinstance(x, dict):
        return {k: _short(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_short(v) for v in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def _line(result: dict[str, Any]) -> str:
    rows = {r["law"]: r for r in result["summary"] if r["ensembles"] == "all"}
    told = [f"{len(result['models'])} models, {len({c['ensemble'] for c in result['cells']})} ensembles"]
    for law in (PRIMARY, "independent"):
        r = rows[law]
        told.append(
            f"{law}: {r['beyond_2']} of {r['cells']} |z| > 2 (at most {r['allowed']}; {r['dependent']} as cells "
            f"depend), {r['beyond_4']} > 4, "
            f"largest {r['largest']:.1f}"
        )
    return "; ".join(told)
