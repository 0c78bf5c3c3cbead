"""Classes of states: read from what the user says, or found in the chain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..chains import Chain
from ..chains.checks import shape_of
from ..errors import InputError
from ..hitting import hitting_probability, hitting_time
from ..hitting.core import Walk

__all__ = ["METHODS", "find_classes", "lump_loss", "membership", "read_classes"]

METHODS = ("kl", "spectral", "labels")
GRAINS = 512  # groups that are merged pair by pair; finer ones would cost a table of all pairs of states
ROUNDS = 25
BLOCK = 4096
SECOND, TIME = 0.25, 0.1  # weight of another outcome and of the time beside that of the target, as lengths


def membership(codes: NDArray, c: int) -> sp.csr_array:
    """States by classes, shape (n, c): one 1 per row."""
    return sp.csr_array((np.ones(len(codes)), codes, np.arange(len(codes) + 1)), shape=(len(codes), c))


def kinds_of(chain: Chain, hit: NDArray, closed: NDArray) -> tuple[NDArray, list[Any]]:
    """What must not be mixed: the number of every state's kind, 0 for states that go on, and the names of the kinds."""
    names: list[Any] = [None]
    kind = np.zeros(chain.n_states, dtype=np.int64)
    for name, index in chain.outcomes.items():
        for inside in (True, False):
            some = index[hit[index] == inside]
            if some.size:
                split = hit[index].any() and not hit[index].all()
                names.append(f"{name}, {'hit' if inside else 'not hit'}" if split else name)
                kind[some] = len(names) - 1
    for some, name in ((hit, "target"), (closed & ~hit, "never left")):
        rest = some & (kind == 0)
        if rest.any():
            names.append(name)
            kind[rest] = len(names) - 1
    return kind, names


def read_classes(chain: Chain, classes: Any, hit: NDArray, closed: NDArray) -> tuple[NDArray, list[Any]]:
    """Class of every state, shape (n,), and the names of the classes, from what `lump` takes.

    Raises
    ------
    InputError
        As `lump`.
    """
    kind, names = kinds_of(chain, hit, closed)
    if isinstance(classes, Mapping):
        given = _of_mapping(chain, classes, kind, names)
    elif callable(classes):
        given = [classes(x) if k == 0 else names[k] for x, k in zip(chain.states, kind.tolist())]
    else:
        given = np.asarray(classes).tolist() if isinstance(classes, np.ndarray) else list(classes)
        if len(given) != chain.n_states:
            raise InputError(
                f"There are {len(given)} names of classes for {chain.n_states} states.",
                cause="A sequence names the class of every state, outcome states included.",
                next="Pass one name per state, or a dict from class name to its states.",
            )
    order: dict[Hashable, int] = {}
    codes = np.array([order.setdefault(_name(x), len(order)) for x in given], dtype=np.int64)
    _check_unmixed(chain, codes, list(order), kind, names)
    return codes, list(order)


def _name(x: Any) -> Hashable:
    return tuple(x) if isinstance(x, list) else x


def _of_mapping(chain: Chain, classes: Mapping[Any, Any], kind: NDArray, names: list[Any]) -> list[Any]:
    given: list[Any] = [names[k] for k in kind.tolist()]
    taken = np.zeros(chain.n_states, dtype=bool)
    for name, states in classes.items():
        empty = hasattr(states, "__len__") and not isinstance(states, str) and not len(states)
        mask = np.zeros(chain.n_states, dtype=bool) if empty else chain.mask(states)
        if not mask.any() or (mask & taken).any():
            both = [chain.states[i] for i in np.flatnonzero(mask & taken)[:1]]
            raise InputError(
                f"The class {name!r} " + (f"shares the state {both[0]!r} with another." if both else "is empty."),
                cause="Classes cut the states into parts that are not empty and do not overlap.",
                next="Put every state into one class, and leave out names without states.",
            )
        taken |= mask
        for i in np.flatnonzero(mask):
            given[i] = name
    left = np.flatnonzero(~taken & (kind == 0))
    if left.size:
        some = [chain.states[i] for i in left]
        raise InputError(
            f"{left.size} states are in no class, for example {some[0]!r}.",
            cause="Only outcome states that are not named keep a class by themselves.",
            next="Name a class for each of them, e.g. one for all the rest.",
            partial=some,
        )
    return given


def _check_unmixed(chain: Chain, codes: NDArray, order: list[Any], kind: NDArray, names: list[Any]) -> None:
    low, high = np.full(len(order), len(names)), np.full(len(order), -1)
    np.minimum.at(low, codes, kind)
    np.maximum.at(high, codes, kind)
    mixed = np.flatnonzero(low != high)
    if not mixed.size:
        return
    a = int(mixed[0])
    said = [("states that go on" if k == 0 else repr(names[k])) for k in np.unique(kind[codes == a]).tolist()]
    apart = [order[c] if c not in mixed else (order[c], names[k]) for c, k in zip(codes.tolist(), kind.tolist())]
    raise InputError(
        f"The class {order[a]!r} mixes {' with '.join(said)}.",
        cause="How an answer ended cannot be averaged with how it goes on, nor one outcome with another: the lumped "
        "chain would no longer say what happened.",
        next="Split it; error.partial has the classes cut apart where they mix, ready to pass.",
        partial=apart,
    )


