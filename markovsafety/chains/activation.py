"""States from activations: where an answer stands on the plane of harmfulness and refusal.

Rollouts may keep, for every token, the projection of the model's activation on a direction, at the position that
predicted the token (columns ``activation_<name>``). `ActivationBins` makes states of them; `grid` and `drift` lay out
on the plane what was computed by state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .chain import Chain
from .states import Asked

__all__ = ["ActivationBins", "drift", "grid"]

COLUMN = "activation_"
UNKNOWN = -1  # the bin at a forced token whose activation was not recorded; never a state of a count


@dataclass(frozen=True)
class ActivationBins:
    """Bins of the activations' projections on named directions: a chain on the plane of harmfulness and refusal.

    The state after i tokens is read from entry i of the columns ``activation_<name>``, the activation that predicts
    token i, so it depends on nothing behind the prefix. No activation follows the last token of an answer; the only
    state behind it that a count asks for is that of a truncated answer before it enters "truncated", and there the last
    known state stays. That step from a state to itself changes no hitting probability.

    Parameters
    ----------
    edges : mapping from str to sequence of float
        By direction: finite increasing edges e_0 < ... < e_m of the bins (-inf, e_0), [e_0, e_1), ..., [e_m, inf), in
        the units of the column. A state's label is the tuple of its bins, from 0 on, in the order of the directions.

    Raises
    ------
    InputError
        If there is no direction, or its edges are none, not finite, or do not increase.

    Notes
    -----
    A bin of an activation is a lump of the model's states, not one of them; `markovsafety.check` with held-out rollouts
    says whether the chain of these lumps is a fair model.

    Examples
    --------
    Two answers whose activations, before each token, were projected on two directions:

    >>> rolls = ms.Rollouts.of(
    ...     [[5, 9, 4], [7, 2]],
    ...     prompt_id=[0, 1],
    ...     outcome=["harm", "refusal"],
    ...     hit=[2, 1],
    ...     columns={
    ...         "activation_harm": [0.2, 0.8, 1.5, 0.3, 0.1],
    ...         "activation_refusal": [0.1, -0.4, -1.2, 0.9, 1.4],
    ...     },
    ... )
    >>> bins = ms.ActivationBins({"harm": [0.5, 1.0], "refusal": [0.0]})
    >>> chain = ms.estimate(ms.count(rolls, states=bins))
    >>> chain.states[:3]
    ((0, 1), (1, 0), (2, 0))

    `from_rollouts` puts the edges where they part the visited states evenly:

    >>> halves = ms.ActivationBins.from_rollouts(rolls, bins=2)
    >>> [np.round(edges, 3).tolist() for edges in halves.edges.values()]
    [[0.3], [0.1]]
    """

    edges: Mapping[str, Sequence[float]]

    def __post_init__(self):
        if not isinstance(self.edges, Mapping) or not self.edges:
            raise InputError(
                f"ActivationBins has the edges {self.edges!r}.",
                cause="It needs the edges of at least one direction, by name.",
                next='Pass {"harm": [...], "refusal": [...]}, or use ActivationBins.from_rollouts.',
            )
        object.__setattr__(self, "edges", {str(k): _edges(str(k), v) for k, v in self.edges.items()})

    @classmethod
    def from_rollouts(cls, rolls: Any, names: Sequence[str] = ("harm", "refusal"), bins: int = 8) -> ActivationBins:
        """Bins that hold about equally many of the states that a count visits.

        Parameters
        ----------
        rolls : Rollouts
            With a column ``activation_<name>`` for every name.
        names : sequence of str
            Directions, in the order of the labels.
        bins : int
            Number of bins of each direction, at least 2. Values that repeat may leave fewer.

        Returns
        -------
        ActivationBins
            Its edges are quantiles of the values before the sampled tokens up to the hit; each is one of these values.

        Raises
        ------
        InputError
            If a column is missing, no token was sampled, a value is not known, or all values are equal.
        """
        if isinstance(bins, bool) or not isinstance(bins, (int, np.integer)) or bins < 2:
            raise InputError(f"bins is {bins!r}.", cause="Edges lie between bins.", next="Pass a whole number above 1.")
        names = [names] if isinstance(names, str) else list(names)
        offsets, prefill, hit = (np.asarray(getattr(rolls, k)).astype(np.int64) for k in ("offsets", "prefill", "hit"))
        row = np.repeat(np.arange(len(prefill)), np.diff(offsets))
        at = np.arange(len(row)) - offsets[row]
        visited = (at >= prefill[row]) & ((at <= hit[row]) | (hit[row] < 0))
        if not visited.any():
            raise InputError("No token was sampled.", cause="Bins are made of what was visited.", next="Sample some.")
        edges = {}
        for name in names:
            values = _column(rolls.columns, name, len(row))[visited].astype(np.float64)
            if not np.isfinite(values).all():
                raise _unknown(name, int(np.asarray(rolls.prompt_id)[row[visited]][np.argmin(np.isfinite(values))]))
            cuts = np.unique(np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf"))
            edges[name] = cuts[cuts > values.min()]  # below the least value there is nothing
            if not len(edges[name]):
                raise InputError(
                    f"{COLUMN}{name} has no two bins: {int((values == values.min()).sum())} of {len(values)} values "
                    f"are {values.min():g}.",
                    cause="All quantiles of the values are equal, so no edge lies between them.",
                    next="Take more bins, give the edges yourself, or leave the direction out.",
                )
        return cls(edges)

    @property
    def kind(self) -> str:
        """Its name, for `map_name`: bins by direction and a digest of the edges."""
        told = repr([(name, cuts) for name, cuts in self.edges.items()])
        sizes = ", ".join(f"{name}: {len(cuts) + 1}" for name, cuts in self.edges.items())
        return f"ActivationBins({sizes}; {hashlib.sha256(told.encode()).hexdigest()[:8]})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of bins of every direction."""
        return tuple(len(cuts) + 1 for cuts in self.edges.values())

    def walk(self, tokens: NDArray, prefill: int = 0) -> list[Hashable]:
        """Refuses: tokens do not tell the activations."""
        raise _nothing_recorded(self)

    def label_of(
        self, tokens: NDArray, begin: NDArray, at: NDArray, asked: Asked | None
    ) -> tuple[NDArray, list[tuple[int, ...]]]:
        """Codes and labels of m prefixes; see `markovsafety.chains.states.label_at`."""
        if asked is None or asked.columns is None:
            raise _nothing_recorded(self)
        row, length = asked.row, np.asarray(asked.length)[asked.row]
        place = np.asarray(asked.first)[row] + np.minimum(at, length - 1)
        forced = at < np.asarray(asked.prefill)[row]
        codes = np.zeros(len(at), dtype=np.int64)
        for name, cuts in self.edges.items():
            column = _column(asked.columns, name, asked.total)
            values = np.full(len(at), np.nan)
            values[length > 0] = column[place[length > 0]]
            lost = np.isnan(values) & ~forced
            if lost.any():
                first = int(np.argmax(lost))
                raise _unknown(name, int(asked.prompt_id[row[first]]), int(at[first]))
            found = np.where(np.isnan(values), UNKNOWN, np.searchsorted(cuts, values, side="right"))
            codes = codes * (len(cuts) + 2) + found - UNKNOWN  # UNKNOWN is one more digit
        used, codes = np.unique(codes, return_inverse=True)
        columns = []
        for size in reversed(self.shape):
            used, digit = np.divmod(used, size + 1)
            columns.append((digit + UNKNOWN).tolist())
        return codes.reshape(-1), list(zip(*reversed(columns)))


