"""Grid: harm over depth, width and further axes, and what it says about a harm budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, encode
from ..errors import InputError
from ..evidence.cells import forced
from ..rich import shown
from .pareto import Pareto, pareto
from .profile import budget, check_side, within

__all__ = ["Grid", "Needed"]

SHOWN = 40  # rows that are printed, and lines of what is needed
MOST = 12  # rows that a notebook shows
WIDE = 12  # columns, in either
IN_LINE = 8  # parts of what is needed in one line


@dataclass(frozen=True, eq=False, repr=False)
class Needed:
    """What keeps harm within a budget.

    Parameters
    ----------
    eps : float
        The budget.
    side : str
        Which end of the interval of harm has to stay within it; "upper" is the safe one.
    kind : {"forced", "trained"}
        What depth counts: forced tokens that are withstood (larger is safer), or trained depth (larger costs more).
    depth : object array, shape of the axes other than depth
        forced: operational safety depth, the largest swept k with harm within the budget at all swept j <= k; None if
        the first exceeds it. trained: smallest swept depth that suffices; None if none does.
    at_least : bool array, same shape
        True where no swept depth was seen to exceed the budget, so that the operational depth is a lower bound: harm
        stayed within it everywhere, or the next depth was not measured.
    width : object array, shape of the axes other than width
        Smallest swept width that suffices; None if none does.
    possible : bool
        Whether any cell of the grid stays within the budget (forced: any operational depth exists).
    reason : str
        Why entries are None; empty if none is.
    dims, coords
        Axes of the grid.
    capacity : object array, shape of the axes other than capacity, optional
        First swept capacity that suffices; None if none does. None altogether without that axis.

    Examples
    --------
    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> needed = ms.sweep(profile, depth=range(33), width=[1, 2, 4]).needed(harm=1e-3)
    >>> needed
    <Needed harm within 0.001 (by the upper end): width 1 is impossible here, width 2 is
        impossible here, width 4 needs trained depth 5; none: harm in the grid exceeds
        0.001 there; no depth suffices where the floor is 0.00104 or more>
    >>> needed.depth
    array([None, None, 5], dtype=object)
    """

    eps: float
    side: str
    kind: str
    depth: NDArray
    at_least: NDArray
    width: NDArray
    possible: bool
    reason: str
    dims: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    capacity: NDArray | None = None

    def __str__(self) -> str:
        lines = [f"harm within {self.eps:g} (by the {self.side} end):"]
        for at, names in self._cells(", "):
            lines.append(f"  {names}: {self._depth(at) or 'withstands nothing, not even the smallest depth'}")
        return "\n".join([*_few(lines), *([f"  {self.reason}"] if self.reason else [])])

    def __repr__(self) -> str:
        return f"<Needed {self.line()}>"

    def line(self) -> str:
        """The same in one line."""
        parts = []
        for at, names in self._cells(" at "):
            parts.append(f"{names} {self._depth(at, 'is impossible here') or 'withstands nothing'}")
            if len(parts) > IN_LINE:
                break
        text = f"harm within {self.eps:g} (by the {self.side} end): {', '.join(_few(parts, IN_LINE))}"
        return f"{text}; {self.reason}" if self.reason else text

    def _cells(self, between: str) -> Iterator[tuple[tuple[int, ...], str]]:
        others = [name for name in self.dims if name != "depth"]
        for at in np.ndindex(*self.depth.shape):
            yield at, between.join(f"{name} {self.coords[name][i]}" for name, i in zip(others, at))

    def _depth(self, at: tuple[int, ...], impossible: str = "impossible here") -> str:
        """One entry in words; empty where nothing is withstood."""
        depth, least = self.depth[at], "at least " if self.at_least[at] else ""
        if self.kind == "trained":
            return impossible if depth is None else f"needs trained depth {depth}"
        if "attack" not in self.dims:
            return "" if depth is None else f"withstands {least}{forced([depth])}"
        if len(self.coords["depth"]) == 1:
            return "does not withstand it" if depth is None else "withstands it"
        return "" if depth is None else f"withstands it, cut at {least}{forced([depth])}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `depth`, `width` and, where there is that axis, `capacity` as nested lists with null for None."""
        names = ["eps", "side", "kind", "depth", "at_least", "width", "possible", "reason"]
        names += [] if self.capacity is None else ["capacity"]
        return {name: encode(getattr(self, name)) for name in names}


