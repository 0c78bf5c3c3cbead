"""State maps: what a chain remembers of the answer so far.

A map's `walk` gives the state of every prefix of one answer, as a hashable label: ``walk(tokens, prefill)[i]`` is the
state after the first i tokens. It must be causal: the label of a prefix may depend on nothing behind it. A map may also
offer `label_at`, the same answer for many rollouts at once in flat arrays; `count` uses it where it exists. A map whose
states depend on who was asked, or on what was recorded with the tokens, offers `label_of` instead, which is told that
as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .tally import dense_codes

__all__ = ["Asked", "ByPrompt", "JudgedPrefix", "KGram", "Position", "Product", "StateMap", "label_at", "map_name"]

PAD = -1  # stands before the first token in a k-gram


@runtime_checkable
class StateMap(Protocol):
    """Anything that can say in which state an answer is after each of its tokens.

    Examples
    --------
    >>> class Tens(ms.chains.StateMap):  # how many tens of tokens have been said
    ...     def walk(self, tokens, prefill=0):
    ...         return [i // 10 for i in range(len(tokens) + 1)]
    >>> ms.count(ms.Rollouts.of([[5] * 24], prompt_id=0, outcome="harm", hit=23), states=Tens())
    <Counts Tens(): 1 rollouts (1 harm + 0 refusal + 0 benign + 0 truncated) of 1 prompts,
        prefill 0; 3 states, 24 transitions>
    """

    def walk(self, tokens: NDArray, prefill: int) -> Sequence[Hashable]:
        """Labels of the prefixes of length 0, 1, ..., len(tokens).

        Parameters
        ----------
        tokens : int array, shape (len,)
            Forced and sampled response tokens.
        prefill : int
            How many of them were forced.
        """
        ...


@dataclass(frozen=True)
class KGram:
    """The last k response tokens, oldest first, padded with -1 before the start: an order-k chain.

    Parameters
    ----------
    k : int
        Order, at least 0 (0: one single state).

    Examples
    --------
    >>> ms.KGram(2).walk([5, 9, 4])
    [(-1, -1), (-1, 5), (5, 9), (9, 4)]
    """

    k: int = 2

    def __post_init__(self):
        if isinstance(self.k, bool) or not isinstance(self.k, (int, np.integer)) or self.k < 0:
            raise InputError(f"KGram has k={self.k!r}.", cause="The order is a whole number.", next="Pass k >= 0.")
        object.__setattr__(self, "k", int(self.k))

    @property
    def last_tokens(self) -> int:
        """How many of the last tokens make the state; a map with this can be counted where tokens are sampled."""
        return self.k

    def walk(self, tokens: NDArray, prefill: int = 0) -> list[tuple[int, ...]]:
        """Labels of all prefixes; see `StateMap`."""
        padded = [PAD] * self.k + np.asarray(tokens).tolist()
        return [tuple(padded[i : i + self.k]) for i in range(len(padded) - self.k + 1)]

    def base(self, tokens: NDArray) -> int:
        """A number above every symbol of a gram: token + 1, or 0 before the start.

        Raises
        ------
        InputError
            If a token is negative.
        """
        if np.min(tokens, initial=0) < 0:
            raise InputError("A token id is negative.", cause="Token ids start at 0.", next="Check the rollouts.")
        return int(np.max(tokens, initial=-1)) + 2

    def symbols_at(self, tokens: NDArray, begin: NDArray, at: NDArray) -> list[NDArray]:
        """The k symbols of m prefixes, oldest first, each of shape (m,)."""
        shifted = np.concatenate([np.asarray(tokens, dtype=np.int64) + 1, [0]])  # 0 stands for PAD, also behind the end
        last = begin + at
        return [np.where(at >= lag, shifted[np.maximum(last - lag, -1)], 0) for lag in range(self.k, 0, -1)]

    def keys_at(self, tokens: NDArray, begin: NDArray, at: NDArray, base: int) -> NDArray:
        """One number for each of m prefixes, in the order of their labels; base**k must stay below 2**63."""
        keys = np.zeros(len(at), dtype=np.int64)
        for symbol in self.symbols_at(tokens, begin, at):
            keys *= base
            keys += symbol
        return keys

    def labels_of(self, keys: NDArray, base: int) -> list[tuple[int, ...]]:
        """The labels behind the numbers of `keys_at`."""
        columns = []
        for _ in range(self.k):
            keys, symbol = np.divmod(keys, base)
            columns.append((symbol - 1).tolist())
        return list(zip(*reversed(columns))) if columns else [()] * len(keys)

    def label_at(self, tokens: NDArray, begin: NDArray, at: NDArray) -> tuple[NDArray, list[tuple[int, ...]]]:
        """Codes and labels of m prefixes; see `label_at`."""
        self.base(tokens)
        grams = self.symbols_at(tokens, begin, at)
        codes, where = dense_codes(grams, len(at))
        table = [(gram[where] - 1).tolist() for gram in grams]
        return codes, list(zip(*table)) if table else [()] * len(where)

    def encode(self, tokens: NDArray, offsets: NDArray) -> tuple[NDArray, list[tuple[int, ...]]]:
        """Codes of every prefix of every answer.

        Parameters
        ----------
        tokens : int array, shape (total,)
            All answers, one behind the other.
        offsets : int array, shape (n + 1,)
            Answer r is ``tokens[offsets[r]:offsets[r + 1]]``.

        Returns
        -------
        codes : int array, shape (total + n,)
            ``codes[offsets[r] + r + i]`` is the state of answer r after i tokens.
        labels : list of tuple
            Label by code, sorted.
        """
        offsets = np.asarray(offsets, dtype=np.int64)
        lengths = np.diff(offsets) + 1
        begin = np.repeat(offsets[:-1], lengths)
        at = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.label_at(np.asarray(tokens), begin, at)


@dataclass(frozen=True)
class Position:
    """The number of tokens so far: a chain with one state per position.

    Examples
    --------
    >>> ms.Position().walk([5, 9, 4])
    [0, 1, 2, 3]
    """

    def walk(self, tokens: NDArray, prefill: int = 0) -> list[int]:
        """Labels of all prefixes; see `StateMap`."""
        return list(range(len(tokens) + 1))

    def label_at(self, tokens: NDArray, begin: NDArray, at: NDArray) -> tuple[NDArray, list[int]]:
        """Codes and labels of m prefixes; see `label_at`."""
        labels, codes = np.unique(at, return_inverse=True)
        return codes, labels.tolist()


@dataclass(frozen=True)
class JudgedPrefix:
    """What a causal judge says of the prefix: refusing, complying, ...

    Parameters
    ----------
    labeller : callable or mapping
        A function from the ids of a prefix (int array) to a hashable label, or a mapping from token id to class, where
        the label of a prefix is the class of its last token that has one. A function is called once per prefix, so
        counting costs the sum of all answer lengths in calls.
    initial : hashable
        With a mapping: the label of a prefix without any token of a class.

    Examples
    --------
    The state of an answer by the last telling word, "sorry" (11) or "but" (17), or by any function of the ids so far:

    >>> ms.JudgedPrefix({11: "refusing", 17: "leaking"}).walk([5, 11, 6, 17, 9])
    ['none', 'none', 'refusing', 'refusing', 'leaking', 'leaking']
    >>> ms.JudgedPrefix(lambda ids: "long" if len(ids) > 2 else "short").walk([5, 11, 6])
    ['short', 'short', 'short', 'long']
    """

    labeller: Callable[[NDArray], Hashable] | Mapping[int, Hashable]
    initial: Hashable = "none"

    def __post_init__(self):
        if isinstance(self.labeller, Mapping):
            object.__setattr__(self, "labeller", {int(k): v for k, v in sorted(self.labeller.items())})
        elif not callable(self.labeller):
            raise InputError(
                f"JudgedPrefix has the labeller {self.labeller!r}.",
                cause="It is neither a function nor a mapping from token id to class.",
                next="Pass one of these.",
            )

    def walk(self, tokens: NDArray, prefill: int = 0) -> list[Hashable]:
        """Labels of all prefixes; see `StateMap`."""
        tokens = np.asarray(tokens)
        if not isinstance(self.labeller, Mapping):
            return [self.labeller(tokens[:i]) for i in range(len(tokens) + 1)]
        labels = [self.initial]
        for token in tokens.tolist():
            labels.append(self.labeller.get(token, labels[-1]))
        return labels

    def label_at(self, tokens: NDArray, begin: NDArray, at: NDArray) -> tuple[NDArray, list[Hashable]] | None:
        """Codes and labels of m prefixes; see `label_at`. None for a function, which can only walk."""
        if not isinstance(self.labeller, Mapping):
            return None
        names = list(dict.fromkeys([self.initial, *self.labeller.values()]))
        ids = np.fromiter(self.labeller, dtype=np.int64, count=len(self.labeller))
        classes = np.array([names.index(v) for v in self.labeller.values()], dtype=np.int64)
        here = np.isin(tokens, ids)
        last = np.maximum.accumulate(np.where(here, np.arange(len(tokens)), -1))
        # The newest token with a class, if it belongs to this prefix and not to the answer stored before.
        newest = np.where(at > 0, np.concatenate([last, [-1]])[begin + at - 1], -1)
        raw = np.zeros(len(at), dtype=np.int64)
        found = newest >= begin
        raw[found] = classes[np.searchsorted(ids, np.asarray(tokens)[newest[found]])]
        used, codes = np.unique(raw, return_inverse=True)
        return codes, [names[i] for i in used]


@dataclass(frozen=True, eq=False)
class Asked:
    """Which prompt each of m prefixes answers, and what was recorded with it.

    Parameters
    ----------
    row : int array, shape (m,)
        Rollout of every prefix.
    prompt_id : int array, shape (n,)
        Prompt of every rollout.
    category : str array, shape (n,)
    columns : mapping from str to array, optional
        Columns of the rollouts, those with a number per token among them.
    first, length, prefill : int array, shape (n,), optional
        Where each rollout begins in such a column, its tokens, and how many of them were forced.
    total : int
        Entries of such a column.
    """

    row: NDArray
    prompt_id: NDArray
    category: NDArray
    columns: Mapping[str, Any] | None = None
    first: Any = None
    length: Any = None
    prefill: Any = None
    total: int = 0


@dataclass(frozen=True)
class ByPrompt:
    """What is known of the prompt, the same along the whole answer; for use in a `Product`.

    ``Product([ByPrompt(), KGram(2)])`` is one chain per category, side by side.

    Parameters
    ----------
    labels : "category" or mapping from prompt_id to label

    Examples
    --------
    >>> asked = {"prompt_id": [0, 1], "category": ["bio", "fraud"]}
    >>> rolls = ms.Rollouts.of([[5, 9], [6, 9]], **asked, outcome="harm", hit=1)
    >>> ms.count(rolls, states=ms.chains.Product([ms.chains.ByPrompt(), ms.KGram(1)])).states
    (('bio', (-1,)), ('bio', (5,)), ('fraud', (-1,)), ('fraud', (6,)))
    """

    labels: Any = "category"

    def __post_init__(self):
        if isinstance(self.labels, Mapping):
            object.__setattr__(self, "labels", {int(k): v for k, v in sorted(self.labels.items())})
        elif self.labels != "category":
            raise InputError(
                f"ByPrompt has the labels {self.labels!r}.",
                cause='They are "category", or a mapping from prompt_id to label.',
                next="Pass one of these.",
            )

    @property
    def kind(self) -> str:
        """Its name, for `map_name`."""
        return f"ByPrompt({len(self.labels)} prompts)" if isinstance(self.labels, Mapping) else "ByPrompt(category)"

    def walk(self, tokens: NDArray, prefill: int = 0) -> list[Hashable]:
        """Refuses: tokens do not tell the prompt."""
        raise _nobody_asked(self)

    def label_of(self, tokens: NDArray, begin: NDArray, at: NDArray, asked: Asked | None) -> tuple[NDArray, list[Any]]:
        """Codes and labels of m prefixes; see `label_at`."""
        if asked is None:
            raise _nobody_asked(self)
        if not isinstance(self.labels, Mapping):
            names, inverse = np.unique(np.asarray(asked.category, dtype=str), return_inverse=True)
            codes, found = inverse.reshape(-1)[asked.row], names.tolist()
        else:
            ids, inverse = np.unique(asked.prompt_id, return_inverse=True)
            lost = [i for i in ids.tolist() if i not in self.labels]
            if lost:
                raise InputError(
                    f"Prompt {lost[0]} has no label ({len(lost)} of {len(ids)} prompts are like this).",
                    cause="ByPrompt was given a mapping that lacks it.",
                    next="Add it to the mapping.",
                )
            found = list(dict.fromkeys(self.labels[i] for i in ids.tolist()))
            place = {label: i for i, label in enumerate(found)}
            codes = np.array([place[self.labels[i]] for i in ids.tolist()], np.int64)[inverse.reshape(-1)[asked.row]]
        used, codes = np.unique(codes, return_inverse=True)
        return codes.reshape(-1), [found[i] for i in used.tolist()]


def _nobody_asked(states: Any) -> InputError:
    return InputError(
        f"The states of {map_name(states)} depend on the prompt, and it was not said which prompts these are.",
        cause="They are looked up by tokens alone here.",
        next="Pass rollouts (count, check), or use a map of the tokens alone.",
    )


@dataclass(frozen=True)
class Product:
    """Several maps at once, e.g. position and judged prefix; the label is the tuple of theirs.

    Parameters
    ----------
    maps : sequence of StateMap

    Examples
    --------
    >>> ms.chains.Product([ms.Position(), ms.JudgedPrefix({11: "refusing"})]).walk([5, 11, 6])
    [(0, 'none'), (1, 'none'), (2, 'refusing'), (3, 'refusing')]
    """

    maps: Sequence[Any]

    def __post_init__(self):
        object.__setattr__(self, "maps", tuple(self.maps))

    def walk(self, tokens: NDArray, prefill: int = 0) -> list[tuple[Hashable, ...]]:
        """Labels of all prefixes; see `StateMap`."""
        return list(zip(*(m.walk(tokens, prefill) for m in self.maps)))

    def label_of(
        self, tokens: NDArray, begin: NDArray, at: NDArray, asked: Asked | None = None
    ) -> tuple[NDArray, list[tuple[Hashable, ...]]]:
        """Codes and labels of m prefixes; see `label_at`."""
        codes, rows = np.zeros(len(at), dtype=np.int64), np.zeros((min(len(at), 1), 0), dtype=np.int64)
        parts = [label_at(m, tokens, begin, at, asked) for m in self.maps]
        for inner, names in parts:
            pairs, codes = np.unique(codes * len(names) + inner, return_inverse=True)
            rows = np.column_stack([rows[pairs // len(names)], pairs % len(names)])
        return codes, [tuple(names[i] for i, (_, names) in zip(row, parts)) for row in rows.tolist()]

    def label_at(self, tokens: NDArray, begin: NDArray, at: NDArray) -> tuple[NDArray, list[tuple[Hashable, ...]]]:
        """Codes and labels of m prefixes, of maps that do not ask for the prompt."""
        return self.label_of(tokens, begin, at)


def map_name(states: Any) -> str:
    """How a map is called: counts of maps with different names are never added."""
    if isinstance(states, KGram):
        return f"KGram({states.k})"
    if isinstance(states, Product):
        return f"Product({', '.join(map(map_name, states.maps))})"
    if isinstance(states, JudgedPrefix):
        judge = states.labeller
        inner = (
            f"{len(judge)} tokens"
            if isinstance(judge, Mapping)
            else getattr(judge, "__qualname__", type(judge).__name__)
        )
        return f"JudgedPrefix({inner})"
    return getattr(states, "kind", f"{type(states).__name__}()")


def label_at(
    states: Any, tokens: NDArray, begin: NDArray, at: NDArray, asked: Asked | None = None
) -> tuple[NDArray, list[Any]]:
    """States of m prefixes, the fast way where the map has one.

    Parameters
    ----------
    states : StateMap
    tokens : int array, shape (total,)
        All answers, one behind the other.
    begin, at : int array, shape (m,)
        Prefix j is ``tokens[begin[j]:begin[j] + at[j]]``. Prefixes of one answer must follow each other, shortest first
        and without gaps.
    asked : Asked, optional
        Whose prefixes they are, for maps that ask for it.

    Returns
    -------
    codes : int array, shape (m,)
    labels : list
        Label by code; every one occurs.

    Raises
    ------
    InputError
        If the map's `walk` returns too few labels or one that cannot be hashed.
    """
    if hasattr(states, "label_of"):
        return states.label_of(tokens, begin, at, asked)
    fast = states.label_at(tokens, begin, at) if hasattr(states, "label_at") else None
    if fast is not None:
        return fast
    if not hasattr(states, "walk"):
        raise InputError(
            f"{states!r} is no state map.",
            cause="A map has a method walk(tokens, prefill).",
            next="Use KGram(k), Position(), JudgedPrefix(...) or an object with walk.",
        )
    codes = np.zeros(len(at), dtype=np.int64)
    known: dict[Any, int] = {}
    cuts = np.flatnonzero(np.concatenate([[True], (begin[1:] != begin[:-1]) | (at[1:] != at[:-1] + 1)]))[: len(at)]
    for lo, hi in zip(cuts, np.append(cuts[1:], len(at))):
        first, stop = int(at[lo]), int(at[hi - 1])
        labels = states.walk(tokens[begin[lo] : begin[lo] + stop], first)
        if len(labels) != stop + 1:
            raise InputError(
                f"{map_name(states)}.walk gave {len(labels)} labels for {stop} tokens.",
                cause="There is one state before each token and one after the last.",
                next="Return len(tokens) + 1 labels.",
            )
        try:
            codes[lo:hi] = [known.setdefault(label, len(known)) for label in labels[first:]]
        except TypeError as error:
            raise InputError(
                f"{map_name(states)}.walk gave a label that cannot be looked up.",
                cause=str(error),
                next="Use integers, strings or tuples as labels.",
            ) from None
    return codes, list(known)
