"""Augmentation of training data so that refusals reach deeper into the answer: on token ids, for any trainer.

A row is a prompt, the first k tokens of an answer that complies, and then a refusal; only the refusal carries loss, so
the model learns to turn back after k tokens, not to comply for k tokens. *Recovery* draws k (arXiv 2406.05946, section
3: k = 0 with probability 1/2, else uniform on 1 .. C). *Rotations* place the refusal at every offset of one answer: the
orbit of the row under the cyclic group, which is our reading of the cyclic augmentation of arXiv 2502.00669.

An answer of n tokens is over after n of them, so a refusal can begin after k < n tokens only. `recovery` says what to
do with answers that are too short for the k that was drawn; `rotations` stops where the answer ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from ..errors import InputError

__all__ = [
    "Row",
    "Triplet",
    "draw_offset",
    "draw_until_fits",
    "fitting_offsets",
    "mixed",
    "recover",
    "recovery",
    "rotations",
    "token_share",
]

SHORT = ("redraw", "clip", "refuse")
WEIGHTS = ("token", "row", "orbit")
Item = TypeVar("Item")


class Triplet(NamedTuple):
    """Token ids of a prompt, of an answer that complies with it (its end token included), and of a refusal.

    Examples
    --------
    >>> from markovsafety.interventions import Triplet, recover
    >>> triplet = Triplet(prompt=[4, 12, 5], answer=[21, 22, 23, 2], refusal=[31, 2])
    >>> recover(*triplet, k=2).tokens
    [4, 12, 5, 21, 22, 31, 2]
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    refusal: Sequence[int]


class Row(NamedTuple):
    """Token ids, the index from which they carry loss, and the weight of the answer's tokens.

    Examples
    --------
    Three tokens of a prompt, two that comply, and a refusal of two tokens, which alone is learned:

    >>> row = ms.interventions.Row([4, 12, 5, 21, 22, 31, 2], answer=3, loss_from=5)
    >>> row.offset, row.loss_tokens
    (2, 2)
    """

    tokens: list[int]
    answer: int  # index of the first answer token
    loss_from: int
    weight: float = 1.0

    @property
    def offset(self) -> int:
        """Number k of answer tokens before the part that carries loss."""
        return self.loss_from - self.answer

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return len(self.tokens) - self.loss_from


def recover(prompt: Sequence[int], answer: Sequence[int], refusal: Sequence[int], k: int, weight: float = 1.0) -> Row:
    """The row that refuses after k tokens of an answer; loss on the refusal only.

    Parameters
    ----------
    prompt, answer, refusal : sequence of int
        Token ids.
    k : int
        At most ``len(answer) - 1``: after its last token an answer is over.
    weight : float
        Weight of every token with loss.

    Raises
    ------
    InputError
        If the refusal cannot begin there.

    Examples
    --------
    The model is to turn back after four tokens of an answer that complies:

    >>> row = ms.interventions.recover(prompt=[4, 12, 5], answer=[21, 22, 23, 24, 25, 2], refusal=[31, 32, 2], k=4)
    >>> row.tokens, row.loss_from
    ([4, 12, 5, 21, 22, 23, 24, 31, 32, 2], 7)
    """
    if not 0 <= k < max(len(answer), 1):
        raise InputError(
            f"A refusal after {k} tokens of an answer of {len(answer)}.",
            cause="After its last token an answer is over.",
            next="Pass 0 <= k < len(answer).",
        )
    begun = len(prompt)
    return Row([*prompt, *answer[:k], *refusal], begun, begun + k, weight)


def draw_offset(rng: random.Random, depth: int, plain: float = 0.5) -> int:
    """k = 0 with probability `plain`, else uniform on 1 .. `depth`. Nothing is drawn to decide what is certain."""
    if plain and rng.random() < plain:
        return 0
    return rng.randint(1, depth)


def draw_until_fits(
    rng: random.Random, draw: Callable[[random.Random], tuple[Item, int]], depth: int, plain: float = 0.5
) -> tuple[Item, int]:
    """Draw an item with the length of its answer, and an offset, both anew until the answer is longer than the offset.

    So k has its law given that a random answer is longer than k: deep offsets are rarer by as much as long answers are.
    """
    while True:
        item, length = draw(rng)
        k = draw_offset(rng, depth, plain)
        if k < max(length, 1):
            return item, k


def fitting_offsets(length: int, depth: int) -> range:
    """The offsets 1 .. `depth` at which an answer of so many tokens is not over: its orbit without the plain row."""
    return range(1, min(length, depth + 1))