def _edges(name: str, values: Any) -> tuple[float, ...]:
    try:
        cuts = tuple(float(x) for x in values)
    except (TypeError, ValueError):
        cuts = ()
    if not cuts or not np.isfinite(cuts).all() or any(b <= a for a, b in pairwise(cuts)):
        raise InputError(
            f"The edges of {name} are {values!r}.",
            cause="Edges are finite numbers, at least one, each above the one before.",
            next="Sort them, drop equal ones, or use ActivationBins.from_rollouts.",
        )
    return cuts


def _column(columns: Mapping[str, Any], name: str, total: int) -> NDArray:
    """The projections on one direction, one for each token of all answers."""
    if COLUMN + name not in columns:
        there = sorted(str(c) for c in columns if str(c).startswith(COLUMN))
        raise InputError(
            f"The rollouts have no column {COLUMN}{name}.",
            cause=f"Of activations there is {', '.join(there) or 'nothing'}.",
            next="Record the projection on this direction with the rollouts, one number per token.",
        )
    column = np.asarray(columns[COLUMN + name])
    if column.shape != (total,):
        raise InputError(
            f"{COLUMN}{name} has shape {column.shape}, there are {total} tokens.",
            cause="Activations are recorded token by token.",
            next="Record them again, or drop the column.",
        )
    return column


