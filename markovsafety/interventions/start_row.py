"""What an edit of the prompt does to harm, without sampling under it: only the start row of the chain moves.

An edit that acts on prompt positions alone changes the law of the first answer token; what follows a given first
token stays almost as it was (`depth_signature` measures how nearly). So with P' the edited law of the first token and
h(t) the harm after first token t in the plain model,

    h' = sum over t of P'(start, t) h(t),

and P' costs one forward pass. `start_rows` measures h(t) once; `row_local` then prices any number of edits.

The start row belongs to the prompt. A sum is taken for each prompt and only then averaged: an edit shifts logits, and
the normaliser of the softmax is not linear, so the edited mean of the rows is not the mean of the edited rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..outcomes import CODES, NOT_JUDGED
from ..rollouts.asked import ask
from ..rollouts.judges import judge as judge_rollouts
from ..rollouts.rollouts import Rollouts
from ..rollouts.sample import sample
from .edits import Edit
from .host import Host
from .record import laws

__all__ = ["StartRows", "check_row_local", "first_laws", "start_rows"]

NUMBERS = 1 << 25
"""Log-probabilities held at once while first tokens are looked at."""


@dataclass(frozen=True, eq=False)
class StartRows:
    """Outcomes by first token of the plain model.

    Parameters
    ----------
    prompt_id : int64 array, shape (prompts,)
    category : object array of str, shape (prompts,)
    prompts : tuple of int arrays, length prompts
        Ids after the chat template.
    row, token : int64 array, shape (entries,)
        Place of the prompt, and first token of the answer; every pair once.
    total, harm, cut : float64 array, shape (entries,)
        Answers that begin so, those that came to harm, those that were cut off before an outcome.
    model : str
        Identity of the weights.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> rows = inside.start_rows(host, organism.prompts(n=6), n=16, max_tokens=48, judge="organism")
    >>> rows
    <StartRows: 6 prompts, ... pairs of prompt and first token, ... answers>
    >>> sorry = rows.token == organism.WORDS.index("sorry")
    >>> rows.row[sorry]  # every prompt has been looked at behind it
    array([0, 1, 2, 3, 4, 5])
    """

    prompt_id: NDArray
    category: NDArray
    prompts: tuple[NDArray, ...]
    row: NDArray
    token: NDArray
    total: NDArray
    harm: NDArray
    cut: NDArray
    model: str

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return (
            f"<StartRows: {len(self)} prompts, {len(self.row)} pairs of prompt and first token, "
            f"{self.total.sum():g} answers>"
        )


def check_row_local(edit: Edit) -> None:
    """Raise unless an edit moves the start row alone.

    Raises
    ------
    InputError
        A part acts on answer positions, or tilts more than the first token.
    """
    for i, part in enumerate(edit.parts):
        tilt = part.kind == "tilt"
        if part.when != "prompt" if not tilt else part.vector.ndim != 2 or len(part.vector) > 1:
            what = "tilts every answer token" if tilt else f"acts at {part.when!r}"
            raise InputError(
                f"part {i} of the edit ({part.kind}) {what}, so that all rows of the chain move",
                cause="the row-local prediction takes what follows a first token from the plain model",
                next="sample under the edit (interventions.chain_effect), or "
                + ("give the tilt one row, shape (1, vocab)" if tilt else 'make the part with when="prompt"'),
            )


def first_laws(host: Host, prompts: Sequence[NDArray], edit: Edit | None = None) -> Iterator[tuple[slice, NDArray]]:
    """Laws of the first answer token, some prompts at a time: their places, and float64 (prompts, vocab)."""
    size = max(1, min(64, NUMBERS // host.vocab_size))
    for begin in range(0, len(prompts), size):
        which = slice(begin, min(begin + size, len(prompts)))
        yield which, np.exp(laws(host, prompts[which], edit=edit, batch_size=size)[:, 0].astype(np.float64))


def start_rows(
    host: Host,
    prompts: Any,
    *,
    n: int,
    max_tokens: int,
    judge: Any,
    edits: Sequence[Edit] = (),
    free: Rollouts | None = None,
    cover: float = 0.999,
    most: int = 32,
    seed: int = 0,
    system: str | None = None,
) -> StartRows:
    """Measure what follows each first token in the plain model.

    Parameters
    ----------
    host : Host
    prompts : as in `markovsafety.sample`
    n : int
        Answers per prompt, shared out over its first tokens by their largest probability under the laws looked at, at
        least one each. 0 takes the free rollouts alone.
    max_tokens : int
        Of an answer, its first token included.
    judge : str or Judge
        Judges whole answers: a first token that is harm itself counts.
    edits : sequence of Edit
        Edits whose likely first tokens are wanted as well; those of the plain model always are.
    free : Rollouts, optional
        Judged answers of the plain model to these prompts, without prefill; they count, and what they cover is not
        sampled again. Give the same `max_tokens`.
    cover : float
        Probability that the tokens of a prompt should reach under every law.
    most : int
        Tokens of a prompt at most.
    seed : int
    system : str, optional

    Returns
    -------
    StartRows

    Raises
    ------
    InputError
        An edit that moves more than the start row, or numbers that make no sense.

    Examples
    --------
    Answers that are made to begin with a word of refusal hardly ever harm, those that begin with compliance often do:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> rows = inside.start_rows(host, organism.prompts(n=12), n=32, max_tokens=48, judge="organism", cover=0.99)
    >>> for word in ("sorry", "sure"):
    ...     first = rows.token == organism.WORDS.index(word)
    ...     share = rows.harm[first].sum() / rows.total[first].sum()
    ...     print(f"{word}: {share:.2f}")
    sorry: 0.0...
    sure: 0.5...
    """
    if not (0 < cover <= 1 and most >= 1 and n >= 0 and max_tokens >= 2):
        raise InputError(
            f"n={n}, max_tokens={max_tokens}, cover={cover}, most={most}",
            cause="a first token needs at least one that follows it, and cover is a probability",
            next="give n >= 0, max_tokens >= 2, 0 < cover <= 1, most >= 1",
        )
    for edit in edits:
        check_row_local(edit)
    template = host.engine.tokenizer
    asked = ask(prompts, template, system=system)
    ids = [tokens.astype(np.int64) for tokens in asked.tokens]
    wanted = _wanted(host, ids, edits, n, cover, most) if n else []
    found = [] if free is None else [_free(free, asked.prompt_id)]
    have = {(r, t): total for r, t, total, _, _ in zip(*_added(found))}
    lacking = [(r, t, int(np.ceil(m - have.get((r, t), 0)))) for r, t, m in wanted]
    lacking = [item for item in lacking if item[2] > 0]
    stop = {*template.eos_ids, *template.end_ids}
    said = judge if isinstance(judge, str) else getattr(judge, "bind", lambda _: judge)(template)
    # Numbers of answers are rounded up to powers of two, so that few calls sample them all.
    sizes = sorted({_power(m) for _, t, m in lacking if t not in stop})
    for size in sizes:
        pairs = [(r, t) for r, t, m in lacking if t not in stop and _power(m) == size]
        found.append(_forced(host, ids, pairs, size, max_tokens, said, seed))
    if ended := [(r, t, m) for r, t, m in lacking if t in stop]:
        found.append(_ended(ended, said, sorted(stop)))
    row, token, total, harm, cut = _added(found)
    return StartRows(asked.prompt_id, asked.category, tuple(ids), row, token, total, harm, cut, host.identity[0])


Entries = tuple[NDArray, NDArray, NDArray, NDArray, NDArray]
"""Row, token, total, harm, cut."""


def _power(m: int) -> int:
    return 1 << (m - 1).bit_length()


def _wanted(
    host: Host, ids: list[NDArray], edits: Sequence[Edit], n: int, cover: float, most: int
) -> list[tuple[int, int, float]]:
    """Place of the prompt, first token, and how many answers should begin so."""
    out: list[tuple[int, int, float]] = []
    for group in zip(*(first_laws(host, ids, edit) for edit in (None, *edits))):
        which, table = group[0][0], np.stack([law for _, law in group])
        for place in range(table.shape[1]):
            law = table[:, place]
            largest = law.max(axis=0)
            order = np.argsort(-largest, kind="stable")[:most]
            enough = (law[:, order].cumsum(axis=1) >= cover).all(axis=0)
            kept = order[: int(enough.argmax()) + 1] if enough.any() else order
            share = n * largest[kept] / largest[kept].sum()
            out += [(which.start + place, int(t), max(1.0, float(s))) for t, s in zip(kept, share)]
    return out


def _entries(row: NDArray, rolls: Rollouts) -> Entries:
    first = rolls.tokens[rolls.offsets[:-1]].astype(np.int64)
    w = rolls.weight
    return row, first, w, w * (rolls.outcome == CODES["harm"]), w * (rolls.outcome == CODES["truncated"])


def _free(rolls: Rollouts, prompt_id: NDArray) -> Entries:
    """Free rollouts of the plain model, by first token."""
    if "edit" in rolls.provenance.get("engine", {}) or (rolls.outcome == NOT_JUDGED).any():
        raise InputError(
            "the free rollouts are not judged"
            if (rolls.outcome == NOT_JUDGED).any()
            else "the free rollouts are edited",
            cause="they are to say what follows a first token in the plain model",
            next="give judged rollouts that were sampled without an edit",
        )
    rolls = rolls[(rolls.prefill == 0) & (rolls.lengths > 0) & np.isin(rolls.prompt_id, prompt_id)]
    order = np.argsort(prompt_id, kind="stable")
    return _entries(order[np.searchsorted(prompt_id[order], rolls.prompt_id)], rolls)


def _forced(
    host: Host, ids: list[NDArray], pairs: list[tuple[int, int]], n: int, max_tokens: int, judge: Any, seed: int
) -> Entries:
    """Answers that are made to begin with a token, judged as if it had been sampled."""
    records = [{"prompt_tokens": ids[r], "prefix": [t], "prompt_id": i} for i, (r, t) in enumerate(pairs)]
    rolls = sample(host.engine, records, n=n, max_tokens=max_tokens - 1, prefill=[1], seed=seed, engine="transformers")
    whole = judge_rollouts(rolls.replace(prefill=np.zeros(len(rolls), np.int32)), judge)
    return _entries(np.array([r for r, _ in pairs])[whole.prompt_id], whole)


def _ended(pairs: list[tuple[int, int, int]], judge: Any, stop: list[int]) -> Entries:
    """Answers that end at once."""
    row = np.repeat([r for r, _, _ in pairs], [m for _, _, m in pairs])
    answers = [[t] for _, t, m in pairs for _ in range(m)]
    told = {"sampling": {"eos_ids": stop}}
    return _entries(row, judge_rollouts(Rollouts.of(answers, prompt_id=row, provenance=told), judge))


def _added(parts: list[Entries]) -> Entries:
    """Entries of one prompt and token added up."""
    if not parts:
        none = np.zeros(0)
        return none.astype(np.int64), none.astype(np.int64), none, none, none
    row, token, total, harm, cut = (np.concatenate(column) for column in zip(*parts))
    keys, at = np.unique(np.stack([row, token]), axis=1, return_inverse=True)
    total, harm, cut = (np.bincount(at.reshape(-1), x, keys.shape[1]) for x in (total, harm, cut))
    return keys[0], keys[1], total, harm, cut