def recovery(
    triplets: Iterable[Any],
    depth: int = 100,
    *,
    n: int | None = None,
    plain: float = 0.5,
    short: str = "redraw",
    weight: str = "token",
    seed: int = 0,
) -> list[Row]:
    """Recovery rows: each refuses after a random number of compliant tokens.

    Parameters
    ----------
    triplets : iterable of (prompt, answer, refusal)
        Token ids, see `Triplet`.
    depth : int
        Largest offset C.
    n : int, optional
        Number of rows; one per triplet if not given.
    plain : float
        Probability of k = 0, a refusal at once.
    short : {"redraw", "clip", "refuse"}
        What happens if the answer is not longer than the k that was drawn. "redraw": a triplet and k are drawn anew, so
        k keeps its law as far as answers reach, and deep rows come from long answers. "clip": k is drawn from the
        offsets that fit the triplet at hand, so every triplet counts alike and deep offsets are rarer. "refuse": an
        error, before anything is drawn, unless all answers are longer than `depth`.
    weight : {"token", "row"}
        "token": every token with loss weighs 1, so long refusals weigh more. "row": every row weighs 1 in total.
    seed : int

    Returns
    -------
    list of Row
        The same for the same arguments. With `n` not given and ``short="clip"`` or "refuse", row i is of triplet i.

    Raises
    ------
    InputError
        If a triplet is empty or no answer is long enough, or an argument is out of range.

    Notes
    -----
    arXiv 2406.05946, section 3.1, has C = 100 and plain = 1/2, and does not say what happens to short answers.

    Examples
    --------
    About half of the rows refuse at once, and as many after 1, 2, .. 5 tokens of the answer as chance has it:

    >>> triplet = ([4, 12, 5], [21, 22, 23, 24, 25, 26, 2], [31, 32, 2])
    >>> rows = ms.interventions.recovery([triplet], depth=5, n=1000)
    >>> np.bincount([row.offset for row in rows])
    array([476, 103, 123,  96,  94, 108])
    """
    rows = checked_triplets(triplets, depth)
    check_choice("short", short, SHORT)
    check_choice("weight", weight, WEIGHTS[:2])
    _count("n", n)
    if not 0 <= plain <= 1:
        raise InputError(f"plain is {plain}.", cause="It is a probability.", next="Pass 0 <= plain <= 1.")
    least = min(len(t.answer) for t in rows)
    longest = max(len(t.answer) for t in rows)
    if plain < 1 and ((short == "refuse" and least <= depth) or (short == "clip" and least < 2) or longest < 2):
        raise InputError(
            f"The shortest answer has {least} tokens, the longest {longest}; a refusal may begin after {depth}.",
            cause=f"With short={short!r} these answers are over before their refusal could begin.",
            next="Leave out short answers, lower the depth, or choose another rule for short answers.",
        )
    rng, size = random.Random(seed), len(rows) if n is None else n
    out = []
    for i in range(size):
        if short == "redraw":
            t, k = draw_until_fits(rng, lambda r: (t := r.choice(rows), len(t.answer)), depth, plain)
        else:
            t = rows[i] if n is None else rng.choice(rows)
            k = draw_offset(rng, min(depth, len(t.answer) - 1), plain)
        out.append(recover(*t, k, row_weight(weight, t)))
    return out


def rotations(
    triplets: Iterable[Any], depth: int, *, plain: bool = False, weight: str = "token", seed: int | None = None
) -> list[Row]:
    """Rotation rows: for every triplet the refusal at each offset 1 .. C of its answer, the whole orbit.

    Parameters
    ----------
    triplets : iterable of (prompt, answer, refusal)
        As in `recovery`.
    depth : int
        Largest offset C; an answer of n tokens has the offsets below n.
    plain : bool
        Whether the orbit contains k = 0, a refusal at once.
    weight : {"token", "row", "orbit"}
        "token": every token with loss weighs 1; "row": every row 1; "orbit": every orbit 1, however long its answer.
    seed : int, optional
        Shuffle the rows; they come orbit by orbit if not given.

    Returns
    -------
    list of Row

    Raises
    ------
    InputError
        If a triplet is empty, or an answer is too short for any offset.

    Examples
    --------
    An answer of four tokens has three offsets at which it is not over, however large the depth:

    >>> triplet = ([4, 12, 5], [21, 22, 23, 2], [31, 2])
    >>> for row in ms.interventions.rotations([triplet], depth=20, plain=True):
    ...     print(row.offset, row.tokens[row.answer :])
    0 [31, 2]
    1 [21, 31, 2]
    2 [21, 22, 31, 2]
    3 [21, 22, 23, 31, 2]
    """
    rows = checked_triplets(triplets, depth)
    check_choice("weight", weight, WEIGHTS)
    out = []
    for i, t in enumerate(rows):
        offsets = [*([0] if plain else []), *fitting_offsets(len(t.answer), depth)]
        if not offsets:
            raise InputError(
                f"The answer of triplet {i} has {len(t.answer)} tokens: no offset fits.",
                cause="A refusal begins after at least one token and before the answer is over.",
                next="Leave this triplet out, or pass plain=True.",
            )
        out += [recover(*t, k, row_weight(weight, t, len(offsets))) for k in offsets]
    if seed is not None:
        random.Random(seed).shuffle(out)
    return out


