"""Does incoming fine-tuning data still look as it did when the filter was made? A monitor, batch by batch.

Three things are held against the reference: the law of the cosine (two-sample Kolmogorov-Smirnov), the share that is
dropped, and, where labels say which rows are harmless, the share of those that is dropped (Fisher's exact test). All
batches together raise a false alarm with at most the stated probability: the level is spent, so much per batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered, encode
from ..errors import InputError
from .sifting import Sifted
from .storage import read_tensors, write_tensors

__all__ = ["BatchDrift", "DataMonitor", "fit_data_monitor", "read_data_monitor", "watch_data", "write_data_monitor"]

TESTS = ("cosine", "dropped", "false drops")
LEAST = 20
"""Rows of a reference, below which no drift could be seen."""


@dataclass(frozen=True, eq=False)
class DataMonitor:
    """What the data looked like that the filter was checked on.

    Parameters
    ----------
    scores : float64 array, shape (rows,)
        Cosines of the reference.
    harmless : bool array, shape (rows,)
        Which are labelled harmless; none where nobody said.
    threshold : float
    rate : float
        Largest probability of any false alarm over all batches.
    horizon : int
        Batches that share the first half of it alike; the next so many share a quarter, and so on without end.
    """

    scores: NDArray
    harmless: NDArray
    threshold: float
    rate: float = 0.01
    horizon: int = 100

    def spent(self, batch: int) -> float:
        """Level of the batch with this number, from 0."""
        return self.rate / (self.horizon * 2.0 ** (1 + batch // self.horizon))


@dataclass(frozen=True, eq=False)
class BatchDrift:
    """One batch beside the reference.

    Parameters
    ----------
    batch : int
        Its number, from 0.
    size : int
    mean, spread : float
        Of its cosines.
    dropped : Bound
    false_drops : Bound or None
        Where harmless rows are labelled.
    p : dict of name -> float
        Of each test that could be made: "cosine", "dropped", "false drops".
    level : float
        What the smallest p, times the number of tests, is held against.
    """

    batch: int
    size: int
    mean: float
    spread: float
    dropped: Bound
    false_drops: Bound | None
    p: dict[str, float] = field(default_factory=dict)
    level: float = 0.0

    @property
    def alarms(self) -> list[str]:
        """Tests that raise an alarm."""
        return [name for name, p in self.p.items() if p * len(self.p) <= self.level]

    def __str__(self) -> str:
        said = ", ".join(f"{name} p = {p:.2g}" for name, p in self.p.items())
        state = f"ALARM ({', '.join(self.alarms)})" if self.alarms else "as before"
        return f"batch {self.batch}: {state}; {self.size} rows, mean cosine {self.mean:+.3f}, {said}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("batch", "size", "mean", "spread", "dropped", "false_drops", "p", "level", "alarms")
        return encode({name: getattr(self, name) for name in names})


def fit_data_monitor(reference: Sifted, *, rate: float = 0.01, horizon: int = 100) -> DataMonitor:
    """A monitor of data like this.

    Parameters
    ----------
    reference : Sifted
        Data that the filter was found right on. Where its harmless rows are labelled, false drops are watched too.
    rate : float
        Largest probability of any false alarm, over all batches that will ever come.
    horizon : int
        Number of batches for which the monitor shall be keen: see `DataMonitor`.

    Raises
    ------
    InputError
        Fewer than 20 rows, or a rate or horizon out of range.
    """
    size = len(reference.scores)
    if size < LEAST or not 0 < rate < 1 or isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise InputError(
            f"no monitor is made of {size} rows for a rate of {rate} over {horizon} batches",
            cause=f"it takes {LEAST} rows, a rate between 0 and 1, and a whole number of batches",
            next="give more rows, or correct what is out of range",
        )
    harmless = np.array([p.harmful is False for p in reference.pairs], bool)
    return DataMonitor(reference.scores.copy(), harmless, reference.filter.threshold, rate, horizon)


def watch_data(monitor: DataMonitor, batches: Iterable[Sifted], *, begin: int = 0) -> list[BatchDrift]:
    """Hold batches of incoming data against the reference.

    Parameters
    ----------
    monitor : DataMonitor
    batches : iterable of Sifted
        Each through the same filter, in the order in which they came.
    begin : int
        Batches that were watched before: each batch has a level of its own, which is spent once.

    Returns
    -------
    list of BatchDrift

    Raises
    ------
    InputError
        A batch went through another threshold.

    Notes
    -----
    If a batch is exchangeable with the reference, each of its tests has a level at most what it is held against,
    ties included, and the union over tests and batches is below `rate`, whatever the batches share (they share the
    reference). Rows are taken as exchangeable one by one: repeat a prompt many times in a batch, and it is not. What a
    monitor cannot see: poison whose cosines look like those of clean data.
    """
    out = []
    for number, batch in enumerate(batches, begin):
        if batch.filter.threshold != monitor.threshold:
            raise InputError(
                f"batch {number} was filtered at {batch.filter.threshold:g}, the reference at {monitor.threshold:g}",
                cause="they went through different filters",
                next="filter both by one, or make a new monitor",
            )
        out.append(_compared(monitor, batch, number))
    return out


def _compared(monitor: DataMonitor, batch: Sifted, number: int) -> BatchDrift:
    from scipy.stats import ks_2samp

    ours, theirs = monitor.scores, batch.scores
    compared: Any = ks_2samp(ours, theirs)
    p = {"cosine": float(compared.pvalue)}
    above = monitor.scores > monitor.threshold
    drops = batch.filter.drops(theirs)
    p["dropped"] = _fisher(above, drops)
    harmless = np.array([pair.harmful is False for pair in batch.pairs], bool)
    wrong = None
    if harmless.any():
        wrong = clustered(drops[harmless].astype(float), np.ones(harmless.sum()), batch.level, "harmless dropped")
        if monitor.harmless.any():
            p["false drops"] = _fisher(above[monitor.harmless], drops[harmless])
    share = clustered(drops.astype(float), np.ones(len(drops)), batch.level, "share dropped")
    spread = float(theirs.std())
    return BatchDrift(number, len(theirs), float(theirs.mean()), spread, share, wrong, p, monitor.spent(number))


def _fisher(ours: Sequence[Any] | NDArray, theirs: Sequence[Any] | NDArray) -> float:
    """Fisher's exact test that two shares are the same."""
    from scipy.stats import fisher_exact

    table = [[int(np.sum(side)), int(len(side) - np.sum(side))] for side in (ours, theirs)]
    compared: Any = fisher_exact(table)
    return float(compared.pvalue)


def write_data_monitor(monitor: DataMonitor, path: str | Path) -> None:
    """Write a monitor as one safetensors file."""
    about = {name: getattr(monitor, name) for name in ("threshold", "rate", "horizon")}
    arrays = {"scores": monitor.scores, "harmless": monitor.harmless.astype(np.uint8)}
    write_tensors(path, "data monitor", arrays, about)


def read_data_monitor(path: str | Path) -> DataMonitor:
    """Read what `write_data_monitor` wrote.

    Raises
    ------
    InputError
        The file is missing or holds something else.
    """
    arrays, about = read_tensors(path, "data monitor")
    try:
        return DataMonitor(arrays["scores"], arrays["harmless"].astype(bool), **about)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds only part of a monitor", cause=f"missing or wrong: {error}", next="write it again"
        ) from error