def _unknown(name: str, prompt: int, at: int | None = None) -> InputError:
    where = "" if at is None else f" after {at} tokens"
    return InputError(
        f"{COLUMN}{name} is not known{where}, in an answer to prompt {prompt}.",
        cause="It is nan before a sampled token, or nothing was sampled from there.",
        next="Record the activations of all sampled tokens again, or leave such rollouts out.",
    )


def _nothing_recorded(states: ActivationBins) -> InputError:
    return InputError(
        f"The states of {states.kind} depend on the activations, and these were not told.",
        cause="They are looked up by tokens alone here.",
        next="Pass rollouts (count, check), or use a map of the tokens alone.",
    )


def _cells(
    chain: Chain, bins: ActivationBins | Mapping[str, Any] | None, cell: Callable[[Any], Any] | None
) -> tuple[NDArray, NDArray, NDArray, tuple[int, int]]:
    """States that have a place on the plane, their bins along the first and the second direction, and its shape."""
    states, places = [], []
    for i, (label, done) in enumerate(zip(chain.states, chain.outcome_mask)):
        place = None if done else label if cell is None else cell(label)
        if done or (cell is not None and place is None):
            continue
        whole = isinstance(place, tuple) and len(place) == 2 and all(isinstance(b, (int, np.integer)) for b in place)
        if not whole or min(place) < 0:  # pyright: ignore[reportArgumentType]
            raise InputError(
                f"State {label!r} has no place on a plane.",
                cause="A place is a pair of bins, the label of ActivationBins with two directions.",
                next="Pass cell=, a function from a label to a pair of bins, or None for what is not shown.",
            )
        states.append(i)
        places.append(place)
    xy = np.array(places, dtype=np.int64).reshape(-1, 2)
    if not len(xy):
        raise InputError("No state has a place on the plane.", cause="None is shown.", next="Correct cell=.")
    if len(np.unique(xy, axis=0)) < len(xy):
        raise InputError(
            "Several states have one place on the plane.",
            cause="The chain's states tell more than two directions.",
            next="Pass a function cell= that is None for all but one of them, or lump the chain.",
        )
    wide, high = (int(m) + 1 for m in xy.max(axis=0))
    if bins is not None:
        shape = (bins if isinstance(bins, ActivationBins) else ActivationBins(bins)).shape
        if len(shape) != 2 or shape[0] < wide or shape[1] < high:
            raise InputError(
                f"The chain has {wide} x {high} bins, the edges make {' x '.join(map(str, shape))}.",
                cause="These are not the edges that its rollouts were counted with.",
                next="Pass the map that was counted with.",
            )
        wide, high = shape
    return np.array(states), xy[:, 0], xy[:, 1], (high, wide)


