"""lumpable: do the states of every class go into every other class with the same probability?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..bound import Bound, check_level, encode
from ..chains import Chain
from ..chains.checks import shape_of
from ..chains.tally import collect
from ..clusters import spread
from ..hitting.core import check_chain
from .lump_classes import membership, read_classes

__all__ = ["Lumpable", "lumpable"]

BLOCK = 1 << 21  # cells times prompts looked at together


@dataclass(frozen=True, eq=False)
class Lumpable:
    """Whether merging classes leaves a Markov chain.

    Parameters
    ----------
    exact : bool or None
        True: the probabilities are equal up to `tolerance`. False: they are not. None: an estimated chain, and its
        rollouts do not contradict; they cannot prove equality either, see ``spread.upper``.
    spread : Bound
        Largest difference, over two states of one class and a class that they go into, of the probability to go there.
        Of an estimated chain the interval holds for all classes at once, clustered by prompt.
    where : dict or None
        Of the largest difference (estimated chain: of the clearest one, if any is clear): class, into, states (the one
        with the lower and the one with the higher probability), probabilities, layer (None if homogeneous). None if
        every class has one state.
    verdict : str

    Examples
    --------
    >>> classes = {"aligned": [0, 1], "tail": ["tail"]}
    >>> found: ms.evidence.Lumpable = ms.evidence.lumpable(ms.toy.shallow(2), classes)
    >>> found.where["states"], found.where["into"], found.where["probabilities"]
    (('position 1', 'position 0'), 'aligned', (0.0, 0.69))
    """

    exact: bool | None
    spread: Bound
    where: dict[str, Any] | None
    verdict: str

    def __str__(self) -> str:
        return f"{self.verdict}\n  {self.spread}"

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: exact, spread, where, verdict."""
        return {name: encode(getattr(self, name)) for name in ("exact", "spread", "where", "verdict")}


def lumpable(chain: Chain, classes: Any, *, level: float = 0.95, tolerance: float = 1e-12) -> Lumpable:
    """Test whether classes can be merged without an error, whatever the start is (strong lumpability).

    Parameters
    ----------
    chain : Chain
        With its counts (`estimate`) the test allows for sampling; without them the probabilities are taken as they are.
    classes : as in `lump`
    level : float
        Confidence level for an estimated chain, for all comparisons together.
    tolerance : float
        Differences of given probabilities up to this are rounding.

    Returns
    -------
    Lumpable

    Raises
    ------
    InputError
        As `lump`.

    Notes
    -----
    The condition: sum_{j in B} P_ij is the same for all i in A, for all classes A and B (J. G. Kemeny and J. L. Snell,
    Finite Markov Chains (1960), theorem 6.3.2). For counts every such sum has a clustered Clopper-Pearson interval,
    Bonferroni-corrected over all of them; two that do not overlap contradict. That is less sharp than a test of the
    pair, but holds for rare steps, few prompts, and any dependence between states that the same rollouts visit.

    Examples
    --------
    >>> ms.evidence.lumpable(ms.toy.shallow(2), {"aligned": [0, 1], "tail": ["tail"]})
    Lumping is not exact: from 'position 1' into 'aligned' with probability 0, from 'position 0'
        of the same class 0.69.
      largest difference within a class = 0.69   proven [0.69, 0.69]
          because: rounding 4e-15; sampling, judge, lumping, model, truncation not assessed

    Positions that differ in nothing may be merged:

    >>> alike = ms.toy.shallow(2, aligned=(0.08, 0.02), unaligned=(0.08, 0.02))
    >>> print(ms.evidence.lumpable(alike, {"all": [0, 1, "tail"]}).verdict)
    Lumping is exact from every start: no two states of a class differ.
    """
    check_chain(chain)
    check_level(level)
    nothing = np.zeros(chain.n_states, dtype=bool)
    codes, names = read_classes(chain, classes, nothing, nothing)
    if chain.counts is not None and not chain.is_layered:
        return _counted(chain, codes, names, level)
    found = [_largest(sp.csr_array(P @ membership(codes, len(names))), codes) for P in chain.layers]
    best = max(((f[0], t, f[1:]) for t, f in enumerate(found) if f is not None), default=None, key=lambda x: x[0])
    room = 4 * 2.0**-52 * (1 + max(int(np.diff(P.indptr).max(initial=0)) for P in chain.layers))
    value = 0.0 if best is None else best[0]
    widest = Bound(
        value,
        max(value - room, 0.0),
        value + room,
        1.0,
        {"rounding": room},
        None,
        {"name": "largest difference within a class"},
    )
    if best is None:
        return Lumpable(True, widest, None, "Every class has one state: nothing is merged.")
    t, (A, B, low, high, p) = best[1:]
    where = {"class": names[A], "into": names[B], "states": (chain.states[low], chain.states[high])}
    where |= {"probabilities": p, "layer": t if chain.is_layered else None}
    if value <= tolerance:
        return Lumpable(True, widest, where, "Lumping is exact from every start: no two states of a class differ.")
    return Lumpable(False, widest, where, _contrary(where, "Lumping is not exact"))


def _contrary(where: dict[str, Any], fact: str) -> str:
    a, b = where["states"]
    p, q = where["probabilities"]
    return f"{fact}: from {a!r} into {where['into']!r} with probability {p:.4g}, from {b!r} of the same class {q:.4g}."