def find_classes(
    w: Walk, n: Any, method: str, h: NDArray, visits: NDArray, closed: NDArray
) -> tuple[NDArray, list[Any]]:
    """n classes of the states that go on, besides one for every kind of end.

    Raises
    ------
    InputError
        If n is no positive whole number, or every label is needed ("labels").
    """
    chain = w.chain
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise InputError(f"n is {n!r}.", cause="It is a number of classes.", next="Pass a whole number from 1 on.")
    kind, names = kinds_of(chain, w.hit, closed)
    free = np.flatnonzero(kind == 0)
    codes = np.full(chain.n_states, -1, dtype=np.int64)
    if method == "labels" and n < len(free):
        codes[free] = _by_label([chain.states[i] for i in free], int(n))
    elif n >= len(free):
        codes[free] = np.arange(len(free))
    else:
        total = visits.sum(axis=0)[free]
        weight = total / max(total.sum(), 1e-300) + 1 / len(free)  # what is never visited still counts a little
        codes[free] = _alike(_coordinates(w, h, visits)[free], weight, int(n))
    c = int(codes[free].max(initial=-1)) + 1
    ends = kind > 0
    codes[ends] = c - 1 + kind[ends]
    if method == "kl" and n < len(free):
        codes = _closest_steps(w, codes, c, c + len(names) - 1, visits, free)
    return codes, _names(chain, codes, visits.sum(axis=0), c, names)


def _names(chain: Chain, codes: NDArray, visits: NDArray, c: int, ends: list[Any]) -> list[Any]:
    """A class is called by its most visited state, and how many there are besides."""
    order = np.lexsort((-visits, codes))
    size = np.bincount(codes, minlength=c + len(ends) - 1)
    first = order[np.cumsum(size) - size]
    named: list[Any] = []
    for i in range(c):
        label = chain.states[int(first[i])]
        named.append(label if size[i] == 1 else f"{label} and {size[i] - 1} more")
    return [*named, *ends[1:]]


def _coordinates(w: Walk, h: NDArray, visits: NDArray) -> NDArray:
    """Where a state stands: its chance of every outcome, and its time to the end; shape (n, d)."""
    chain = w.chain
    if chain.is_layered:  # harm at every position, by how often the position is reached
        return (h[:-1] * np.sqrt(visits.sum(axis=1) / max(float(visits.sum()), 1e-300))[:, None]).T
    found = [h]
    for name, index in chain.outcomes.items():
        if len(index) and not w.hit[index].any():
            found.append(SECOND * np.asarray(hitting_probability(chain, name, certify=False).value))
    time = np.asarray(hitting_time(chain).value, dtype=np.float64)
    longest = float(np.max(time[np.isfinite(time)], initial=0.0))
    found.append(TIME * np.minimum(time, longest) / max(longest, 1.0))
    return np.column_stack(found)


def _alike(X: NDArray, weight: NDArray, n: int) -> NDArray:
    """Ward's classes of weighted points: halved where they differ most, then merged pair by pair at the least loss."""
    grain = _halved(X, weight, max(GRAINS, 2 * n))
    size = int(grain.max()) + 1
    mass = np.bincount(grain, weight, size)
    centre = np.stack([np.bincount(grain, weight * x, size) for x in X.T], axis=1) / mass[:, None]
    parent = _merge(centre, mass, n)
    return np.unique(parent[grain], return_inverse=True)[1].reshape(-1)


def _halved(X: NDArray, weight: NDArray, most: int) -> NDArray:
    """At most so many groups: the one with the largest spread is cut at its mean, along its widest direction."""
    import heapq

    group = np.zeros(len(X), dtype=np.int64)
    count = 0

    def entry(rows: NDArray) -> tuple[float, int, NDArray, int, float]:
        nonlocal count
        count += 1
        mean = np.average(X[rows], axis=0, weights=weight[rows])
        spread = weight[rows] @ (X[rows] - mean) ** 2
        widest = int(spread.argmax())
        return -float(spread[widest]), count, rows, widest, float(mean[widest])

    heap = [entry(np.arange(len(X)))]
    while len(heap) < most and heap[0][0] < 0:
        _, _, rows, d, cut = heapq.heappop(heap)
        low = X[rows, d] <= cut
        if low.all() or not low.any():  # equal up to rounding
            count += 1
            heapq.heappush(heap, (0.0, count, rows, d, cut))
            continue
        for part in (rows[low], rows[~low]):
            heapq.heappush(heap, entry(part))
    for i, item in enumerate(heap):
        group[item[2]] = i
    return group


