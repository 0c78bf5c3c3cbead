"""Class masses beside sampled counts on the shipped organism: unbiased after temperature and top-p, and less noisy.

Several seeds, because a variance ratio is itself an estimate; and counts made on the device (`tally`) beside counts of
rollouts: what leaves the device, and how long it takes.

``markovsafety bench masses --out papers/measurements/masses.md``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain, Counts, KGram, count, estimate
from ..hitting import hitting_probability
from ..organism import HARM_IDS, model_path, prompts
from ..outcomes import CODES
from ..rollouts import Rollouts, Sums, sample, tally
from ..rollouts.engines import open_engine
from ..rollouts.engines.replay import score
from .machine import machine, versions

__all__ = ["PROCESSED", "SEEDS", "devices", "measure", "run"]

PROCESSED = ((1.0, 1.0), (0.8, 1.0), (1.3, 0.95), (1.0, 0.95))
"""Temperature and top_p."""
PREFILL = (0, 3)
SEEDS = (1, 2, 3, 4, 5)
"""Of prompts and tokens."""
GOAL = 2.0
"""The variance ratio to be reached."""
HITS = 20
"""Harm hits a state needs for its row to be looked at."""


def measure(
    n: int = 96,
    prompt_count: int = 24,
    groups: int = 48,
    processed: tuple[tuple[float, float], ...] = PROCESSED,
    seed: int = 1,
    model: str = "shallow",
    raw: bool = True,
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
    raw : bool
        Whether to score the answers once more for ``z_raw``, which takes longer than to sample them.

    Returns
    -------
    list of dict
        hits, mass (summed up to the hits), gap (hits less mass) and its variance, z (the gap in standard errors; a
        martingale, so nearly standard normal if the masses are those of the distribution sampled from), z_raw (the same
        with masses at temperature 1 and nothing cut off; None if not asked for), rows (states looked at), ratio
        (variance of their sampled harm frequencies over that of their mass estimates: median and least), pooled (the
        same, over all states, weighed by visits), and start (variance ratio of P(harm) after each number of forced
        tokens).
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
        scored = count(score(rolls, engine, {"harm": HARM_IDS}), KGram(2)) if raw else None
        order = np.arange(len(rolls)) % groups  # rollouts of a prompt lie together: each group has its share of them
        parts = [count(rolls[np.flatnonzero(order == g)], KGram(2)) for g in range(groups)]
        row = {"temperature": temperature, "top_p": top_p, "rollouts": len(rolls), "hits": _hits(rolls)}
        gap, variance = _surprise(whole)
        row |= {"mass": row["hits"] - gap, "gap": gap, "variance": variance, "z": gap / np.sqrt(variance)}
        row["z_raw"] = None if scored is None else _z(scored)
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


class _Counted:
    """An engine that remembers what its runs fetched from the device."""

    def __init__(self, engine: Any):
        self.engine, self.fetched = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, job: Any, progress: Any = None) -> Any:
        output = self.engine.run(job, progress)
        self.fetched += output.info["fetched_bytes"]
        return output


def devices(
    sizes: Sequence[int] = (24, 96, 384), prompt_count: int = 24, model: str = "shallow", repeat: int = 3
) -> list[dict[str, Any]]:
    """Counts made on the device beside counts of rollouts, from the same random numbers.

    Parameters
    ----------
    sizes : sequence of int
        Rollouts per prompt and prefill.
    prompt_count : int
    model : str
    repeat : int
        Times that each road is gone; the quickest counts, without compilation.

    Returns
    -------
    list of dict
        rollouts, tokens, bytes that left the device and seconds of both roads, `equal` (bit by bit) and `close` (up to
        the rounding of sums).
    """
    engine = _Counted(open_engine("auto", model_path(model)))
    asked, rows = prompts(n=prompt_count, seed=1), []
    for n in sizes:
        options: dict[str, Any] = {"n": n, "prefill": list(PREFILL), "max_tokens": 24, "seed": 1, "judge": "organism"}
        options |= {"classes": {"harm": HARM_IDS}, "progress": False}

        def rollouts(o: dict[str, Any] = options) -> tuple[Rollouts, Counts]:
            return (rolls := sample(engine, asked, **o)), count(rolls, KGram(2))

        def added(o: dict[str, Any] = options) -> tuple[Sums, Counts]:
            return (sums := tally(engine, asked, KGram(2), **o)), count(sums)

        engine.fetched = 0
        (_, want), (sums, got) = rollouts(), added()  # the first time compiles
        fetched = engine.fetched, sums.info["fetched_bytes"]
        seconds = [min(times) for times in zip(*((_seconds(rollouts), _seconds(added)) for _ in range(repeat)))]
        row = {"rollouts": len(sums), "tokens": sums.info["sampled_tokens"], "bytes": fetched, "seconds": seconds}
        rows.append(row | {"equal": got.equals(want), "close": got.equals(want, 1e-12)})
    return rows


def _seconds(road: Callable[[], Any]) -> float:
    start = time.perf_counter()
    road()
    return time.perf_counter() - start


def _over_seeds(rows: list[dict[str, Any]]) -> list[str]:
    """One line of the table: one temperature and top_p at all seeds."""

    def spread(values: Sequence[float]) -> str:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} ({np.min(values):.1f} to {np.max(values):.1f})"

    first = rows[0]
    z = sum(r["gap"] for r in rows) / np.sqrt(sum(r["variance"] for r in rows))
    worst = max(abs(r["z"]) for r in rows)
    cells = [f"{first['temperature']:g}", f"{first['top_p']:g}", f"{sum(r['rollouts'] for r in rows):,}"]
    cells += [f"{sum(r['hits'] for r in rows):,}", f"{sum(r['mass'] for r in rows):.1f}", f"{z:.2f}", f"{worst:.2f}"]
    cells += [f"{first['z_raw']:.2f}", f"{min(r['rows'] for r in rows)} to {max(r['rows'] for r in rows)}"]
    cells += [spread([r["ratio"][0] for r in rows]), f"{min(r['ratio'][1] for r in rows):.1f}"]
    cells += [spread([r["pooled"] for r in rows])]
    return cells + [spread([r["start"][k] for r in rows]) for k in PREFILL]


def run(out: str | Path | None = None, seeds: Sequence[int] = SEEDS, **options: Any) -> str:
    """The measurement as Markdown, written to a file if one is given.

    Parameters
    ----------
    out : path, optional
    seeds : sequence of int
        At least two.
    **options
        Of `measure`.
    """
    every = [measure(seed=seed, raw=i == 0, **options) for i, seed in enumerate(seeds)]
    pooled = np.array([[r["pooled"] for r in rows] for rows in every])
    lines = [
        "# Class masses beside sampled counts",
        "",
        f"{datetime.now(UTC).date()}; {machine()}; "
        + ", ".join(f"{k} {v}" for k, v in versions(("numpy", "jax")).items())
        + ". Model `organism:shallow`, 24 tokens, states `KGram(2)`; the class is the organism's harm words.",
        "",
        f"**The harm row from masses has {pooled.mean():.1f} times less variance than from sampled counts** (all rows "
        f"together, mean of {pooled.size} measurements: {len(seeds)} seeds, {pooled.shape[1]} ways to sample; standard "
        f"deviation {pooled.std(ddof=1):.1f}, least {pooled.min():.1f}). {GOAL:g} or more was to be reached: "
        f"{(pooled >= GOAL).sum()} of {pooled.size} do.",
        "",
        "Hits less summed mass is a martingale if the masses are those of the distribution that was sampled from: z is "
        "then nearly standard normal, over all seeds together and at the worst of them. z of raw masses (first seed) "
        "is what masses at temperature 1 with nothing cut off would give. The harm row of a state is looked at where "
        f"it has {HITS} hits or more; its variance is that between parts of the rollouts, each with its share of every "
        "prompt. Ratios are the variance of sampled counts over that of masses: mean ± standard deviation over seeds, "
        "and the range. Prompts differ between seeds.",
        "",
        "| temperature | top-p | rollouts | hits | mass | z | worst z | z of raw masses | states | ratio: median | "
        "least | all rows | P(harm), " + " | ".join(f"{k} forced" for k in PREFILL) + " |",
        "|" + "---|" * (12 + len(PREFILL)),
    ]
    lines += ["| " + " | ".join(_over_seeds(list(rows))) + " |" for rows in zip(*every)]
    lines += _devices_page(devices())
    text = "\n".join(lines) + "\n"
    if out is not None:
        Path(out).write_text(text)
    return text


def _devices_page(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Counts that are made on the device",
        "",
        "`count(tally(model, prompts, KGram(2), ...))` beside `count(sample(model, prompts, ...), KGram(2))`, the same "
        "seed, temperature 1. Both roads sample with the same programs. With `sample`, ids, log-probabilities and "
        "masses of every token leave the device; with `tally`, one byte a row for every few tokens (has it ended?), "
        "and at the end the sums of each prompt, prefill and state. Seconds are the least of three taken in turns, "
        "without compilation; on a processor the device is the host itself, so they say what adding up costs, not what "
        "the bytes save.",
        "",
        "| rollouts | tokens | bytes: rollouts | bytes: sums | ratio | seconds: rollouts | seconds: sums | equal |",
        "|" + "---|" * 8,
    ]
    for r in rows:
        (a, b), (s, t) = r["bytes"], r["seconds"]
        same = "every bit" if r["equal"] else "up to rounding" if r["close"] else "no"
        cells = [
            f"{r['rollouts']:,}",
            f"{r['tokens']:,}",
            f"{a:,}",
            f"{b:,}",
            f"{a / b:.1f}",
            f"{s:.2f}",
            f"{t:.2f}",
            same,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
