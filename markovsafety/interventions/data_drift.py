"""Does incoming fine-tuning data still look as it did when the filter was made? A monitor, batch by batch.

Three things are held against the reference: the law of the cosine (two-sample Kolmogorov-Smirnov), the share that is
dropped, and the share of harmless rows that is dropped (Fisher's exact test). The last one takes labels, in the
reference and in the batch: of a batch that nobody has labelled, a monitor cannot tell whether more clean rows are lost
or more poison is found. All batches together raise a false alarm with at most the stated probability: the level is
spent, so much per batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered, encode
from ..errors import InputError
from ..reading import making
from .sifting import Sifted
from .storage import checked, read_tensors, typed, write_tensors

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
    teacher, template : str or None
        Identity of the filter's teacher, and of its chat template: batches must come through the same. None where the
        reference's filter does not say.
    system : str or None
        System message of the prompts.
    watched : int
        Batches that were watched already.

    Examples
    --------
    A hundred batches share half of the rate alike, the next hundred a quarter:

    >>> monitor = ms.interventions.DataMonitor(np.linspace(-0.6, 0.2, 50), np.ones(50, bool), threshold=0.3)
    >>> monitor.after(3)
    <DataMonitor: 50 cosines, 50 labelled harmless, threshold 0.300; rate 0.01, 3 batches
    watched>
    >>> [f"{monitor.spent(batch):.2g}" for batch in (0, 99, 100)]
    ['5e-05', '5e-05', '2.5e-05']
    """

    scores: NDArray
    harmless: NDArray
    threshold: float
    rate: float = 0.01
    horizon: int = 100
    teacher: str | None = None
    template: str | None = None
    system: str | None = None
    watched: int = 0

    def __repr__(self) -> str:
        told = (
            f"{len(self.scores)} cosines, {int(self.harmless.sum())} labelled harmless, threshold {self.threshold:.3f}"
        )
        return f"<DataMonitor: {told}; rate {self.rate:g}, {self.watched} batches watched>"

    def after(self, batches: int) -> DataMonitor:
        """The same monitor when so many more batches were watched: write it, or their level is spent twice."""
        return replace(self, watched=self.watched + batches)

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
        Of each test that could be made: "cosine", "dropped", and, where harmless rows are labelled here and in the
        reference, "false drops".
    level : float
        What the smallest p, times the number of tests, is held against.

    Examples
    --------
    >>> p = {"cosine": 0.2, "dropped": 2e-07}
    >>> drift = ms.interventions.BatchDrift(3, 50, -0.12, 0.3, ms.Bound(0.3, 0.18, 0.45), None, p, level=5e-05)
    >>> drift
    <BatchDrift: batch 3: ALARM (dropped); 50 rows, mean cosine -0.120, cosine p = 0.2,
    dropped p = 2e-07>
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

    def __repr__(self) -> str:
        return f"<BatchDrift: {self}>"

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

    Examples
    --------
    What a filter of harmful prompts makes of the answers that a user wants to teach:

    >>> from markovsafety.interventions import fit_data_monitor, fit_filter, open_host, read_pairs, sift
    >>> from markovsafety.organism.tasks import task_records
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> made = fit_filter(host, ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False))
    >>> clean = sift(host, made, read_pairs(task_records(50), host.engine.tokenizer))
    >>> fit_data_monitor(clean)
    <DataMonitor: 50 cosines, 50 labelled harmless, threshold 0.3...; rate 0.01, 0 batches
    watched>
    """
    size = len(reference.scores)
    if size < LEAST or not 0 < rate < 1 or isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise InputError(
            f"no monitor is made of {size} rows for a rate of {rate} over {horizon} batches",
            cause=f"it takes {LEAST} rows, a rate between 0 and 1, and a whole number of batches",
            next="give more rows, or correct what is out of range",
        )
    harmless = np.array([p.harmful is False for p in reference.pairs], bool)
    made = reference.filter
    about: dict[str, Any] = {"teacher": made.feature.model, "template": made.feature.template, "system": made.system}
    return DataMonitor(reference.scores.copy(), harmless, made.threshold, rate, horizon, **about)


def watch_data(monitor: DataMonitor, batches: Iterable[Sifted], *, begin: int | None = None) -> list[BatchDrift]:
    """Hold batches of incoming data against the reference.

    Parameters
    ----------
    monitor : DataMonitor
    batches : iterable of Sifted
        Each through the same filter, in the order in which they came.
    begin : int, optional
        Batches that were watched before; by default as many as the monitor says. Each batch has a level of its own,
        which is spent once: go on with ``monitor.after(len(found))``.

    Returns
    -------
    list of BatchDrift

    Raises
    ------
    InputError
        A batch went through another filter: its teacher, chat template, system message or threshold differs.

    Notes
    -----
    If a batch is exchangeable with the reference, each of its tests has a level at most what it is held against,
    ties included, and the union over tests and batches is below `rate`, whatever the batches share (they share the
    reference). Rows are taken as exchangeable one by one: repeat a prompt many times in a batch, and it is not. What a
    monitor cannot see: poison whose cosines look like those of clean data.

    Examples
    --------
    A batch like the reference, and one of which a third is poison:

    >>> from markovsafety.interventions import fit_data_monitor, fit_filter, open_host, read_pairs, sift, watch_data
    >>> from markovsafety.organism.tasks import poison_records, task_records
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> made = fit_filter(host, ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False))
    >>> batches = [task_records(60), task_records(60, seed=1), task_records(40, seed=2) + poison_records(20)]
    >>> seen = [sift(host, made, read_pairs(records, host.engine.tokenizer)) for records in batches]
    >>> for drift in watch_data(fit_data_monitor(seen[0]), seen[1:]):
    ...     print(drift)
    batch 0: as before; 60 rows, mean cosine -0.2..., cosine p = 0..., dropped p = 1,
    false drops p = 1
    batch 1: ALARM (dropped); 60 rows, mean cosine +0.1..., cosine p = 0.00..., dropped
    p = ...e-07, false drops p = 1
    """
    out = []
    for number, batch in enumerate(batches, monitor.watched if begin is None else begin):
        _check_filter(monitor, batch, number)
        out.append(_compared(monitor, batch, number))
    return out


def _check_filter(monitor: DataMonitor, batch: Sifted, number: int) -> None:
    made = batch.filter
    here = {"teacher": made.feature.model, "chat template": made.feature.template, "system message": made.system}
    known = {"teacher": monitor.teacher, "chat template": monitor.template, "system message": monitor.system}
    differ = [name for name, told in known.items() if told != here[name] and None not in (told, here[name])]
    differ += ["system message"] if (monitor.system is None) != (made.system is None) else []
    differ += ["threshold"] if made.threshold != monitor.threshold else []
    if differ:
        raise InputError(
            f"batch {number} and the reference went through different filters",
            cause="they differ in " + " and ".join(differ),
            next="filter both by one, or make a new monitor",
        )


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
    """Write a monitor as one safetensors file.

    Examples
    --------
    >>> from markovsafety.interventions import DataMonitor, read_data_monitor, write_data_monitor
    >>> monitor = DataMonitor(np.linspace(-0.6, 0.2, 50), np.ones(50, bool), threshold=0.3)
    >>> write_data_monitor(monitor.after(3), "monitor.safetensors")
    >>> read_data_monitor("monitor.safetensors").watched
    3
    """
    names = ("threshold", "rate", "horizon", "teacher", "template", "system", "watched")
    about = {name: getattr(monitor, name) for name in names}
    arrays = {"scores": monitor.scores, "harmless": monitor.harmless.astype(np.uint8)}
    write_tensors(path, "data monitor", arrays, about)


def read_data_monitor(path: str | Path) -> DataMonitor:
    """Read what `write_data_monitor` wrote.

    Raises
    ------
    InputError
        The file is missing or holds something else.

    Examples
    --------
    >>> from markovsafety.interventions import DataMonitor, read_data_monitor, write_data_monitor
    >>> monitor = DataMonitor(np.linspace(-0.6, 0.2, 50), np.ones(50, bool), threshold=0.3)
    >>> write_data_monitor(monitor, "monitor.safetensors")
    >>> read_data_monitor("monitor.safetensors")
    <DataMonitor: 50 cosines, 50 labelled harmless, threshold 0.300; rate 0.01, 0 batches
    watched>
    """
    arrays, about = read_tensors(path, "data monitor")
    with making(f"{path} holds only part of a monitor", "write it again"):
        rows = len(checked(arrays["scores"], None, name="scores"))
        typed({"watched": 0, **about}, threshold=int | float, rate=int | float, horizon=int, watched=int)
        if not 0 < about["horizon"] < 1 << 31 or not 0 < about["rate"] < 1:
            raise ValueError(f"its rate is {about['rate']}, its horizon {about['horizon']}")
        return DataMonitor(arrays["scores"], checked(arrays["harmless"], rows, name="harmless").astype(bool), **about)
