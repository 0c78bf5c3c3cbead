"""Counts of all prompts together, in memory or on disk: what a chain and its intervals need of very many rollouts.

`Counts` hold a number for every prompt and transition, which for a billion tokens is more than a machine has memory
for. Pooled counts hold one for every transition, the outcomes of every prompt, and for every state the sums over
prompts from which the intervals follow. The chain estimated from them is the one estimated from `Counts`; what they
cannot do is forget a prompt: no selection, no resampling, no addition.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import CODES, OUTCOMES
from .chain import Chain, Evidence
from .checks import index_dtype
from .estimate import PRIOR, smoothed, stacked
from .states import KGram
from .tally import Tally

__all__ = ["COLUMNS", "GRANTED", "Pooled", "read_pooled", "write_tally"]

GRANTED = 1 << 30  # bytes
LABELLED = 1 << 20  # states up to which a chain is given their grams as labels
COLUMNS = {
    "contexts": (np.int64, 0),
    "indptr": (np.int64, 0),
    "symbols": (np.int32, 0),
    "counts": (np.int64, 0),
    "through": (np.float64, 0),
    "prompts": (np.float64, 1 + len(OUTCOMES)),
    "deff": (np.float64, len(OUTCOMES)),
}
VERSION = 1
_TALLY = ("prompt_id", "category", "prefill", "outcomes")


@dataclass(frozen=True, eq=False)
class Pooled:
    """Transition counts of grams, all prompts together; large arrays may be maps of files.

    Parameters
    ----------
    order : int
        Tokens of a gram.
    base : int
        Number of token ids plus one. A gram is numbered in this base, oldest first: token + 1, 0 before the start.
    tally : Tally
        Rollouts by prompt, category, prefill and outcome.
    entries : dict of int to (int array, int array)
        By prefill: numbers of the states in which sampling began (-1 - code for an outcome reached without sampling),
        and how many rollouts did.
    contexts : int array, shape (S,)
        Numbers of the visited states, rising.
    indptr, symbols, counts : int arrays, shape (S + 1,), (m,), (m,)
        Row i of the counts lies at ``indptr[i]:indptr[i + 1]``: the next token, or base - 1 + outcome code, rising, and
        how often it came.
    through, prompts, deff : arrays, shape (S,), (S, 5), (S, 4)
        As in `Evidence`.
    skipped : dict of str to str
        Damaged shards that were left out on request.
    note : str
        What the source says of itself, such as an unfinished run.

    Examples
    --------
    >>> asked = {"prompt_id": [0, 1], "outcome": ["harm", "refusal"], "hit": 1}
    >>> path = ms.write_rollouts(ms.Rollouts.of([[5, 9], [5, 2]], **asked), "run.parquet")
    >>> table = ms.chains.pool(path)
    >>> table
    <Pooled KGram(1): 2 rollouts (1 harm + 1 refusal + 0 benign + 0 truncated) in 2 groups,
        prefill 0; 2 states, 4 transitions>
    >>> table.chain()
    <Chain 6 states, homogeneous, 7 transitions; outcomes harm (1), refusal (1), benign (1),
        truncated (1); start: state 0 ((-1,))>
    """

    order: int
    base: int
    tally: Tally
    entries: dict[int, tuple[NDArray, NDArray]]
    contexts: NDArray
    indptr: NDArray
    symbols: NDArray
    counts: NDArray
    through: NDArray
    prompts: NDArray
    deff: NDArray
    skipped: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def kind(self) -> str:
        """The name of the state map."""
        return f"KGram({self.order})"

    @property
    def rollouts(self) -> float:
        """Number of rollouts."""
        return float(self.tally.outcomes.sum())

    @property
    def transitions(self) -> int:
        """Number of counted transitions."""
        return int(self.counts.sum(dtype=np.int64))

    @property
    def prefills(self) -> tuple[int, ...]:
        """The measured prefill lengths, sorted."""
        return tuple(sorted(self.entries))

    def labels(self, states: Any = slice(None)) -> list[tuple[int, ...]]:
        """Grams of some states."""
        return KGram(self.order).labels_of(np.atleast_1d(np.array(self.contexts[states])), self.base)

    def index(self, gram: Sequence[int]) -> int:
        """Number of the state with this gram.

        Raises
        ------
        InputError
            If it was never visited.
        """
        number = 0
        for token in gram:
            number = number * self.base + int(token) + 1
        fits = len(gram) == self.order and all(-1 <= int(token) < self.base - 1 for token in gram)
        i = int(np.searchsorted(self.contexts, number)) if fits else len(self.contexts)
        if i == len(self.contexts) or self.contexts[i] != number:
            raise InputError(
                f"The gram {tuple(gram)} was never visited.",
                cause=f"{len(self.contexts):,} grams of {self.order} tokens were.",
                next="Give tokens, oldest first, with -1 before the start of the answer.",
            )
        return i

    def matrix(self, memory: int = GRANTED) -> sp.csr_array:
        """Counts of the next token, shape (S, base + 3): tokens, then harm, refusal, benign, truncated.

        Raises
        ------
        InputError
            If it takes more memory than was granted, or the table is damaged.
        """
        self._fits("The matrix", 16 * len(self.symbols) + 8 * len(self.indptr), memory)
        self._sound()
        parts = np.array(self.counts), np.array(self.symbols), np.array(self.indptr)
        return sp.csr_array(parts, shape=(len(self.contexts), self.base + 3))

    def chain(self, method: str = "mle", prior: float | None = None, *, memory: int = GRANTED) -> Chain:
        """The chain, as `estimate` makes it of `Counts`.

        Parameters
        ----------
        method : {"mle", "dirichlet"}
        prior : float, optional
            As in `estimate`.
        memory : int
            Bytes that making it may take.

        Returns
        -------
        Chain
            The visited states, then harm, refusal, benign and truncated. More than a million states are numbered, not
            labelled: `labels` and `index` translate.

        Raises
        ------
        InputError
            If there is no such method, everything was truncated, it takes more memory than was granted, or the table is
            damaged.
        """
        if method not in ("mle", "dirichlet"):
            raise InputError(
                f"Pooled counts make no chain by the method {method!r}.",
                cause="They hold no class masses.",
                next='Use "mle" or "dirichlet", or count(...) and estimate(...).',
            )
        if self.tally.outcomes[:, : CODES["truncated"]].sum() == 0:
            raise InputError(
                f"All {self.rollouts:g} rollouts were truncated.",
                cause="None reached harm, refusal or its end within the token limit.",
                next="Sample with a larger max_tokens.",
            )
        S, m = len(self.contexts), len(self.symbols)
        self._fits("The chain", 96 * m + 480 * S, memory)
        self._sound()
        inner, outer = self._split()
        visits, added = np.asarray(inner.sum(axis=1)).ravel() + outer.sum(axis=1), 0.0
        arrived = outer.sum(axis=0)
        if method == "dirichlet":
            added = PRIOR if prior is None else float(prior)
            inner, outer = smoothed(inner, outer, added)
        P = stacked(inner, outer)
        entry = {k: self._law(k) for k in self.prefills}
        for began, many in self.entries.values():
            np.add.at(arrived, -1 - began[began < 0], many[began < 0])
        none = np.zeros((len(OUTCOMES), 1 + len(OUTCOMES)))
        t = self.tally
        evidence = Evidence(
            np.concatenate([visits, arrived]),
            *(t.prompt_id, t.category, t.prefill, t.outcomes),
            np.concatenate([self.through, arrived]),
            np.concatenate([self.prompts, none]),
            np.concatenate([self.deff, none[:, 1:]]),
            added,
        )
        labels = (*self.labels(), *OUTCOMES) if S <= LABELLED else None
        outcomes = {name: S + code for name, code in CODES.items()}
        return Chain(P, outcomes, entry.get(0), labels, evidence=evidence, entry=entry)

    def _split(self) -> tuple[sp.csr_array, NDArray]:
        """Counts between states, shape (S, S), and into the outcomes, shape (S, 4)."""
        S = len(self.contexts)
        row = np.repeat(np.arange(S, dtype=index_dtype(S)), np.diff(self.indptr))
        symbols, counts = np.asarray(self.symbols), np.asarray(self.counts, dtype=np.float64)
        out = symbols >= self.base - 1
        outer = np.zeros((S, len(OUTCOMES)))
        outer[row[out], symbols[out] - self.base + 1] = counts[out]
        keep = self.base ** max(self.order - 1, 0)
        ahead = (self.contexts[row[~out]] % keep * self.base + symbols[~out] + 1) * (self.order > 0)
        target = self._places(ahead)
        inner = sp.csr_array(sp.coo_array((counts[~out], (row[~out], target)), shape=(S, S)))
        inner.sum_duplicates()
        return inner, outer

    def _law(self, prefill: int) -> NDArray[np.float64]:
        began, many = self.entries[prefill]
        S = len(self.contexts)
        law = np.zeros(S + len(OUTCOMES))
        place = np.where(began < 0, S - 1 - began, 0)
        place[began >= 0] = self._places(began[began >= 0])
        law[place] = many
        return law / law.sum()

    def _places(self, grams: NDArray) -> NDArray:
        """Numbers of the states with these grams."""
        found = np.searchsorted(self.contexts, grams)
        if (np.asarray(self.contexts)[np.minimum(found, len(self.contexts) - 1)] != grams).any():
            raise _contradiction("a gram that was reached has no row")
        return found

    def _sound(self) -> None:
        """Read the columns once: what was changed on the disk would else become other numbers."""
        contexts, rows, symbols, counts = map(np.asarray, (self.contexts, self.indptr, self.symbols, self.counts))
        rising = len(contexts) > 0 and (contexts[1:] > contexts[:-1]).all()
        for whole, what in (
            (rising and contexts[0] >= 0 and contexts[-1] < self.base**self.order, "its grams are none, or not sorted"),
            ((rows[1:] > rows[:-1]).all(), "a state has no transition"),
            (symbols.min(initial=0) >= 0 and symbols.max(initial=0) < self.base + len(OUTCOMES) - 1, "no such token"),
            (counts.min(initial=1) > 0, "something happened less than once"),
        ):
            if not whole:
                raise _contradiction(what)

    def _fits(self, what: str, needed: int, memory: int) -> None:
        if needed > memory:
            raise InputError(
                f"{what} of {len(self.contexts):,} states and {len(self.symbols):,} transitions takes about "
                f"{needed / 2**20:,.0f} MB.",
                cause=f"{memory / 2**20:,.0f} MB were granted.",
                next="Grant more (memory=bytes), pool shorter grams, or read rows of the table: it is sorted.",
                partial=self,
            )

    def __repr__(self) -> str:
        return (
            f"<Pooled {self.kind}: {self.tally.told} in {len(self.tally)} groups, prefill "
            f"{', '.join(map(str, self.prefills))}; {len(self.contexts):,} states, {self.transitions:,} transitions>"
        )


def _contradiction(cause: str) -> InputError:
    return InputError("The table of pooled counts is damaged.", cause=cause, next="Pool the rollouts again.")


def write_tally(folder: Path, facts: dict[str, Any], tally: Tally, entries: dict[int, tuple[NDArray, NDArray]]) -> None:
    """The small part of pooled counts on disk: everything but the columns."""
    arrays: dict[str, Any] = {name: getattr(tally, name) for name in _TALLY}
    for k, (began, many) in entries.items():
        arrays |= {f"entry_{k}": began, f"entry_{k}_count": many}
    meta = json.dumps({**facts, "prefills": sorted(entries), "version": VERSION})
    np.savez(folder / "tally.npz", meta=np.array(meta), **arrays)


def read_pooled(path: str | os.PathLike[str]) -> Pooled:
    """Open pooled counts that were written to a folder; their large arrays are mapped, not read.

    Raises
    ------
    InputError
        If it is no such folder, or its files contradict each other.

    Examples
    --------
    >>> asked = {"prompt_id": [0, 1], "outcome": ["harm", "refusal"], "hit": 1}
    >>> path = ms.write_rollouts(ms.Rollouts.of([[5, 9], [5, 2]], **asked), "run.parquet")
    >>> table = ms.chains.pool(path, out="pooled")
    >>> ms.chains.read_pooled("pooled")
    <Pooled KGram(1): 2 rollouts (1 harm + 1 refusal + 0 benign + 0 truncated) in 2 groups,
        prefill 0; 2 states, 4 transitions>
    """
    folder = Path(path)
    try:
        with open(folder / "tally.npz", "rb") as stream, np.load(stream, allow_pickle=False) as file:
            small = {key: file[key] for key in file.files}
        meta = json.loads(str(small["meta"][()]))
        if meta["version"] != VERSION:
            raise ValueError(f"format version {meta['version']}, this reader knows {VERSION}")
        entries = {int(k): (small[f"entry_{k}"], small[f"entry_{k}_count"]) for k in meta["prefills"]}
        found = {name: _mapped(folder / f"{name}.npy", kind, width) for name, (kind, width) in COLUMNS.items()}
        _agree(found)
        told = {key: meta[key] for key in ("order", "base", "skipped", "note")}
        pooled = Pooled(tally=Tally(*(small[k] for k in _TALLY)), entries=entries, **found, **told)
        _check_told(pooled)
        return pooled
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no pooled counts.",
            cause=f"There is no {Path(str(error.filename)).name} in it.",
            next="Give the folder that pool(..., out=folder) wrote.",
        ) from None
    except Exception as error:  # a damaged file can fail anywhere in the decoders, and with any exception
        raise InputError(
            f"{folder} holds damaged pooled counts.", cause=str(error), next="Pool the rollouts again."
        ) from None


def _mapped(path: Path, kind: Any, width: int) -> NDArray:
    with open(path, "rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path.name} is no array of this format")
        shape, fortran, found = np.lib.format.read_array_header_1_0(file)
        at = file.tell()
    if found != np.dtype(kind) or fortran or shape[1:] != ((width,) if width else ()):
        raise ValueError(f"{path.name} holds {found} of shape {shape}")
    if path.stat().st_size != at + int(np.prod(shape)) * found.itemsize:
        raise ValueError(f"{path.name} is cut short")
    return np.memmap(path, found, "r", at, shape) if shape[0] else np.zeros(shape, found)


def _agree(found: dict[str, NDArray]) -> None:
    S = len(found["contexts"])
    for name in ("through", "prompts", "deff"):
        if len(found[name]) != S:
            raise ValueError(f"{name} has {len(found[name])} rows for {S} states")
    indptr = found["indptr"]
    ends = len(indptr) == S + 1 and indptr[0] == 0 and indptr[-1] == len(found["symbols"]) == len(found["counts"])
    if not ends:
        raise ValueError("the rows do not cover the transitions")


def _check_told(pooled: Pooled) -> None:
    """Raise a ValueError where what is not in the columns makes no sense."""
    order, base, tally = pooled.order, pooled.base, pooled.tally
    if type(order) is not int or type(base) is not int or order < 0 or base < 1 or order * base.bit_length() > 2**10:
        raise ValueError(f"grams of {order!r} tokens in base {base!r}")
    if (
        base**order > 2**62
        or base > 2**31 - len(OUTCOMES)
        or not isinstance(pooled.note, str)
        or not isinstance(pooled.skipped, dict)
    ):
        raise ValueError("its words make no sense")
    rows = len(tally)
    if any(getattr(tally, name).shape != (rows, *((len(OUTCOMES),) if name == "outcomes" else ())) for name in _TALLY):
        raise ValueError("the tally has rows of different lengths")
    if not ((tally.outcomes >= 0) & (tally.outcomes < 2**53)).all():
        raise ValueError("the tally holds what is no number of rollouts")
    for began, many in pooled.entries.values():
        if began.shape != many.shape or began.ndim != 1 or began.dtype != np.int64 or many.dtype.kind not in "if":
            raise ValueError("the entries are no pairs of numbers")
        if not ((began >= -len(OUTCOMES)).all() and np.isfinite(many).all() and (many > 0).all() and len(many)):
            raise ValueError("the entries hold what is no state or no number of rollouts")