def _merge(centre: NDArray, mass: NDArray, n: int) -> NDArray:
    """Group of every point after merging, at each step, the two that lose least, until n are left."""
    m = len(mass)
    centre, mass, parent = centre.copy(), mass.copy(), np.arange(m)
    alive = np.ones(m, dtype=bool)

    def cost(i: int) -> NDArray:
        row = mass[i] * mass / (mass[i] + mass) * np.sum((centre - centre[i]) ** 2, axis=1)
        row[i] = np.inf
        return np.where(alive, row, np.inf)

    table = np.stack([cost(i) for i in range(m)]) if m > n else np.empty((0, 0))
    for _ in range(m - n):
        i, j = divmod(int(table.argmin()), m)
        total = mass[i] + mass[j]
        centre[i] = (mass[i] * centre[i] + mass[j] * centre[j]) / total
        mass[i], alive[j] = total, False
        parent[parent == j] = i
        table[j], table[:, j] = np.inf, np.inf
        table[i] = cost(i)
        table[:, i] = table[i]
    return parent


def _closest_steps(w: Walk, codes: NDArray, c: int, total: int, visits: NDArray, free: NDArray) -> NDArray:
    """Every state to the class whose next step diverges least from its own; the best partition met on the way."""
    best, least = codes, np.inf
    moving = np.zeros(len(codes), dtype=bool)
    moving[free] = True
    for _ in range(ROUNDS):
        into = [sp.csr_array(P @ membership(codes, total)) for P in w.chain.layers]
        loss = lump_loss(into, codes, visits, moving)
        if loss < least:
            best, least = codes, loss
        cost = np.zeros((len(free), c))
        for t, R in enumerate(into):
            log = np.log(np.maximum(_mean_rows(R, codes, visits[t], total)[:c], 1e-300))
            for a in range(0, len(free), BLOCK):
                rows = free[a : a + BLOCK]
                share = visits[t][rows] + 1e-12
                cost[a : a + BLOCK] -= share[:, None] * np.asarray(R[rows] @ log.T)
        again = codes.copy()
        again[free] = cost.argmin(axis=1)
        # A class that lost its last state gets one whose own class suits it least.
        gain = cost[np.arange(len(free)), codes[free]] - cost.min(axis=1)
        for empty in np.setdiff1d(np.arange(c), again[free]):
            shared = np.bincount(again, minlength=total)[again[free]] > 1
            again[free[int(np.where(shared, gain, -1.0).argmax())]] = empty
        if np.array_equal(again, codes):
            break
        codes = again
    return best


def _mean_rows(R: sp.csr_array, codes: NDArray, visits: NDArray, c: int) -> NDArray:
    """Rows of the lumped chain, dense, shape (c, c); even averages where nothing was visited."""
    total, size = np.bincount(codes, visits, c), np.maximum(np.bincount(codes, minlength=c), 1)
    share = np.where(total[codes] > 0, visits / np.where(total > 0, total, 1.0)[codes], 1.0 / size[codes])
    mean = sp.csr_array((share, codes, np.arange(len(codes) + 1)), shape=(len(codes), c))
    return np.asarray((mean.T @ R).todense())


def lump_loss(into: list[sp.csr_array], codes: NDArray, visits: NDArray, moving: NDArray) -> float:
    """Divergence of the next class given the state from that given the class, over the visits of one answer, in nats.

    Parameters
    ----------
    into : list of csr arrays, shape (n, c)
        By layer, from every state into every class.
    visits : array, shape (layers, n)
    moving : bool array, shape (n,)
        States that count.
    """
    loss = 0.0
    for R, share in zip(into, visits):
        row = np.repeat(np.arange(len(codes)), np.diff(R.indptr))
        mass = np.where(moving, share, 0.0)[row] * R.data
        c = shape_of(R)[1]
        cells, at = np.unique(codes[row] * c + R.indices, return_inverse=True)
        total = np.bincount(codes, np.where(moving, share, 0.0), c)
        mean = np.bincount(at.reshape(-1), mass, len(cells)) / np.where(total > 0, total, 1.0)[cells // c]
        on = mass > 0
        loss += float(np.sum(mass[on] * np.log(R.data[on] / mean[at.reshape(-1)[on]])))
    return max(loss, 0.0)


def _by_label(labels: list[Any], n: int) -> NDArray:
    """Classes of equal parts of the labels: the longest parts that make n classes at most."""
    fewest = len(labels)
    for k in range(max(len(_parts(x)) for x in labels), 0, -1):
        found = [tuple(_parts(x)[:k] if isinstance(x, str) else _parts(x)[-k:]) for x in labels]
        distinct = {x: i for i, x in enumerate(dict.fromkeys(found))}
        fewest = len(distinct)
        if fewest <= n:
            return np.array([distinct[x] for x in found])
    raise InputError(
        f"The labels make more than {n} classes, whatever is left out of them.",
        cause=f"They are like {labels[0]!r}, and even one part of each makes {fewest} classes.",
        next="Use a larger n, another method, or classes= with a function of the label.",
    )


def _parts(label: Any) -> list[Any]:
    if isinstance(label, str):
        return [p for chunk in label.split("|") for p in chunk.split(".")]
    return list(label) if isinstance(label, (tuple, list)) else [label]
