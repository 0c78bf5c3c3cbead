"""Grid: harm over depth and width, and what it says about a harm budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, encode
from ..evidence.cells import forced
from .profile import budget, check_side, operational_depth, within

__all__ = ["Grid", "Needed"]


@dataclass(frozen=True, eq=False)
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
        True where harm stayed within the budget at every swept depth, so that the operational depth is a lower bound.
    width : object array, shape of the axes other than width
        Smallest swept width that suffices; None if none does.
    possible : bool
        Whether any cell of the grid stays within the budget (forced: any operational depth exists).
    reason : str
        Why entries are None; empty if none is.
    dims, coords
        Axes of the grid.
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

    def __str__(self) -> str:
        lines = [f"harm within {self.eps:g} (by the {self.side} end):"]
        others = [name for name in self.dims if name != "depth"]
        for at in np.ndindex(*self.depth.shape):
            names = ", ".join(f"{name} {self.coords[name][i]}" for name, i in zip(others, at))
            lines.append(f"  {names}: {_depth(self.depth[at], bool(self.at_least[at]), self.kind)}")
        if self.reason:
            lines.append(f"  {self.reason}")
        return "\n".join(lines)

    def line(self) -> str:
        """The same in one line."""
        others = [name for name in self.dims if name != "depth"]
        parts = []
        for at in np.ndindex(*self.depth.shape):
            names = " at ".join(f"{name} {self.coords[name][i]}" for name, i in zip(others, at))
            depth = None if self.depth[at] is None else _depth(self.depth[at], bool(self.at_least[at]), self.kind)
            nothing = "is impossible here" if self.kind == "trained" else "withstands nothing"
            parts.append(f"{names} {depth or nothing}")
        text = f"harm within {self.eps:g} (by the {self.side} end): {', '.join(parts)}"
        return f"{text}; {self.reason}" if self.reason else text

    def to_json(self) -> dict[str, Any]:
        """Plain data; `depth` and `width` as nested lists with null for None."""
        names = ("eps", "side", "kind", "depth", "at_least", "width", "possible", "reason")
        return {name: encode(getattr(self, name)) for name in names}


def _depth(depth: Any, at_least: bool, kind: str) -> str:
    if kind == "trained":
        return "impossible here" if depth is None else f"needs trained depth {depth}"
    if depth is None:
        return "withstands nothing, not even the smallest depth"
    return f"withstands {'at least ' if at_least else ''}{forced([depth])}"


@dataclass(frozen=True, eq=False)
class Grid:
    """Harm over depth, width and, where asked, correlation.

    Parameters
    ----------
    harm : Bound
        Shape of `dims`.
    dims : tuple of str
        ("depth", "width") or ("depth", "width", "correlation").
    coords : dict of str to tuple
        Values along each axis, rising (correlation: as given).
    info : dict
        source; kind ("forced" or "trained": what depth counts); depth_why (chains: where the depths come from); start
        and start_why: the state law at each depth and why that one; estimate: how the numbers of each width were made;
        icc: correlation of two answers by depth where the source has one; floor (trained only): harm at unlimited
        depth, a Bound over the other axes; rule; note: what the intervals leave out.
    """

    harm: Bound
    dims: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]
    info: dict[str, Any] = field(default_factory=dict)

    def needed(self, harm: float, side: str = "upper") -> Needed:
        """Which depth and width keep harm within a budget.

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
        good = within(ends, eps)
        shape = ends.shape[1:]
        depth, at_least = np.full(shape, None, dtype=object), np.zeros(shape, dtype=bool)
        for at in np.ndindex(shape):
            column = (slice(None), *at)
            if trained:
                depth[at] = _first(self.coords["depth"], good[column])
            else:
                reading = operational_depth(self.coords["depth"], ends[column], eps).reading
                depth[at], at_least[at] = reading.depth, not reading.crossed
        turned = np.moveaxis(good, 1, -1)
        width = np.full(turned.shape[:-1], None, dtype=object)
        for at in np.ndindex(width.shape):
            width[at] = _first(self.coords["width"], turned[at])
        possible = any(x is not None for x in depth.flat)
        reason = "" if all(x is not None for x in depth.flat) else self._reason(ends, eps, side, depth)
        kind = "trained" if trained else "forced"
        return Needed(eps, side, kind, depth, at_least, width, possible, reason, self.dims, self.coords)

    def _reason(self, ends: NDArray, eps: float, side: str, depth: NDArray) -> str:
        """Why some, or all, entries of the depths are None."""
        trained, empty = self.info.get("kind") == "trained", np.array([x is None for x in depth.flat])
        tried = ends if trained else ends[:1]
        least = float(np.nanmin(tried)) if np.isfinite(tried).any() else float("nan")
        end = "value" if side == "value" else f"{side} end"
        where = "in the grid" if trained else f"at {forced([self.coords['depth'][0]])}"
        if not empty.all():
            text = f"none: harm {where} exceeds {eps:g} there"
        else:
            text = f"impossible in this grid: the smallest harm {where} ({end}) is {least:.3g}, the budget is {eps:g}"
        value = np.asarray(self.harm.value if trained else self.harm.value[0])
        if side == "upper" and empty.all() and np.any(within(value, eps)):
            text += "; the estimate itself is within it, the evidence is too little"
        if trained and "floor" in self.info:
            floor = np.asarray(getattr(self.info["floor"], side)).reshape(-1)
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
        extra = self.coords.get("correlation", (None,))
        for c, rho in enumerate(extra):
            if rho is not None:
                lines.append(f"correlation {rho}")
            lines += self._table(c if "correlation" in self.dims else None)
        for name in ("rule", "note"):
            if self.info.get(name):
                lines.append(f"{name}: {self.info[name]}")
        return "\n".join(lines)

    def _level(self) -> str:
        return "proven" if self.harm.level == 1 else f"{100 * self.harm.level:g} %"

    def _table(self, c: int | None) -> list[str]:
        value, lower, upper = (np.asarray(getattr(self.harm, s)) for s in ("value", "lower", "upper"))
        if c is not None:
            value, lower, upper = value[..., c], lower[..., c], upper[..., c]
        rows = [["depth", *(f"width {m}" for m in self.coords["width"])]]
        for i, k in enumerate(self.coords["depth"]):
            cells = [_span(*ends) for ends in zip(value[i], lower[i], upper[i])]
            rows.append([str(k), *cells])
        sizes = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        return ["  " + "  ".join(text.rjust(size) for text, size in zip(row, sizes)) for row in rows]

    def to_json(self) -> dict[str, Any]:
        """Plain data: dims, coords, harm, info."""
        return {name: encode(getattr(self, name)) for name in ("dims", "coords", "harm", "info")}


def _span(value: float, lower: float, upper: float) -> str:
    return f"{value:.3g}" if upper - lower <= 1e-12 * abs(value) else f"{value:.3g} [{lower:.3g}, {upper:.3g}]"


def _first(coords: tuple[Any, ...], good: NDArray) -> Any:
    at = np.flatnonzero(good)
    return coords[at[0]] if len(at) else None