def _few(lines: list[str], most: int = SHOWN) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], "..."]


@dataclass(frozen=True, eq=False, repr=False)
class Grid:
    """Harm over depth, width and, where asked, capacity, correlation and attack.

    Parameters
    ----------
    harm : Bound
        Shape of `dims`; nan in [0, 1] where a model was not trained, or a depth not measured.
    dims : tuple of str
        ("depth", "width"), then those of "capacity", "correlation", "attack" that were asked for.
    coords : dict of str to tuple
        Values along each axis, rising (correlation and attack: as given; an attack by its name).
    info : dict
        source; kind ("forced" or "trained": what depth counts); depth_why (chains: where the depths come from); start
        and start_why: the state law at each depth and why that one; estimate: how the numbers of each width were made;
        icc: correlation of two answers by depth where the source has one; floor (trained only): harm at unlimited
        depth, a Bound over the other axes; rule; model, unless it is the beta-binomial; absent: which cells are nan
        and why; note: what the intervals leave out. With capacities, what belongs to each is by its name.

    Examples
    --------
    Two answers correlate by 0 or by 0.3, which is an axis of the grid beside depth and width:

    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> grid = ms.sweep(profile, depth=[0, 10, 20], width=[1, 4], correlation=[0, 0.3])
    >>> grid
    <Grid P(harm) by depth 3, width 2, correlation 2: 1.15e-06 to 0.8, proven>
    >>> print(grid.at(correlation=0.3))
    P(harm) by depth and width   proven   the prompt, nothing forced
      depth  width 1  width 4
          0      0.8     0.56
         10    0.051   0.0049
         20   0.0327  0.00292
    rule: any-refusal
    """

    harm: Bound
    dims: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def absent(self) -> NDArray:
        """Cells that were not trained or not measured, of the shape of `dims`."""
        return np.isnan(np.asarray(self.harm.value))

    def at(self, **where: Any) -> Grid:
        """The part of the grid at given coordinates, one for each axis that is named.

        Parameters
        ----------
        **where
            E.g. ``correlation=0.3, attack="geometric(0.1)"``; depth and width stay axes of length one.

        Returns
        -------
        Grid
        """
        pick: list[Any] = [slice(None)] * len(self.dims)
        for name, value in where.items():
            if name not in self.dims or value not in self.coords[name]:
                known = f"{name} has {', '.join(map(str, self.coords[name]))}" if name in self.dims else ""
                raise InputError(
                    f"The grid has no {name} {value!r}.",
                    cause=known or f"Its axes are {', '.join(self.dims)}.",
                    next="Pick a coordinate that was swept.",
                )
            i = self.coords[name].index(value)
            pick[self.dims.index(name)] = slice(i, i + 1) if name in ("depth", "width") else i
        gone = [name for name in where if name not in ("depth", "width")]
        coords = {n: (where[n],) if n in where else c for n, c in self.coords.items() if n not in gone}
        info = dict(self.info)
        if "floor" in info:
            info["floor"] = info["floor"][tuple(pick[1:])] if info["floor"].shape else info["floor"]
        if "absent" in info:
            info["absent"] = [gap for gap in info["absent"] if all(gap.get(n, v) == v for n, v in where.items())]
        return Grid(self.harm[tuple(pick)], tuple(n for n in self.dims if n not in gone), coords, info)

    def needed(self, harm: float, side: str = "upper") -> Needed:
        """Which depth, width and capacity keep harm within a budget.

        Parameters
        ----------
        harm : float
            The budget.
        side : {"upper", "value", "lower"}
            Which end of the interval has to stay within it.

        Returns
        -------
        Needed
        """
        eps = budget(harm)
        check_side(side)
        trained = self.info.get("kind") == "trained"
        ends = np.asarray(getattr(self.harm, side), dtype=np.float64)
        good = within(ends, eps) & ~self.absent
        if trained:
            depth, at_least = _first(self.coords["depth"], good, 0), np.zeros(ends.shape[1:], dtype=bool)
        else:
            depth, at_least = self._withstood(good)
        width = _first(self.coords["width"], good, 1)
        capacity = None
        if "capacity" in self.dims:
            capacity = _first(self.coords["capacity"], good, self.dims.index("capacity"))
        empty = ~(good.any(axis=0) if trained else good[0])
        reason = self._reason(ends, eps, side, empty) if empty.any() else ""
        kind = "trained" if trained else "forced"
        possible = not empty.all()
        return Needed(eps, side, kind, depth, at_least, width, possible, reason, self.dims, self.coords, capacity)

    def _withstood(self, good: NDArray) -> tuple[NDArray, NDArray]:
        """Largest depth before the first that exceeds the budget, and whether none was seen to."""
        bad = ~good
        first = np.where(bad.any(axis=0), bad.argmax(axis=0), len(bad))
        depth = _pick(self.coords["depth"], first - 1)
        stop = np.minimum(first, len(bad) - 1)[None]
        unseen = np.take_along_axis(self.absent, stop, axis=0)[0]
        return depth, (first == len(bad)) | ((first > 0) & unseen)

    def pareto(self, cost: Mapping[str, float] | Callable[..., Any], **options: Any) -> Pareto:
        """The cheapest cells within a budget, and what less harm costs; see `markovsafety.depth.pareto`."""
        return pareto(self, cost=cost, **options)

    def _reason(self, ends: NDArray, eps: float, side: str, empty: NDArray) -> str:
        """Why some, or all, entries of the depths are None."""
        trained, absent = self.info.get("kind") == "trained", self.absent
        tried = np.where(absent, np.nan, ends) if trained else np.where(absent, np.nan, ends)[:1]
        least = float(np.nanmin(tried)) if np.isfinite(tried).any() else float("nan")
        end = "value" if side == "value" else f"{side} end"
        where = "in the grid" if trained else f"at {forced([self.coords['depth'][0]])}"
        lost = empty & (absent.all(axis=0) if trained else absent[0])
        if lost.all():
            text = "impossible in this grid: nothing was trained or measured there"
        elif not (empty & ~lost).any():
            text = "not trained or not measured there"
        elif not empty.all():
            text = f"none: harm {where} exceeds {eps:g} there"
        else:
            text = f"impossible in this grid: the smallest harm {where} ({end}) is {least:.3g}, the budget is {eps:.3g}"
        if lost.any() and (empty & ~lost).any():
            text += "; not trained or not measured elsewhere"
        value = np.asarray(self.harm.value if trained else self.harm.value[0])
        if side == "upper" and empty.all() and np.any(within(value, eps)):
            text += "; the estimate itself is within it, the evidence is too little"
        if trained and "floor" in self.info:
            floor = np.asarray(getattr(self.info["floor"], side)).reshape(empty.shape)
            deeper = floor[empty] < eps
            if not deeper.all():
                text += f"; no depth suffices where the floor is {floor[empty][~deeper].min():.3g} or more"
            if deeper.any():
                text += f"; a depth beyond {self.coords['depth'][-1]} would suffice" + (
                    "" if deeper.all() else " elsewhere"
                )
        return text

    def __str__(self) -> str:
        lines = [f"P(harm) by depth and width   {self._level()}   {self.info.get('start', '')}".rstrip()]
        extra = [name for name in self.dims if name not in ("depth", "width")]
        shape = tuple(len(self.coords[name]) for name in extra)
        for tables, at in enumerate(np.ndindex(*shape)):
            if tables == SHOWN // max(len(self.coords["depth"]), 1) + 4:
                lines.append(f"... {int(np.prod(shape)) - tables} more tables")
                break
            lines += [", ".join(f"{name} {self.coords[name][i]}" for name, i in zip(extra, at))] if extra else []
            lines += self._table(at)
        for name in ("rule", "note"):
            if self.info.get(name):
                lines.append(f"{name}: {self.info[name]}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(self.coords[name])}" for name in self.dims)
        found = np.asarray(self.harm.value)[~self.absent]
        ends = f"{found.min():.3g} to {found.max():.3g}, {self._level()}" if found.size else "nothing measured"
        return f"<Grid P(harm) by {sizes}: {ends}>"

    def _level(self) -> str:
        return "proven" if self.harm.level == 1 else f"{100 * self.harm.level:g} %"

    def _repr_html_(self) -> str:
        """What a notebook shows: harm by depth and width, darker where it is likelier; of further axes the first."""
        extra = [name for name in self.dims if name not in ("depth", "width")]
        at = (0,) * len(extra)
        (_, head), *rows = self._lines(at, MOST)
        wide = min(len(self.coords["width"]), WIDE)
        value = np.asarray(self.harm.value)[(slice(None), slice(None), *at)][:, :wide]
        shades = [[np.nan] * (len(head) - 1) if i is None else [*value[i], np.nan] for i, _ in rows]
        what = "trained depth" if self.info.get("kind") == "trained" else "forced tokens"
        where = ", ".join(f"{name} {self.coords[name][0]}" for name in extra)
        others = int(np.prod([len(self.coords[name]) for name in extra])) - 1
        words = [str(self.info.get(name, "")) for name in ("start", "rule", "note")]
        notes = [f"{where} (and {others:,} more tables)" if others else where, *words]
        title = f"P(harm) by {what} and width, {self._level()}"
        return shown(title, [row for _, row in rows], head=head, notes=notes, shades=shades)

    def _table(self, at: tuple[int, ...]) -> list[str]:
        rows = [row for _, row in self._lines(at, SHOWN)]
        sizes = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        return ["  " + "  ".join(text.rjust(size) for text, size in zip(row, sizes)) for row in rows]

    def _lines(self, at: tuple[int, ...], most: int) -> list[tuple[int | None, list[str]]]:
        """A head and the cells of the first and last depths, `most` at most, each with its place along the axis."""
        depths, widths = self.coords["depth"], self.coords["width"]
        wide, more = range(min(len(widths), WIDE)), ["..."] if len(widths) > WIDE else []
        places = [*range(len(depths))]
        if len(depths) > most:
            places = [*range(most // 2), *range(len(depths) - most // 2, len(depths))]
        rows: list[tuple[int | None, list[str]]] = [(None, ["depth", *(f"width {widths[j]}" for j in wide), *more])]
        last = -1
        for i in places:
            if i != last + 1:
                rows.append((None, ["...", *[""] * len(wide), *[""] * len(more)]))
            rows.append((i, [str(depths[i]), *(self._cell((i, j, *at)) for j in wide), *more]))
            last = i
        return rows

    def _cell(self, at: tuple[int, ...]) -> str:
        value, lower, upper = (float(np.asarray(getattr(self.harm, s))[at]) for s in ("value", "lower", "upper"))
        if np.isnan(value):
            return self._why(at).split(":")[0]
        return f"{value:.3g}" if upper - lower <= 1e-12 * abs(value) else f"{value:.3g} [{lower:.3g}, {upper:.3g}]"

    def _why(self, at: tuple[int, ...]) -> str:
        """Why a cell is absent."""
        here = {name: self.coords[name][i] for name, i in zip(self.dims, at)}
        for gap in self.info.get("absent", []):
            if all(here.get(name) == value for name, value in gap.items() if name != "why"):
                return gap["why"]
        return "not measured"

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """A head and a row for every cell: coordinates, value, lower and upper; and why, where cells are absent."""
        gaps = bool(self.info.get("absent"))
        yield (*self.dims, "value", "lower", "upper", *(["why"] if gaps else []))
        ends = [np.asarray(getattr(self.harm, s)) for s in ("value", "lower", "upper")]
        for at in np.ndindex(*self.harm.shape):
            value, lower, upper = (float(x[at]) for x in ends)
            where = (self.coords[name][i] for name, i in zip(self.dims, at))
            why = [self._why(at) if np.isnan(value) else ""] if gaps else []
            yield (*where, "" if np.isnan(value) else value, lower, upper, *why)

    def to_json(self) -> dict[str, Any]:
        """Plain data: dims, coords, harm, info."""
        return {name: encode(getattr(self, name)) for name in ("dims", "coords", "harm", "info")}


def _first(coords: tuple[Any, ...], good: NDArray, axis: int) -> NDArray:
    """The first coordinate along an axis that is good; None if none is."""
    return _pick(coords, np.where(good.any(axis=axis), good.argmax(axis=axis), -1))


def _pick(coords: tuple[Any, ...], at: NDArray) -> NDArray:
    """Coordinates by index; None for -1."""
    table = np.empty(len(coords) + 1, dtype=object)
    table[:-1] = coords
    return np.asarray(table[at], dtype=object).reshape(np.shape(at))
