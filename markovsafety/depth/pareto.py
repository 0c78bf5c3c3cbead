"""Pareto: which depth, width and capacity are worth their price."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bound import encode
from ..errors import InputError
from .profile import budget, check_side, within

if TYPE_CHECKING:
    from .grid import Grid

__all__ = ["Front", "Pareto", "pareto"]

CHOSEN = ("depth", "width", "capacity")
TIE = 1e-12  # costs and harms that differ by less are the same


@dataclass(frozen=True, eq=False, repr=False)
class Front:
    """Cells that no other cell beats: none costs as little, refuses as little and leaves as little harm.

    Parameters
    ----------
    at : dict of str to array, shape (n,)
        Coordinates of the axes that can be chosen.
    cost : array, shape (n,)
        Rising.
    harm, lower, upper : array, shape (n,)
        Value and interval.
    over_refusal : array, shape (n,), optional
        Probability that a harmless prompt is refused.

    Examples
    --------
    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> grid = ms.sweep(profile, depth=range(33), width=[1, 2, 4, 8])
    >>> front = ms.depth.pareto(grid, cost={"depth": 1, "width": 3}).front
    >>> front
    <Front of 54 cells: cost 3 to 56, harm 0.8 to 1.174e-12>
    >>> print(front.at["width"][:32:8], front.at["depth"][:32:8], front.cost[:32:8])
    [1 2 4 4] [0 5 7 15] [ 3. 11. 19. 27.]
    """

    at: dict[str, NDArray]
    cost: NDArray
    harm: NDArray
    lower: NDArray
    upper: NDArray
    over_refusal: NDArray | None = None

    def __len__(self) -> int:
        return len(self.cost)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One cell as plain numbers."""
        cell = {name: x[i].item() if isinstance(x[i], np.generic) else x[i] for name, x in self.at.items()}
        cell |= {name: float(getattr(self, name)[i]) for name in ("cost", "harm", "lower", "upper")}
        return cell | ({} if self.over_refusal is None else {"over_refusal": float(self.over_refusal[i])})

    def __repr__(self) -> str:
        if len(self) == 0:
            return "<Front of no cell>"
        ends = [f"{name} {x[0]:.4g} to {x[-1]:.4g}" for name, x in (("cost", self.cost), ("harm", self.harm))]
        return f"<Front of {len(self)} cell{'s' if len(self) > 1 else ''}: {', '.join(ends)}>"

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, a dict for each cell."""
        return [encode(self[i]) for i in range(len(self))]


@dataclass(frozen=True, eq=False, repr=False)
class Pareto:
    """Cheapest cells within a budget, and the front of cost against harm.

    Parameters
    ----------
    fronts : object array of Front, shape of `dims`
        A front for each circumstance that cannot be chosen.
    cheapest : object array, same shape
        The cheapest cell within the budgets as a dict (of equally cheap ones that with least harm); None if there is
        none, or no budget was given.
    reasons : object array of str, same shape
        Why it is impossible; empty where it is not.
    eps, over : float or None
        Budgets of harm and of over-refusal.
    side : str
        End of the interval of harm that counts.
    prices : dict or None
        Price per unit of each axis; None for a function.
    dims, coords
        Circumstances: correlation, attack, and for forced tokens the depth.

    Examples
    --------
    A correlation is nothing that can be bought, so each has a front of its own:

    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> grid = ms.sweep(profile, depth=range(33), width=[1, 2, 4], correlation=[0, 0.3])
    >>> found = ms.depth.pareto(grid, cost={"depth": 1, "width": 3}, harm=1e-3)
    >>> found
    <Pareto correlation 0.0: cheapest depth 5, width 4: cost 17, harm 0.000539; and 1
        more>
    >>> print(found)
    correlation 0.0: cheapest depth 5, width 4: cost 17, harm 0.000539
    correlation 0.3: impossible: the smallest harm (upper end) is 0.00287, the budget
        0.001
    """

    fronts: NDArray
    cheapest: NDArray
    reasons: NDArray
    eps: float | None
    over: float | None
    side: str
    prices: dict[str, float] | None
    dims: tuple[str, ...]
    coords: dict[str, tuple[Any, ...]]

    @property
    def front(self) -> Front:
        """The front of the first circumstance."""
        return self.fronts.flat[0]

    @property
    def best(self) -> dict[str, Any] | None:
        """The cheapest cell of the first circumstance."""
        return self.cheapest.flat[0]

    @property
    def possible(self) -> bool:
        """Whether some circumstance has a cell within the budgets."""
        return any(x is not None for x in self.cheapest.flat)

    def __str__(self) -> str:
        lines = []
        for at in np.ndindex(*self.fronts.shape):
            names = ", ".join(f"{name} {self.coords[name][i]}" for name, i in zip(self.dims, at))
            lines.append((f"{names}: " if names else "") + self._line(at))
        return "\n".join(lines)

    def __repr__(self) -> str:
        first, *more = str(self).splitlines()
        return f"<Pareto {first}{f'; and {len(more)} more' if more else ''}>"

    def _line(self, at: tuple[int, ...]) -> str:
        best, front = self.cheapest[at], self.fronts[at]
        if best is not None:
            return "cheapest " + _cell(best)
        if self.reasons[at]:
            return self.reasons[at]
        return f"{len(front)} cells, from {_cell(front[0])} to {_cell(front[len(front) - 1])}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **{name: encode(getattr(self, name)) for name in ("eps", "over", "side", "prices", "dims", "coords")},
            "cheapest": encode(self.cheapest),
            "reasons": encode(self.reasons),
            "fronts": [x.to_json() for x in self.fronts.flat],
        }


def _cell(cell: Mapping[str, Any]) -> str:
    where = ", ".join(f"{name} {cell[name]}" for name in CHOSEN if name in cell)
    over = f", over-refusal {cell['over_refusal']:.3g}" if "over_refusal" in cell else ""
    return f"{where}: cost {cell['cost']:.4g}, harm {cell['harm']:.3g}{over}"


def pareto(
    grid: Grid,
    *,
    cost: Mapping[str, float] | Callable[..., Any],
    harm: float | None = None,
    benign: float | None = None,
    over: float | None = None,
    icc: float = 0.0,
    side: str = "upper",
) -> Pareto:
    """The cheapest cells of a grid within a budget, and the front of cost against harm.

    Parameters
    ----------
    grid : Grid
    cost : dict, or function
        Price of one unit of "depth", "width" and "capacity" (what is left out is free). A function takes arrays by
        these names and returns the cost of every cell.
    harm : float, optional
        Harm budget, for the cheapest cells.
    benign : float, optional
        Probability that one answer refuses a harmless prompt. Over-refusal of the ensemble is then a second price: the
        front holds what cannot be had both cheaper and with less over-refusal at as little harm.
    over : float, optional
        Budget of over-refusal; needs `benign`.
    icc : float
        Correlation of two refusals of a harmless prompt.
    side : {"upper", "value", "lower"}
        Which end of harm counts.

    Returns
    -------
    Pareto
        One front for each coordinate of the axes that nobody can choose: correlation, attack, and, where depth counts
        forced tokens, depth. Cells that were not trained or measured are on no front.

    Raises
    ------
    InputError
        If a price or budget is none, forced tokens are priced, or capacities that are no numbers are.

    Notes
    -----
    Our own. Where harm is f c^d and answers are independent, budgets are the hyperbola ``m (d + d0) = C`` in width and
    depth, and the cheapest point of it solves ``d + d0 = sqrt(C price_m / price_d)``; the grid finds the whole numbers.

    Examples
    --------
    With one answer in a hundred refusing a harmless prompt, at most two in a hundred may be lost to width:

    >>> profile = ms.depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
    >>> grid, price = ms.sweep(profile, depth=range(33), width=[1, 2, 4, 8]), {"depth": 1, "width": 3}
    >>> ms.depth.pareto(grid, cost=price, harm=1e-3)
    <Pareto cheapest depth 5, width 4: cost 17, harm 0.000539>
    >>> ms.depth.pareto(grid, cost=price, harm=1e-3, benign=0.01, over=0.02)
    <Pareto impossible: harm within its budget costs an over-refusal of 0.0394 or more,
        its budget is 0.02>
    """
    check_side(side)
    chosen = [n for n in CHOSEN if n in grid.dims and not (n == "depth" and grid.info.get("kind") != "trained")]
    held = [n for n in grid.dims if n not in chosen]
    eps, limit = (None if x is None else budget(x) for x in (harm, over))
    if limit is not None and benign is None:
        raise InputError(
            "An over-refusal budget without a rate of refusals.",
            cause="How often harmless prompts are refused follows from how often one answer refuses one.",
            next="Pass benign=, the probability that one answer refuses a harmless prompt.",
        )
    shape = tuple(len(grid.coords[n]) for n in chosen)
    cells = {n: np.asarray(grid.coords[n], dtype=object)[i.reshape(-1)] for n, i in zip(chosen, np.indices(shape))}
    price = _prices(cost, cells, shape, grid)
    second = None if benign is None else _refusals(grid, benign, icc, chosen, shape)
    order = [grid.dims.index(n) for n in (*held, *chosen)]
    ends = [np.transpose(np.asarray(getattr(grid.harm, s)), order) for s in ("value", "lower", "upper")]
    outer = ends[0].shape[: len(held)]
    fronts, cheapest, reasons = (np.full(outer, None, dtype=object) for _ in range(3))
    for at in np.ndindex(outer):
        table = {s: x[at].reshape(-1) for s, x in zip(("value", "lower", "upper"), ends)}
        fronts[at] = _front(cells, price, table, second, side)
        cheapest[at], reasons[at] = _cheapest(cells, price, table, second, side, eps, limit)
    prices = dict(cost) if isinstance(cost, Mapping) else None
    return Pareto(fronts, cheapest, reasons, eps, limit, side, prices, tuple(held), {n: grid.coords[n] for n in held})


def _prices(cost: Any, cells: dict[str, NDArray], shape: tuple[int, ...], grid: Grid) -> NDArray:
    if not isinstance(cost, Mapping):
        if not callable(cost):
            raise InputError(f"cost is {cost!r}.", cause="It prices axes.", next='Pass e.g. {"depth": 1, "width": 3}.')
        numbers = {n: _numbers(n, x) for n, x in cells.items()}
        total = np.asarray(cost(**numbers), dtype=np.float64)
        fine = total.shape == () or total.size == int(np.prod(shape))
        if not fine or not np.isfinite(total).all():
            raise InputError(
                f"The cost has shape {total.shape} for {int(np.prod(shape))} cells, or is not finite.",
                cause="A cost function takes flat arrays by the names of the axes, and returns a finite cost for each.",
                next=f"It is called with {', '.join(cells)}.",
            )
        return np.broadcast_to(total.reshape(-1) if total.shape else total, (int(np.prod(shape)),))
    if not cost:
        raise InputError("cost is empty.", cause="Nothing has a price.", next='Pass e.g. {"depth": 1, "width": 3}.')
    total = np.zeros(int(np.prod(shape)))
    for name, each in cost.items():
        if name not in cells:
            forced = name == "depth" and "depth" in grid.dims
            raise InputError(
                f"{name!r} cannot be bought here.",
                cause="Depth counts the forced tokens of an attack in this grid: the attacker chooses it."
                if forced
                else f"What can be chosen is {', '.join(cells)}.",
                next="Price width and capacity, or sweep trained depths.",
            )
        if not (isinstance(each, (int, float, np.number)) and 0 <= each < np.inf):
            raise InputError(f"The price of {name} is {each!r}.", cause="Prices are numbers.", next="Pass 0 or more.")
        total = total + float(each) * _numbers(name, cells[name])
    return total


def _numbers(name: str, values: NDArray) -> NDArray:
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} has no numbers: {', '.join(map(str, dict.fromkeys(values)))}.",
            cause="A price is per unit.",
            next="Name capacities by their size, or pass a cost function over the other axes.",
        ) from None


def _refusals(grid: Grid, benign: float, icc: float, chosen: list[str], shape: tuple[int, ...]) -> NDArray:
    """Over-refusal of every cell: it depends on the width alone."""
    from .width import over_refusal

    model = {"model": grid.info["model"]} if "model" in grid.info else {}
    by_width = np.asarray(
        over_refusal(benign, grid.coords["width"], grid.info.get("rule", "any-refusal"), icc, **model)
    )
    at = [1] * len(shape)
    at[chosen.index("width")] = len(by_width)
    return np.broadcast_to(by_width.reshape(at), shape).reshape(-1)


def _cheapest(
    cells: dict[str, NDArray],
    price: NDArray,
    table: dict[str, NDArray],
    second: NDArray | None,
    side: str,
    eps: float | None,
    limit: float | None,
) -> tuple[dict[str, Any] | None, str]:
    if eps is None and limit is None:
        return None, ""
    there = ~np.isnan(table["value"])
    safe = there if eps is None else there & within(table[side], eps)
    good = safe if limit is None else safe & within(second, limit)
    if good.any():
        least = price[good].min()
        tied = np.flatnonzero(good & (price <= least + TIE * abs(least)))
        i = tied[np.lexsort((second[tied] if second is not None else tied, table[side][tied]))[0]]
        return _made(cells, price, table, second, np.array([i]))[0], ""
    if not there.any():
        return None, "impossible: nothing was trained or measured here"
    if not safe.any():
        text = (
            f"impossible: the smallest harm ({side} end) is {np.nanmin(table[side][there]):.3g}, the budget {eps:.3g}"
        )
        if side == "upper" and eps is not None and within(table["value"][there], eps).any():
            text += "; the estimate itself is within it, the evidence is too little"
        return None, text
    assert second is not None
    least = second[safe].min()
    where = "harm within its budget" if eps is not None else "any cell"
    return None, f"impossible: {where} costs an over-refusal of {least:.3g} or more, its budget is {limit:.3g}"


def _made(cells: Any, price: NDArray, table: Any, second: NDArray | None, rows: NDArray) -> Front:
    over = None if second is None else second[rows]
    value, lower, upper = (table[s][rows] for s in ("value", "lower", "upper"))
    return Front({n: x[rows] for n, x in cells.items()}, price[rows], value, lower, upper, over)


def _front(cells: Any, price: NDArray, table: Any, second: NDArray | None, side: str) -> Front:
    """Cells that are not dominated in cost, harm and over-refusal; of equal ones the first."""
    rows = np.flatnonzero(~np.isnan(table["value"]))
    harm = table[side]
    if second is None:
        kept = _stairs(rows, price, harm)
    else:
        # Level by level of over-refusal; `best` is the staircase of all that refuse as little.
        kept, best = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for level in np.unique(second[rows]):
            new = _stairs(rows[second[rows] == level], price, harm)
            if len(best):
                at = np.searchsorted(price[best], price[new] * (1 + TIE), side="right") - 1
                rival = np.where(at >= 0, harm[best[np.maximum(at, 0)]], np.inf)
                new = new[harm[new] < rival * (1 - TIE)]
            kept = np.concatenate([kept, new])
            best = _stairs(np.concatenate([best, new]), price, harm)
        kept = kept[np.lexsort((harm[kept], second[kept], price[kept]))]
    return _made(cells, price, table, second, kept)


def _stairs(rows: NDArray, price: NDArray, harm: NDArray) -> NDArray:
    """Rows sorted by price, each with less harm than all before it."""
    rows = rows[np.lexsort((harm[rows], price[rows]))]
    before = np.minimum.accumulate(np.concatenate([[np.inf], harm[rows]]))[:-1]
    return rows[(harm[rows] < before * (1 - TIE)) | np.isinf(before)]
