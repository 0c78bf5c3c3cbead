"""Chain: a stochastic matrix, or one matrix per position, with named outcomes and a start law.

A model that answers token by token is a Markov chain on whatever one chooses to remember of the answer so far. A
rollout ends in one of the *outcomes* (harm, refusal, ...), and P(harm) is the probability that the chain ever hits
the states of that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError
from ..rich import MOST, few, short, shown
from .checks import Numbered, as_indices, as_label, as_law, as_outcomes, as_states, freeze, shape_of
from .matrices import as_counts, as_csr, csr, divided, stochastic
from .stored_layers import StoredLayers
from .tally import Evidence

__all__ = ["Chain", "Evidence"]


@dataclass(frozen=True, eq=False, repr=False)
class Chain:
    """A Markov chain with named outcomes.

    Parameters
    ----------
    P : array or sparse array, shape (n, n)
        Transition probabilities; every state has a row, outcome states included. Rows sum to one within 1e-9, and an
        outcome row of zeros means absorbing. Dense, nested lists, or any scipy sparse format (duplicates are summed).
    outcomes : dict of str to int, ints, label(s) or bool array of shape (n,)
        Named disjoint sets of states.
    start : int, label or array of shape (n,), optional
        Start state or start law; integers are indices.
    states : sequence, optional
        One distinct hashable label per state; ``range(n)`` if not given.
    counts : Counts, optional
        What the chain was estimated from; `estimate` sets it, a file does not keep it.
    evidence : Evidence, optional
        The part of the counts that sampling intervals need; a file keeps it.
    entry : dict of int to law, optional
        State law after k forced tokens, where that was measured.
    integer_counts : csr array, shape (n, n), optional
        The exact counts behind `Chain.from_counts`, as given (an absorbing outcome row stays empty).
    n_layers : int
        0 for a homogeneous chain; `Chain.layered` sets it.

    Attributes
    ----------
    P : csr array, or tuple of csr arrays if layered (or `StoredLayers`: those of a file, read when asked for)
        float64, canonical, read-only. An absorbing outcome row holds a one on its diagonal.
    outcomes : dict of str to int array
        Sorted state indices by outcome.
    start : array of shape (n,) or None

    Raises
    ------
    InputError
        If anything above does not hold; the message names the state and the value.

    Notes
    -----
    The chain keeps read-only arrays of its own: what is written into P or start later does not change it. Row pointers
    and column indices are int32 wherever the number of non-zeros fits, else int64.

    Examples
    --------
    >>> chain = ms.Chain(
    ...     [[0.9, 0.05, 0.05], [0, 1, 0], [0, 0, 1]],
    ...     outcomes={"harm": 1, "refusal": 2},
    ...     start="speaking",
    ...     states=["speaking", "harm", "refusal"],
    ... )
    >>> chain
    <Chain 3 states, homogeneous, 5 transitions; outcomes harm (1), refusal (1); start: state 0
        ('speaking')>
    >>> print(ms.hitting_probability(chain, "harm").at_start)
    P(harm) = 0.5   proven [0.5, 0.5]
        because: rounding 7e-16; sampling, judge, lumping, model, truncation not assessed

    One matrix per position, here a model that is safe at the first token only; the mass left at the end is
    "truncated":

    >>> safe = [[0.5, 0.0, 0.5], [0, 1, 0], [0, 0, 1]]
    >>> unsafe = [[0.8, 0.2, 0.0], [0, 1, 0], [0, 0, 1]]
    >>> layered = ms.Chain.layered([safe, unsafe, unsafe], {"harm": 1, "refusal": 2}, start=0)
    >>> ends = {name: name for name in ("harm", "refusal", "truncated")}
    >>> np.round(ms.hitting_probability(layered, ends).at_start.value, 3)
    array([0.18, 0.5 , 0.32])
    """

    P: Any
    outcomes: Any
    start: Any = None
    states: Any = None
    counts: Any = field(default=None, kw_only=True)
    evidence: Evidence | None = field(default=None, kw_only=True)
    entry: dict[int, Any] = field(default_factory=dict, kw_only=True)
    integer_counts: Any = field(default=None, kw_only=True)
    n_layers: int = field(default=0, kw_only=True)

    def __post_init__(self):
        stored = self.P if isinstance(self.P, StoredLayers) else None
        layers = [] if stored else [self.P] if self.n_layers == 0 else list(self.P)
        names = ["P"] if self.n_layers == 0 else [f"layer {t}" for t in range(len(layers))]
        surveyed = [as_csr(P, what) for P, what in zip(layers, names)]
        n = stored.n if stored else shape_of(surveyed[0][0])[0]
        for (matrix, _), what in zip(surveyed, names):
            if matrix.shape != (n, n):
                raise InputError(
                    f"{what} has shape {matrix.shape}, layer 0 has shape {(n, n)}.",
                    cause="All layers share one set of states.",
                    next="Pad the layers to the same states.",
                )
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("states", as_states(self.states, n))
        put("outcomes", as_outcomes(self.outcomes, n, self._lookup, self._name))
        done = self.outcome_mask
        matrices = [stochastic(*found, done, self._name, what) for found, what in zip(surveyed, names)]
        whole = matrices[0] if self.n_layers == 0 and not stored else tuple(matrices)
        put("P", stored.checked(done, self._name) if stored else whole)
        put("start", as_law(self.start, n, self._lookup, self._name, "start"))
        laws = {int(k): as_law(v, n, self._lookup, self._name, f"entry[{k}]") for k, v in sorted(self.entry.items())}
        put("entry", laws)
        if self.integer_counts is not None:
            C = self.integer_counts
            put("integer_counts", csr(C.data, C.indices, C.indptr, shape_of(C)))

    @classmethod
    def layered(
        cls, layers: Sequence[Any], outcomes: Mapping[str, Any], start: Any = None, states: Sequence[Any] | None = None
    ) -> Chain:
        """A chain whose step t uses the matrix ``layers[t]``.

        Parameters
        ----------
        layers : sequence of L matrices, each of shape (n, n)
            All on the same states and outcomes. Every entry counts as given.
        outcomes, start, states
            As for `Chain`; the start lives in layer 0.

        Notes
        -----
        Mass that is in no outcome after the last layer is the outcome "truncated"; it needs no state of its own.
        Answers about a layered chain have shape (L + 1, n).
        """
        blocks = list(layers) if isinstance(layers, (list, tuple)) or np.ndim(layers) == 3 else [layers]
        if not blocks:
            raise InputError("There are no layers.", cause="The list is empty.", next="Pass at least one matrix.")
        return cls(blocks, outcomes, start, states, n_layers=len(blocks))

    @classmethod
    def from_counts(
        cls, C: Any, outcomes: Mapping[str, Any], start: Any = None, states: Sequence[Any] | None = None
    ) -> Chain:
        """A chain from integer transition counts, which are kept so that it can be solved in rational arithmetic.

        Parameters
        ----------
        C : array or sparse array, shape (n, n)
            Non-negative integers; diagonal counts belong to the row total. An outcome row without counts is absorbing.
        outcomes, start, states
            As for `Chain`.

        Raises
        ------
        InputError
            If an entry is negative or not an integer, or a state that is no outcome has no counts.
        """
        matrix = as_counts(C)
        P = divided(matrix)
        try:
            return cls(P, outcomes, start, states, integer_counts=matrix)
        except InputError as error:
            if "sums to 0" not in error.fact:
                raise
            raise InputError(
                error.fact.replace("in P sums to 0", "has no counts"),
                cause="Only an outcome state may be without counts; it is absorbing then.",
                next="Count at least one transition out of this state, drop it, or name it as an outcome.",
            ) from None

    @property
    def n_states(self) -> int:
        """Number of states, outcome states included."""
        return len(self.states)

    @property
    def is_layered(self) -> bool:
        """Whether there is one matrix per position."""
        return self.n_layers > 0

    @property
    def layers(self) -> Sequence[sp.csr_array]:
        """The matrices: one if homogeneous, `n_layers` if layered."""
        return self.P if self.is_layered else (self.P,)

    @cached_property
    def _lookup(self) -> Mapping[Any, int]:
        if isinstance(self.states, range):
            return Numbered(len(self.states))
        return {label: i for i, label in enumerate(self.states)}

    def _name(self, i: int) -> str:
        return f"state {i}" if isinstance(self.states, range) else f"state {i} ({self.states[i]!r})"

    @cached_property
    def outcome_mask(self) -> NDArray:
        """True on every outcome state, shape (n,)."""
        mask = np.zeros(self.n_states, dtype=bool)
        for index in self.outcomes.values():
            mask[index] = True
        return freeze(mask)

    def index(self, label: Any) -> int:
        """Index of the state with this label.

        Raises
        ------
        InputError
            If no state has the label.
        """
        return as_label(label, self._lookup, "index")

    def mask(self, target: Any) -> NDArray:
        """States of a target, shape (n,), bool.

        Parameters
        ----------
        target : str, label, int, collection of these, or bool array of shape (n,)
            An outcome name first, then a label; integers are always indices. On a layered chain "truncated" is always
            known: without a state of that name the mask is empty, since only mass left after the last layer is
            truncated.

        Raises
        ------
        InputError
            If the target names no outcome and no state, an index is out of range, or a mask has the wrong length.
        """
        mask = np.zeros(self.n_states, dtype=bool)
        if isinstance(target, str) and target in self.outcomes:
            mask[self.outcomes[target]] = True
        elif isinstance(target, str) and target not in self._lookup:
            if not (self.is_layered and target == "truncated"):
                raise InputError(
                    f"The target {target!r} is neither an outcome nor a state of this chain.",
                    cause=f"Its outcomes are {', '.join(map(repr, self.outcomes))}.",
                    next="Use one of these names, a state label, indices or a mask.",
                )
        elif isinstance(target, (list, tuple, set, frozenset)) and any(_is_outcome(x, self.outcomes) for x in target):
            for x in target:
                mask |= self.mask(x)
        else:
            mask[as_indices(target, self.n_states, self._lookup, "target")] = True
        return mask

    def equals(self, other: Chain) -> bool:
        """Whether both chains have exactly the same numbers, names and evidence (`counts` is not compared)."""
        return _content(self).keys() == _content(other).keys() and all(
            _same(a, b) for a, b in zip(_content(self).values(), _content(other).values())
        )

    def __repr__(self) -> str:
        kind = f"{self.n_layers} layers" if self.is_layered else "homogeneous"
        size = ", ".join(f"{name} ({len(index)})" for name, index in self.outcomes.items())
        arrows = self.P.nnz if isinstance(self.P, StoredLayers) else sum(m.nnz for m in self.layers)
        if self.start is None:
            start = "none"
        else:
            where = np.flatnonzero(self.start)
            start = self._name(int(where[0])) if len(where) == 1 else f"a law over {len(where)} states"
        return f"<Chain {self.n_states} states, {kind}, {arrows} transitions; outcomes {size}; start: {start}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: outcomes and start, and the matrix of a chain of a few states."""
        kind = f"{self.n_layers} layers" if self.is_layered else "homogeneous"
        names, more = few(len(self.outcomes))
        ends = [f"{short(k)} ({len(self.outcomes[k]):,})" for k in list(self.outcomes)[: len(names)]]
        notes = [f"outcomes (states): {', '.join([*ends, more] if more else ends)}", self._start_in_words()]
        title = f"Chain of {self.n_states:,} states, {kind}"
        if self.is_layered or self.n_states > MOST:
            arrows = self.P.nnz if isinstance(self.P, StoredLayers) else sum(m.nnz for m in self.layers)
            return shown(title, notes=[f"{arrows:,} transitions", *notes])
        P = self.P.toarray()
        rows = [(short(label), *(f"{p:.3g}" if p else "" for p in row)) for label, row in zip(self.states, P)]
        return shown(title, rows, head=["from \\ to", *self.states], notes=notes, shades=P.tolist())

    def _start_in_words(self) -> str:
        if self.start is None:
            return "start: none"
        where = np.flatnonzero(self.start)
        likely = where[np.argsort(-self.start[where], kind="stable")][:MOST]
        law = ", ".join(f"{short(self.states[i])} {self.start[i]:.3g}" for i in likely.tolist())
        return f"start: {law}" + (f", and {len(where) - MOST:,} more" if len(where) > MOST else "")


def _is_outcome(x: Any, outcomes: Mapping[str, Any]) -> bool:
    return isinstance(x, str) and x in outcomes


def _content(chain: Chain) -> dict[str, Any]:
    parts: dict[str, Any] = {"states": tuple(chain.states), "layers": chain.n_layers, "start": chain.start}
    parts |= {f"outcome {k}": v for k, v in chain.outcomes.items()}
    parts |= {f"P {t}": m for t, m in enumerate(chain.layers)}
    parts |= {f"entry {k}": v for k, v in chain.entry.items()}
    parts["integers"] = chain.integer_counts
    if chain.evidence is not None:
        parts |= {f"evidence {k}": v for k, v in vars(chain.evidence).items()}
    return parts


def _same(a: Any, b: Any) -> bool:
    if sp.issparse(a) and sp.issparse(b):
        return a.shape == b.shape and all(
            np.array_equal(getattr(a, k), getattr(b, k)) for k in ("indptr", "indices", "data")
        )
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return type(a) is type(b) and a == b
