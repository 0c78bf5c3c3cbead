"""lump: from a large chain to a readable one, with the error that this adds to every probability of harm.

Merging states into classes gives a Markov chain again only if all states of a class go into every other class with the
same probability (strong lumpability: J. G. Kemeny and J. L. Snell, Finite Markov Chains (1960), theorem 6.3.2).
Otherwise the states of a class are averaged, here by how often they are visited from the start. With g the
probabilities of the lumped chain, read back at every state of a class, and h those of the chain,

    g - h = N d,    d_i = g(class of i) - sum_j P_ij g(class of j),

N the expected visits of the chain before the hit: exact, whatever the classes are. Averaged by visits, d sums to 0 over
every class, so **g = h at the start, always**: agreement there says nothing about the classes. Other starts, the time
of a hit and what an intervention does are what lumping changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..arithmetic import widened
from ..bound import Bound, encode
from ..chains import Chain
from ..chains.tally import Evidence
from ..errors import InputError
from ..hitting import graph, hitting_probability
from ..hitting.core import Walk, occupation, walk
from ..hitting.rates import rates_of
from .lump_classes import METHODS, find_classes, lump_loss, membership, read_classes

__all__ = ["Lumped", "lump"]


@dataclass(frozen=True, eq=False)
class Lumped:
    """A chain of classes, and how far it is from the chain that it stands for.

    Parameters
    ----------
    chain : Chain
        Its states are the classes. Of an estimated chain it keeps as much evidence as can be kept: the interval at the
        start is that of the rollouts, elsewhere no class is worth more trials than its best state.
    classes : int array, shape (n,)
        Class of every state of the original chain, an index into ``chain.states``.
    harm : Bound
        Hitting probability of every class, shape (c,), layered (L + 1, c), with the width "lumping": it reaches the
        probability of every state in the class. ``at_start`` is there if the chain has a start.
    error : Bound
        ``|g - h|`` of every state, shape (n,), layered (L + 1, n): what lumping does to it. Of an estimated chain, what
        lumping does to the estimate.
    drift : array, shape (n,), layered (L, n)
        How much harm one step of the state gains or loses against its class: d above. ``g - h`` is its sum over the
        visits.
    limit : array, shape (c,), layered (L + 1, c)
        What the error in a class cannot exceed by the oscillation of h within classes: the sum over the visits of the
        lumped chain of the largest difference of h in the class visited.
    loss : float
        Kullback-Leibler divergence of the next class given the state from the next class given the class, in nats,
        summed over the visits of one answer; 0 if lumping is exact on what is visited.
    info : dict
        target, method, weights.

    Examples
    --------
    >>> found: ms.evidence.Lumped = ms.evidence.lump(ms.toy.shallow(3), n=2)
    >>> found.chain
    <Chain 4 states, homogeneous, 9 transitions; outcomes harm (1), refusal (1); start: state 1
        ('position 0 and 2 more')>
    >>> f"{found.worst:.3f}"
    '0.278'
    """

    chain: Chain
    classes: NDArray
    harm: Bound
    error: Bound
    drift: NDArray
    limit: NDArray
    loss: float
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest error of any state, by its upper end."""
        return float(np.max(self.error.upper))

    def __str__(self) -> str:
        size = np.bincount(self.classes, minlength=self.chain.n_states)
        first = (lambda x: np.asarray(x)[0]) if self.chain.is_layered else np.asarray
        ends = [first(getattr(self.harm, s)) for s in ("value", "lower", "upper")]
        error = np.zeros(len(size))
        np.maximum.at(error, self.classes, first(self.error.value))
        rows = [["class", "states", f"P({self.info['target']})", "largest error"]]
        for i, label in enumerate(self.chain.states):
            span = f"{ends[0][i]:.3g} [{ends[1][i]:.3g}, {ends[2][i]:.3g}]"
            rows.append([str(label), str(size[i]), span, f"{error[i]:.2g}"])
        widths = [max(len(row[j]) for row in rows) for j in range(4)]
        head = (
            f"{len(self.classes)} states in {len(size)} classes ({self.info['method']}), largest error {self.worst:.2g}"
        )
        lines = [head] + ["  " + "  ".join(c.rjust(s) for c, s in zip(row, widths)) for row in rows]
        if self.harm.start is not None:
            lines.append(f"  at start: {self.harm.start}")
            lines.append("  the start value is that of the whole chain whatever the classes are: no evidence for them")
        return "\n".join(lines)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: states, classes, harm, error, limit, loss, info."""
        names = ("classes", "harm", "error", "limit", "loss", "info")
        return {"states": encode(list(self.chain.states))} | {name: encode(getattr(self, name)) for name in names}


def lump(
    chain: Chain,
    classes: Any = None,
    *,
    n: int | None = None,
    method: str = "spectral",
    target: Any = "harm",
    level: float = 0.95,
) -> Lumped:
    """Merge the states of a chain into classes.

    Parameters
    ----------
    chain : Chain
    classes : sequence of n names, dict of name to states, or callable from label to name, optional
        Which states belong together. With a dict or a callable, outcome states form a class per outcome.
    n : int, optional
        Instead: look for so many classes, besides those of the outcomes.
    method : {"spectral", "kl", "labels"}
        How to look for them. "spectral": alike in the probability of every outcome and in the time to the end (the
        directions that decay last), merged pair by pair at the least loss of harm, visits as weights. "kl": from these
        on, every state moves to the class whose next step is most like its own, which lowers `loss` but looks at no
        outcome in particular: its errors of harm can be larger.
        "labels": by the labels alone: as much of them as leaves n classes at most (of a tuple the last entries, a
        shorter memory; of a text its first parts).
    target : as in `hitting_probability`
        What the error is about.
    level : float
        Confidence level for an estimated chain.

    Returns
    -------
    Lumped

    Raises
    ------
    InputError
        If a class is empty, a state is in no class, or a class mixes outcomes (or the target) with other states;
        ``partial`` has the classes cut apart where they mix.

    Notes
    -----
    The rows of a class are averaged by the expected visits from the start (evenly where none is visited, or without a
    start). For given classes this is the best chain in the sense of Kullback and Leibler: no other rows leave less of
    ``loss`` (K. Deng, P. G. Mehta, S. P. Meyn, IEEE Trans. Automatic Control 56 (2011) 2793).

    Examples
    --------
    Three aligned positions in one class: behind two of them harm is twice what the class says.

    >>> ms.evidence.lump(ms.toy.shallow(3), n=2)
    6 states in 4 classes (spectral), largest error 0.28
                      class  states               P(harm)  largest error
                       tail       1        0.8 [0.8, 0.8]              0
      position 0 and 2 more       3  0.284 [0.284, 0.562]           0.28
                       harm       1              1 [1, 1]              0
                    refusal       1              0 [0, 0]              0
      at start: P(harm) = 0.284468   proven [0.284468, 0.284468]
          because: lumping ..., rounding ...; sampling, judge, model, truncation not assessed
      the start value is that of the whole chain whatever the classes are: no evidence for them
    """
    w = walk(chain, target)
    if (classes is None) == (n is None) or method not in METHODS:
        raise InputError(
            f"lump was given {'no classes' if classes is None else 'classes'}, n={n!r}, method={method!r}.",
            cause=f"Either the classes are known, or n of them are looked for by {', '.join(METHODS)}.",
            next="Pass classes=..., or n=10.",
        )
    h = hitting_probability(chain, target, level=level)
    visits, closed = visits_of(w)
    if n is not None:
        codes, names = find_classes(w, n, method, np.asarray(h.value), visits, closed)
    else:
        codes, names = read_classes(chain, classes, w.hit, closed)
        method = "given classes"
    small, P_S = _merged(chain, codes, names, visits)
    aim = list(w.outcomes) if w.outcomes is not None else _on(codes, w.hit, len(names))
    g = hitting_probability(small, aim, level=level)
    difference, room = np.asarray(g.value)[..., codes] - h.value, _rounding(g)[..., codes] + _rounding(h)
    error = Bound(
        np.abs(difference),
        np.maximum(np.abs(difference) - room, 0.0),
        np.abs(difference) + room,
        1.0,
        {"rounding": room},
        None,
        {"name": f"error of P({w.name})"},
    )
    info = {
        "target": w.name,
        "method": method,
        "weights": "visits from the start" if chain.start is not None else "even",
    }
    loss = lump_loss(P_S, codes, visits, w.moving & ~closed)
    drift, limit = _drift(w, P_S, codes, np.asarray(g.value)), _limit(small, aim, codes, np.asarray(h.value))
    return Lumped(small, codes, _harm(g, h, difference, room, codes), error, drift, limit, loss, info)


def visits_of(w: Walk) -> tuple[NDArray, NDArray]:
    """Expected visits before the hit, shape (layers or 1, n), ones without a start; and the states of closed classes.

    A state of a closed class is never left for good: it counts as arrived at.
    """
    chain = w.chain
    if chain.is_layered:
        closed = w.hit.copy()
        if chain.start is None:
            return np.ones((chain.n_layers, chain.n_states)), closed
        return occupation(chain, chain.start, w.moving, 1).Z[:-1, :, 0], closed
    W = rates_of(chain).W
    keep = sp.dia_array((np.where(w.hit, 0.0, 1.0)[None], [0]), shape=W.shape)
    cut = sp.csr_array(keep @ W)
    cut.eliminate_zeros()
    closed = np.asarray(graph.closed_classes(cut), dtype=bool)
    if chain.start is None:
        return np.ones((1, chain.n_states)), closed
    return occupation(chain, chain.start, ~closed, 1).Z[None, :, 0], closed


def _merged(chain: Chain, codes: NDArray, names: list[Any], visits: NDArray) -> tuple[Chain, list[sp.csr_array]]:
    """The lumped chain, and by layer the probabilities to go from every state into every class, shape (n, c)."""
    c = len(names)
    S = membership(codes, c)
    into = [sp.csr_array(P @ S) for P in chain.layers]
    rows = []
    for t, R in enumerate(into):
        share = np.asarray(visits[t], dtype=np.float64)
        total, size = np.bincount(codes, share, c), np.bincount(codes, minlength=c)
        share = np.where(total[codes] > 0, share / np.where(total > 0, total, 1.0)[codes], 1.0 / size[codes])
        mean = sp.csr_array((share, codes, np.arange(len(codes) + 1)), shape=S.shape)
        rows.append(sp.csr_array(mean.T @ R))
    outcomes = {name: np.unique(codes[index]) for name, index in chain.outcomes.items()}
    start = None if chain.start is None else np.bincount(codes, chain.start, c)
    if chain.is_layered:
        return Chain.layered(rows, outcomes, start, names), into
    entry = {k: np.bincount(codes, law, c) for k, law in chain.entry.items()}
    evidence = None if chain.evidence is None else _evidence(chain.evidence, codes, c)
    return Chain(rows[0], outcomes, start, names, entry=entry, evidence=evidence), into


def _evidence(known: Evidence, codes: NDArray, c: int) -> Evidence:
    """What is left to know of classes: which rollouts passed through two states of one is forgotten, so a class counts
    as many rollouts and prompts as its best state, and every prompt as one trial."""
    through, prompts = np.zeros(c), np.zeros((c, known.prompts.shape[1]))
    np.maximum.at(through, codes, known.through)
    np.maximum.at(prompts, codes, known.prompts)
    tally = (known.prompt_id, known.category, known.prefill, known.outcomes)
    return Evidence(np.bincount(codes, known.visits, c), *tally, through, prompts)


def _on(codes: NDArray, hit: NDArray, c: int) -> NDArray:
    mask = np.zeros(c, dtype=bool)
    mask[codes[hit]] = True
    return mask


def _rounding(b: Bound) -> NDArray:
    """How far a value may be from the exact one; an enclosure of half-width r contains both, 2 r apart at most."""
    r = b.reasons["rounding"]
    return np.zeros(b.shape) if r is None else 2 * np.broadcast_to(np.asarray(r), b.shape)


def _harm(g: Bound, h: Bound, difference: NDArray, room: NDArray, codes: NDArray) -> Bound:
    """The harm of every class, wide enough for each of its states."""
    down, up = np.zeros(g.shape), np.zeros(g.shape)
    for side, d in ((down, difference), (up, -difference)):
        reach = np.maximum(d, 0.0) + room
        np.maximum.at(side.T, codes, reach.T)
    wide = widened(g, least=0.0, most=1.0, lumping=(down, up))
    start = None
    if g.start is not None and h.start is not None:
        gap = abs(g.start.value - h.start.value) + float(_rounding(g.start) + _rounding(h.start))
        start = widened(g.start, least=0.0, most=1.0, lumping=gap)
    return replace(wide, start=start)


def _drift(w: Walk, into: list[sp.csr_array], codes: NDArray, g: NDArray) -> NDArray:
    if not w.chain.is_layered:
        return np.where(w.hit, 0.0, g[codes] - into[0] @ g)
    return np.stack([np.where(w.hit, 0.0, g[t][codes] - R @ g[t + 1]) for t, R in enumerate(into)])


def _limit(small: Chain, aim: Any, codes: NDArray, h: NDArray) -> NDArray:
    """Visits of the lumped chain times the oscillation of h in every class: |g - h| = |(g - mean h) + (mean h - h)|,
    and g - mean h sums over the visits what the class entered next can be from its mean."""
    c = small.n_states
    top, low = np.full((*h.shape[:-1], c), -np.inf), np.full((*h.shape[:-1], c), np.inf)
    np.maximum.at(top.T, codes, h.T)
    np.minimum.at(low.T, codes, h.T)
    swing = top - low
    s = walk(small, aim)
    if small.is_layered:
        for t in range(small.n_layers - 1, -1, -1):
            swing[t] += np.where(s.hit, 0.0, small.layers[t] @ swing[t + 1])
        return swing
    live = graph.reaching(rates_of(small).W, s.hit, s.moving) & s.moving
    inner = small.P[live][:, live]
    system = sp.csc_array(sp.eye_array(int(live.sum())) - inner)
    if live.any():
        from scipy.sparse.linalg import splu

        swing[live] = splu(system).solve(swing[live])
    return np.maximum(swing, 0.0)