def grid(
    chain: Chain,
    values: Any,
    bins: ActivationBins | Mapping[str, Any] | None = None,
    *,
    cell: Callable[[Any], Any] | None = None,
) -> NDArray[np.float64]:
    """Numbers of states laid out on the plane of two directions.

    Parameters
    ----------
    chain : Chain
        With one matrix; its states are labels of `ActivationBins` with two directions.
    values : Bound or array, shape (n,)
        One number per state; of a Bound the values.
    bins : ActivationBins or its edges, optional
        What the rollouts were counted with; the grid ends at the last visited bin if not given.
    cell : callable, optional
        For other labels: from a label to its pair of bins, or None for a state that has no place. For one category of
        ``Product([ByPrompt(), ActivationBins(...)])``: ``lambda s: s[1] if s[0] == "bio" else None``.

    Returns
    -------
    array, shape (bins of the second direction, bins of the first)
        nan where there is no state.

    Raises
    ------
    InputError
        If the labels are no pairs of bins, two states have one place, or the values do not fit the chain.

    Examples
    --------
    >>> rolls = ms.Rollouts.of(
    ...     [[5, 9, 4], [7, 2]],
    ...     prompt_id=[0, 1],
    ...     outcome=["harm", "refusal"],
    ...     hit=[2, 1],
    ...     columns={
    ...         "activation_harm": [0.2, 0.8, 1.5, 0.3, 0.1],
    ...         "activation_refusal": [0.1, -0.4, -1.2, 0.9, 1.4],
    ...     },
    ... )
    >>> bins = ms.ActivationBins({"harm": [0.5, 1.0], "refusal": [0.0]})
    >>> chain = ms.estimate(ms.count(rolls, states=bins))

    P(harm) rises to the right, where the model holds the answer for harmful, and is 1/2 where both answers begin:

    >>> ms.chains.grid(chain, ms.hitting_probability(chain, "harm"))
    array([[nan, 1. , 1. ],
           [0.5, nan, nan]])
    """
    states, x, y, shape = _cells(chain, bins, cell)
    numbers = np.asarray(getattr(values, "value", values), dtype=np.float64)
    if numbers.shape != (len(chain.states),):
        raise InputError(
            f"The values have shape {numbers.shape}, the chain has {len(chain.states)} states.",
            cause="The plane shows one number per state.",
            next="Pass the whole answer of a homogeneous chain, not its value at the start.",
        )
    out = np.full(shape, np.nan)
    out[y, x] = numbers[states]
    return out


def drift(
    chain: Chain,
    bins: ActivationBins | Mapping[str, Any] | None = None,
    *,
    cell: Callable[[Any], Any] | None = None,
) -> NDArray[np.float64]:
    """Mean displacement of the chain in one step, given that it stays on the plane.

    Parameters
    ----------
    chain, bins, cell
        As for `grid`.

    Returns
    -------
    array, shape (2, bins of the second direction, bins of the first)
        In bins per token, along the first and the second direction; nan where there is no state or none is next.

    Raises
    ------
    InputError
        As `grid`, and if the chain has one matrix per position.

    Examples
    --------
    Of two answers that begin in the same bin, one turns away from refusal, and towards harm step by step; the other
    ends there:

    >>> rolls = ms.Rollouts.of(
    ...     [[5, 9, 4], [7, 2]],
    ...     prompt_id=[0, 1],
    ...     outcome=["harm", "refusal"],
    ...     hit=[2, 1],
    ...     columns={
    ...         "activation_harm": [0.2, 0.8, 1.5, 0.3, 0.1],
    ...         "activation_refusal": [0.1, -0.4, -1.2, 0.9, 1.4],
    ...     },
    ... )
    >>> bins = ms.ActivationBins({"harm": [0.5, 1.0], "refusal": [0.0]})
    >>> chain = ms.estimate(ms.count(rolls, states=bins))
    >>> towards_harm, towards_refusal = ms.chains.drift(chain)
    >>> towards_harm
    array([[nan, 1. , nan],
           [0.5, nan, nan]])
    >>> towards_refusal
    array([[ nan,  0. ,  nan],
           [-0.5,  nan,  nan]])
    """
    if chain.is_layered:
        raise InputError(
            "The chain has one matrix per position.",
            cause="Its displacement differs from position to position.",
            next="Estimate a homogeneous chain.",
        )
    states, x, y, shape = _cells(chain, bins, cell)
    moves = chain.P[states][:, states]
    stays = np.asarray(moves.sum(axis=1)).reshape(-1)
    at = np.column_stack([x, y]).astype(np.float64)
    mean = np.full(at.shape, np.nan)
    there = stays > 0
    mean[there] = (moves @ at)[there] / stays[there, None] - at[there]
    out = np.full((2, *shape), np.nan)
    out[:, y, x] = mean.T
    return out
