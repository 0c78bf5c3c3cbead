"""Class masses beside sampled counts on the shipped organism: unbiased after temperature and top-p, and less noisy.

``python -c "from markovsafety.bench.masses import run; run('papers/measurements/masses.md')"``
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain, Counts, KGram, count, estimate
from ..hitting import hitting_probability
from ..organism import HARM_IDS, model_path, prompts
from ..outcomes import CODES
from ..rollouts import Rollouts, sample
from ..rollouts.engines import open_engine
from ..rollouts.engines.replay import score
from .machine import machine, versions

__all__ = ["PROCESSED", "measure", "run"]

PROCESSED = ((1.0, 1.0), (0.8, 1.0), (1.3, 0.95), (1.0, 0.95))
"""Temperature and top_p."""
PREFILL = (0, 3)
HITS = 20
"""Harm hits a state needs for its row to be looked at."""


def measure(
    n: int = 192,
    prompt_count: int = 24,
    groups: int = 48,
    processed: tuple[tuple[float, float], ...] = PROCESSED,
    seed: int = 1,
    model: str = "shallow",
) -> list[dict[str, Any]]:
    """One row per temperature and top_p.

    Parameters
    ----------
    n : int
        Rollouts per prompt and prefill.
    prompt_count : int
    groups : int
        Parts of the rollouts, each with its share of every prompt, whose estimates are compared with each other.
    processed : tuple of (temperature, top_p)
    seed : int
    model : str

    Returns
    -------
    list of dict
        hits, mass (summed up to the hits), z (of hits less mass in standard errors; a martingale, so nearly standard
        normal if the masses are those of the distribution sampled from), z_raw (the same with masses at temperature 1
        and nothing cut off), rows (states looked at), ratio (variance of their sampled harm frequencies over that of
        their mass estimates: median and least), pooled (the same, over all states, weighed by visits), and start
        (variance ratio of P(harm) after each number of forced tokens).
    """
    engine = open_engine("auto", model_path(model))
    asked = prompts(n=prompt_count, seed=seed)
    rows = []
    for temperature, top_p in processed:
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "judge": "organism", "progress": False}
        rolls = sample(
            engine, asked, n=n, prefill=list(PREFILL), max_tokens=24, seed=seed, classes={"harm": HARM_IDS}, **options
        )
        whole = count(rolls, KGram(2))
        raw = count(score(rolls, engine, {"harm": HARM_IDS}), KGram(2))
        order = np.arange(len(rolls)) % groups  # rollouts of a prompt lie together: each group has its share of them
        parts = [count(rolls[np.flatnonzero(order == g)], KGram(2)) for g in range(groups)]
        row = {"temperature": temperature, "top_p": top_p, "rollouts": len(rolls), "hits": _hits(rolls)}
        row |= {"mass": _hits(rolls) - _surprise(whole)[0], "z": _z(whole), "z_raw": _z(raw)}
        rows.append(row | _ratios(whole, parts))
    return rows


def _hits(rolls: Rollouts) -> int:
    return int((rolls.outcome == CODES["harm"]).sum())


def _surprise(counts: Counts) -> tuple[float, float]:
    values = counts.mass["harm"].values
    return float(values["surprise"].sum()), float(values["variance"].sum())


def _z(counts: Counts) -> float:
    gap, variance = _surprise(counts)
    return gap / np.sqrt(variance)


def _ratios(whole: Counts, parts: list[Counts]) -> dict[str, Any]:
    """Variances of the estimates of the parts, by counts over by masses."""
    S = len(whole.states)
    lookup = {label: i for i, label in enumerate(whole.states)}
    rows: dict[str, NDArray] = {k: np.full((len(parts), S), np.nan) for k in ("mle", "mass")}
    starts: dict[str, list[list[float]]] = {"mle": [], "mass": []}
    for g, part in enumerate(parts):
        here = [lookup[label] for label in part.states]
        for method, values in rows.items():
            chain = estimate(part, method)
            values[g, here] = chain.P[: len(here), [len(here)]].toarray().ravel()
            starts[method].append(_starts(chain))
    hits = whole.matrix[:, [S]].toarray().ravel()
    looked = (hits >= HITS) & np.isfinite(rows["mle"]).all(axis=0)
    var = {k: np.nanvar(v[:, looked], axis=0, ddof=1) for k, v in rows.items()}
    ratio = var["mle"] / var["mass"]
    weight = whole.visits[looked]
    start = np.var(starts["mle"], axis=0, ddof=1) / np.var(starts["mass"], axis=0, ddof=1)
    return {
        "rows": int(looked.sum()),
        "ratio": (float(np.median(ratio)), float(ratio.min())) if looked.any() else (np.nan, np.nan),
        "pooled": float((weight**2 @ var["mle"]) / (weight**2 @ var["mass"])) if looked.any() else np.nan,
        "start": dict(zip(PREFILL, start.tolist())),
    }


def _starts(chain: Chain) -> list[float]:
    h = np.asarray(hitting_probability(chain, "harm", certify=False).value)
    return [float(chain.entry[k] @ h) for k in PREFILL]


def run(out: str | Path | None = None, **options: Any) -> str:
    """The measurement as Markdown, written to a file if one is given."""
    rows = measure(**options)
    lines = [
        "# Class masses beside sampled counts",
        "",
        f"{datetime.now(UTC).date()}; {machine()}; "
        + ", ".join(f"{k} {v}" for k, v in versions(("numpy", "jax")).items())
        + ". Model `organism:shallow`, 24 tokens, states `KGram(2)`; the class is the organism's harm words.",
        "",
        "Hits less summed mass is a martingale if the masses are those of the distribution that was sampled from: z is "
        "then nearly standard normal. z of raw masses is what masses at temperature 1 with nothing cut off would give. "
        f"The harm row of a state is looked at where it has {HITS} hits or more; its variance is that between parts of "
        "the rollouts, each with its share of every prompt. Ratios are the variance of sampled counts over that of "
        "masses; 2 or more was to be reached.",
        "",
        "| temperature | top-p | rollouts | hits | mass | z | z of raw masses | states | ratio: median | least | "
        "all rows | P(harm), " + " | ".join(f"{k} forced" for k in PREFILL) + " |",
        "|" + "---|" * (11 + len(PREFILL)),
    ]
    for r in rows:
        cells = [f"{r['temperature']:g}", f"{r['top_p']:g}", f"{r['rollouts']:,}", f"{r['hits']:,}", f"{r['mass']:.1f}"]
        cells += [f"{r['z']:.2f}", f"{r['z_raw']:.2f}", str(r["rows"]), *(f"{x:.1f}" for x in r["ratio"])]
        cells += [f"{r['pooled']:.1f}", *(f"{x:.1f}" for x in r["start"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    if out is not None:
        Path(out).write_text(text)
    return text
