"""What a figure shows, as columns: every function of this room notes on the Axes the numbers that it draws there."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..bound import Bound
from ..errors import InputError

__all__ = ["data", "write_csv"]

NOTES = "_markovsafety_notes"
ENDS = ("value", "lower", "upper")


def remember(
    ax: Any, quantity: str, x: Mapping[str, Any], values: Any, *, series: str = "", kind: str = "measured"
) -> None:
    """Note what was drawn, a row for each value.

    Parameters
    ----------
    ax : Axes
    quantity : str
        What the values are, with their unit where they have one.
    x : dict of str to sequence of length n, or to one thing for all rows
        Where they stand; the unit in brackets behind the name.
    values : array of shape (n, 3), or sequence of n bounds or numbers
        Value, lower and upper; a number has no interval.
    series : str
        Name of the line, the group or the bar.
    kind : str
        "measured", "planted truth", "predicted", ...
    """
    rows = list(values) if not isinstance(values, np.ndarray) else values
    at = [_parts(v) for v in rows]
    columns = {"series": series, "kind": kind, **x}
    columns |= {f"{end} ({quantity})": [row[i] for row in at] for i, end in enumerate(ENDS)}
    # The patch of an Axes is made anew by ax.clear(): what was wiped off is forgotten with it.
    notes = ax.patch.__dict__.setdefault(NOTES, [])
    for i in range(len(at)):
        notes.append({name: _cell(c if isinstance(c, str) or np.ndim(c) == 0 else c[i]) for name, c in columns.items()})


def _parts(value: Any) -> tuple[Any, Any, Any]:
    if isinstance(value, Bound):
        return value.value, value.lower, value.upper
    if np.ndim(value) == 1:
        return value[0], value[1], value[2]
    return value, None, None


def _cell(thing: Any) -> Any:
    """A number, a text, or None where there is nothing."""
    if isinstance(thing, np.generic):
        thing = thing.item()
    if thing is None or isinstance(thing, bool | int | str):
        return thing
    if isinstance(thing, float):
        return None if np.isnan(thing) else thing
    return str(thing)


def data(ax: Any) -> dict[str, list[Any]]:
    """What a figure of this package shows, as columns of one length: a row for each mark, with both interval ends.

    Parameters
    ----------
    ax : Axes, array of Axes (of `panels`), Figure, or Flow

    Returns
    -------
    dict of str to list
        ``series`` (line, group or bar), ``kind`` (measured, predicted, planted truth, budget, ...), where the mark
        stands (``depth (forced tokens)``, ...), and ``value (...)``, ``lower (...)``, ``upper (...)`` with what is
        shown in brackets. None where there is nothing, such as the interval of a planted truth. Of several Axes the
        first column, ``panel``, is the title. A table of any kind takes it: ``pandas.DataFrame(data(ax))``,
        ``pyarrow.table(data(ax))``.

    Raises
    ------
    InputError
        None of this package's functions drew there.

    Examples
    --------
    >>> ax = ms.plot.depth({0: 0.01, 5: ms.Bound(0.5, 0.4, 0.6)}, budget=0.1)
    >>> ms.plot.data(ax)["depth (forced tokens)"]
    [0.0, 5.0, None]
    >>> ms.plot.data(ax)["upper (probability of harm)"]
    [None, 0.6, None]
    """
    own: Any = getattr(ax, "columns", None)
    if callable(own):
        return cast(Any, own())
    several = _axes(ax)
    notes = [(one, one.patch.__dict__.get(NOTES, [])) for one in several]
    rows = [({"panel": _title(one)} if len(several) > 1 else {}) | row for one, found in notes for row in found]
    if not rows:
        raise InputError(
            "The figure holds no data of this package.",
            cause="Only what the functions of plot draw is noted, until the Axes are cleared.",
            next="Pass the Axes that such a function returned.",
        )
    # Numbers stand last, whichever Axes brought them.
    names = sorted(dict.fromkeys(name for row in rows for name in row), key=_rank)
    return {name: [row.get(name) for row in rows] for name in names}


def _axes(ax: Any) -> list[Any]:
    """The Axes in question that show something; those of colour bars have nothing to say."""
    if hasattr(ax, "patch") and hasattr(ax, "get_title"):
        return [ax]
    every = ax.axes if hasattr(ax, "axes") else np.asarray(ax, dtype=object).ravel()
    return [one for one in every if getattr(one, "patch", None) is not None and NOTES in one.patch.__dict__]


def _title(ax: Any) -> str:
    return ax.get_title(loc="left") or ax.get_title()


def _rank(name: str) -> int:
    end = name.split(" (")[0]
    return {"panel": 0, "series": 1, "kind": 2}.get(name, 4 if end in ENDS else 3)


def write_csv(ax: Any, path: str | Path) -> str:
    """Write what a figure shows as a CSV file (UTF-8, a header, empty where there is nothing), whole or not at all.

    Parameters
    ----------
    ax : Axes, array of Axes, or Figure
        As for `data`.
    path : path
        Its folder is made.

    Returns
    -------
    str
        The path.

    Raises
    ------
    InputError
        As `data`, or the file cannot be written.

    Notes
    -----
    Numbers have all their digits. A text that a spreadsheet would take for a formula (it begins with = + - @) gets an
    apostrophe in front (OWASP, CSV Injection).

    Examples
    --------
    >>> ax = ms.plot.traces({"plain": [1.0, 0.5], "deep": [1.0, 0.25]}, log=False, label="harm")
    >>> from pathlib import Path
    >>> print(Path(ms.plot.write_csv(ax, "traces.csv")).read_text())
    series,kind,step,value (harm),lower (harm),upper (harm)
    plain,trace,0.0,1.0,,
    plain,trace,1.0,0.5,,
    deep,trace,0.0,1.0,,
    deep,trace,1.0,0.25,,
    <BLANKLINE>
    """
    from ..files import atomic, inert

    columns = data(ax)
    with atomic(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([list(columns), *zip(*(map(inert, c) for c in columns.values()))])
    return str(path)