def _largest(R: sp.csr_array, codes: NDArray) -> tuple[float, int, int, int, int, tuple[float, float]] | None:
    """The largest difference within a class: itself, the class, into which, both states, both probabilities."""
    n, c = shape_of(R)
    size = np.bincount(codes, minlength=c)
    row = np.repeat(np.arange(n), np.diff(R.indptr))
    key = codes[row] * c + R.indices
    many = size[codes[row]] > 1
    row, key, value = row[many], key[many], R.data[many]
    if not len(key):
        return None
    order = np.lexsort((value, key))
    row, key, value = row[order], key[order], value[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    last = np.append(first[1:], len(key)) - 1
    absent = last - first + 1 < size[key[first] // c]  # some state of the class never goes there
    low = np.where(absent, 0.0, value[first])
    i = int((value[last] - low).argmax())
    A, B = divmod(int(key[first[i]]), c)
    lowest = int(row[first[i]])
    if absent[i]:
        lowest = int(np.setdiff1d(np.flatnonzero(codes == A), row[first[i] : last[i] + 1])[0])
    ends = (float(low[i]), float(value[last[i]]))
    return ends[1] - ends[0], A, B, lowest, int(row[last[i]]), ends


def _counted(chain: Chain, codes: NDArray, names: list[Any], level: float) -> Lumpable:
    state, into, (p, lower, upper) = _cells(chain, codes, len(names), level)
    told = {"name": "largest difference within a class", "comparisons": len(state)}
    if not len(state):
        bound = Bound(0.0, 0.0, 1.0, level, {"sampling": 0.5}, None, told)
        return Lumpable(None, bound, None, "No class has two states that were visited: nothing can be compared.")
    key = codes[state] * len(names) + into
    groups, at = np.unique(key, return_inverse=True)
    ends = {name: np.full(len(groups), fill) for name, fill in (("max", -np.inf), ("L", -np.inf), ("min", np.inf))}
    ends |= {
        "U": np.full(len(groups), np.inf),
        "top": np.full(len(groups), -np.inf),
        "bottom": np.full(len(groups), np.inf),
    }
    for name, x in (("max", p), ("L", lower), ("top", upper)):
        np.maximum.at(ends[name], at, x)
    for name, x in (("min", p), ("U", upper), ("bottom", lower)):
        np.minimum.at(ends[name], at, x)
    value, sure, most = ends["max"] - ends["min"], ends["L"] - ends["U"], ends["top"] - ends["bottom"]
    clear = float(sure.max()) > 0
    g = int(sure.argmax() if clear else value.argmax())
    rows = np.flatnonzero(at == g)
    rank = (lower, upper) if clear else (p, p)
    high, low = rows[rank[0][rows].argmax()], rows[rank[1][rows].argmin()]
    A, B = divmod(int(groups[g]), len(names))
    where = {"class": names[A], "into": names[B], "states": (chain.states[state[low]], chain.states[state[high]])}
    where |= {"probabilities": (float(p[low]), float(p[high])), "layer": None}
    least, top = max(float(sure.max()), 0.0), min(float(most.max()), 1.0)
    bound = Bound(float(value.max()), least, top, level, {"sampling": (top - least) / 2}, None, told)
    if clear:
        return Lumpable(False, bound, where, _contrary(where, "Lumping is not exact"))
    return Lumpable(None, bound, where, f"Nothing contradicts: states of one class differ by at most {top:.2g}.")


def _cells(chain: Chain, codes: NDArray, c: int, level: float) -> tuple[NDArray, NDArray, list[NDArray]]:
    """Steps from every visited state of a class of several into every class that the class goes into: state, class, and
    probability with its clustered interval, Bonferroni-corrected over all of them."""
    counts, t = chain.counts, chain.counts.transitions
    S, tally = len(counts.states), counts.tally
    harm = chain.outcomes["harm"]
    kind = np.unique(tally.category, return_inverse=True)[1].reshape(-1)
    place = [harm[kind] if len(harm) > 1 else np.full(len(tally), harm[0])]
    place += [np.full(len(tally), chain.outcomes[name][0]) for name in ("refusal", "benign", "truncated")]
    ends = np.column_stack(place)
    out = t.target >= S
    target = np.where(out, ends[t.group, np.maximum(t.target - S, 0)], t.target)
    (state, prompt), (n,) = collect([t.source, tally.cluster[t.group]], [t.count])
    seen = np.bincount(state, n, chain.n_states) > 0
    size = np.bincount(codes[seen], minlength=c)
    mine = size[codes[t.source]] > 1
    (i, B, k), (x,) = collect([t.source[mine], codes[target[mine]], tally.cluster[t.group[mine]]], [t.count[mine]])
    # Every visited state of the class has a cell for every class that any of them goes into.
    pairs = np.unique(codes[i] * c + B)
    members = [np.flatnonzero(seen & (codes == a)) for a in range(c)]
    rows = [(m, np.full(len(m), b)) for a, b in zip(pairs // c, pairs % c) for m in [members[a]]]
    if not rows:
        none = np.zeros(0, dtype=np.int64)
        return none, none, [np.zeros(0) for _ in range(3)]
    cell_state, cell_into = (np.concatenate([r[j] for r in rows]) for j in (0, 1))
    order = np.lexsort((cell_into, cell_state))
    cell_state, cell_into = cell_state[order], cell_into[order]
    K = int(tally.cluster.max()) + 1
    trials = sp.csr_array((n, (state, prompt)), shape=(chain.n_states, K))
    cell = np.searchsorted(cell_state * c + cell_into, i * c + B)
    events = sp.csr_array((x, (cell, k)), shape=(len(cell_state), K))
    ends = [np.zeros(len(cell_state)) for _ in range(3)]
    for a in range(0, len(cell_state), max(BLOCK // K, 1)):
        rows = slice(a, a + max(BLOCK // K, 1))
        found = spread(events[rows].toarray(), trials[cell_state[rows]].toarray())
        ends[0][rows] = found.value
        ends[1][rows], ends[2][rows] = found.ends(1 - (1 - level) / len(cell_state))
    return cell_state, cell_into, ends