def token_share(safety: Sequence[Row], anchors: Sequence[Row]) -> float:
    """What share of a loss per token the safety rows have when they are mixed with anchor rows as they are.

    Parameters
    ----------
    safety, anchors : sequence of Row

    Returns
    -------
    float
        In [0, 1]. A loss that is averaged over the tokens of a batch has this in place of the alpha of arXiv 2406.05946
        (equation 3): short refusals beside long anchors count for less than their rows do.

    Examples
    --------
    As many safety rows as anchors, and a tenth of the loss, for their refusals are short:

    >>> safety = [ms.interventions.Row([4, 5, 31, 32, 2], answer=2, loss_from=2)]
    >>> anchors = [ms.interventions.Row([4, 6, *range(40, 66), 2], answer=2, loss_from=2)]
    >>> ms.interventions.token_share(safety, anchors)
    0.1
    """
    mine, other = (sum(r.weight * r.loss_tokens for r in rows) for rows in (safety, anchors))
    if mine + other == 0:
        raise InputError("No token carries loss.", cause="Both lists of rows are empty.", next="Pass rows.")
    return mine / (mine + other)


def mixed(safety: Sequence[Row], anchors: Sequence[Row], alpha: float = 0.2) -> list[Row]:
    """Safety and anchor rows with weights that give the safety rows the share alpha of the loss.

    Parameters
    ----------
    safety, anchors : sequence of Row
    alpha : float
        In (0, 1); 0.2 in arXiv 2406.05946.

    Returns
    -------
    list of Row
        First the safety rows. The loss ``sum(weight * cross entropy) / sum(weight * tokens)`` is then alpha times the
        mean over the tokens of the safety rows plus 1 - alpha times that over the anchors', and the mean weight is 1.

    Raises
    ------
    InputError
        If alpha is not in (0, 1) or one of the lists has no token with loss.

    Examples
    --------
    A refusal of 3 tokens gets a fifth of the loss beside an anchor of 27:

    >>> safety = [ms.interventions.Row([4, 5, 31, 32, 2], answer=2, loss_from=2)]
    >>> anchors = [ms.interventions.Row([4, 6, *range(40, 66), 2], answer=2, loss_from=2)]
    >>> rows = ms.interventions.mixed(safety, anchors, alpha=0.2)
    >>> [round(row.weight, 3) for row in rows], round(ms.interventions.token_share(rows[:1], rows[1:]), 3)
    ([2.0, 0.889], 0.2)
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}.", cause="Both kinds of rows get a share.", next="Pass 0 < alpha < 1.")
    masses = [sum(r.weight * r.loss_tokens for r in rows) for rows in (safety, anchors)]
    if not all(masses):
        raise InputError(
            "One of the two lists has no token with loss.",
            cause="A share of nothing is nothing.",
            next="Pass rows of both kinds.",
        )
    tokens = sum(r.loss_tokens for r in [*safety, *anchors])
    scales = [share * tokens / mass for share, mass in zip((alpha, 1 - alpha), masses)]
    return [r._replace(weight=r.weight * s) for rows, s in zip((safety, anchors), scales) for r in rows]


def row_weight(kind: str, t: Triplet, size: int = 1) -> float:
    """Weight of every token of a refusal: 1, or such that the row, or its orbit of so many rows, weighs 1 in total."""
    return 1.0 if kind == "token" else 1.0 / (len(t.refusal) * (size if kind == "orbit" else 1))


def checked_triplets(triplets: Iterable[Any], depth: Any) -> list[Triplet]:
    """Triplets of ids, none of them with an empty part, and a depth that is one."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise InputError(f"depth is {depth!r}.", cause="It is the largest offset.", next="Pass a whole number >= 1.")
    rows = []
    for i, t in enumerate(triplets):
        parts = tuple(t)
        if len(parts) != 3 or not all(isinstance(p, Iterable) and not isinstance(p, str) for p in parts):
            raise InputError(
                f"Triplet {i} is {t!r}.",
                cause="A triplet is the token ids of a prompt, of an answer that complies, and of a refusal.",
                next="Pass three lists of token ids; encode text first.",
            )
        made = Triplet(*([int(x) for x in p] for p in parts))
        if not made.answer or not made.refusal:
            raise InputError(
                f"Triplet {i} has an empty {'answer' if not made.answer else 'refusal'}.",
                cause="Both are needed to refuse in the middle of an answer.",
                next="Leave this triplet out.",
            )
        rows.append(made)
    if not rows:
        raise InputError("There are no triplets.", cause="The list is empty.", next="Pass at least one triplet.")
    return rows


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is none of the known ones."""
    if value not in known:
        raise InputError(
            f"{name} is {value!r}.", cause=f"Known are {', '.join(map(repr, known))}.", next="Use one of these."
        )


def _count(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InputError(f"{name} is {value!r}.", cause="It counts rows.", next="Pass a whole number.")
