"""Differences in means: what makes a `Direction` of two kinds of prompts, pooled or cell by cell, and by category."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .buckets import listed
from .directions import POSITIONS, Direction, Position
from .positions import Spans

if TYPE_CHECKING:
    from .edits import Edit
    from .host import Host

__all__ = ["by_category", "cell_mean", "difference", "states"]


def difference(
    host: Host,
    positive: Sequence[Any],
    negative: Sequence[Any],
    *,
    position: Position = "t_inst",
    names: tuple[str, str] = ("harmful", "harmless"),
    balance: Sequence[str] = (),
    spans: Spans | None = None,
    batch_size: int | None = None,
) -> Direction:
    """Difference in means between two kinds of prompts, at every level.

    Parameters
    ----------
    host : Host
    positive, negative : sequence of records, texts or ids
        Each kind; the direction is mean(positive) - mean(negative).
    position : "t_inst", "t_post" or int
    names : (str, str)
        Of the two kinds.
    balance : sequence of str
        Keys of the records, such as ("category", "marker"): a mean is then that of the cells' means, so that no cell
        weighs more because it has more prompts.
    spans : Spans, optional
        Of prompts with a question or a system prompt; by default ``host.spans()``.
    batch_size : int, optional

    Returns
    -------
    Direction
        Without a chosen level.

    Raises
    ------
    InputError
        A kind without prompts, prompts that the template's positions are wrong for, a key that a record does not have.

    Notes
    -----
    arXiv 2507.11878, section 2: v_harm from harmful and harmless prompts at t_inst, v_refuse from refused and accepted
    ones at t_post, not normalised. `balance` is ours: where harmful prompts are mostly refused, the plain difference at
    either position holds both.

    Examples
    --------
    >>> from markovsafety.interventions import difference, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> asked, harmless = ms.organism.prompts(n=12), ms.organism.prompts(n=12, harmful=False)
    >>> direction = difference(host, asked, harmless, position="t_post")
    >>> direction
    <Direction harmful - harmless: positive pushes towards harmful; at t_post, no level
    chosen, from 12 + 12 prompts>
    >>> direction.norms.round()
    array([  0.,   3., 186., 264., 342.])
    """
    spans = spans or host.spans()
    positive, negative = listed(positive), listed(negative)
    sets = [("positive", positive), ("negative", negative)]
    means = []
    for (side, prompts), name in zip(sets, names):
        if not len(prompts):
            raise _nobody(side, name)
        found = states(host, prompts, (position,), spans=spans, batch_size=batch_size)[:, :, 0]
        means.append(cell_mean(found, prompts, balance))
    return _made(host, means, spans, position, names, (len(positive), len(negative)), balance, {})


def by_category(
    host: Host,
    positive: Sequence[Any],
    negative: Sequence[Any],
    *,
    position: Position = "t_inst",
    names: tuple[str, str] = ("harmful", "harmless"),
    balance: Sequence[str] = (),
    spans: Spans | None = None,
    batch_size: int | None = None,
) -> dict[str, Direction]:
    """One direction per category of the positive prompts.

    Parameters
    ----------
    host, positive, negative, position, names, balance, spans, batch_size
        As in `difference`; positive prompts are records with ``category``. A category is held against the negative
        prompts of its own, or against all of them where it has none.

    Returns
    -------
    dict of category -> Direction

    Raises
    ------
    InputError
        As `difference`.

    Examples
    --------
    Do six categories share a direction? The least cosine with the first, of four prompts of either kind each:

    >>> from markovsafety.interventions import by_category, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> asked, harmless = ms.organism.prompts(n=24), ms.organism.prompts(n=24, harmful=False)
    >>> for position in ("t_inst", "t_post"):
    ...     units = [d.at(3).unit for d in by_category(host, asked, harmless, position=position).values()]
    ...     print(position, len(units), f"{min(units[0] @ unit for unit in units):.3f}")
    t_inst 6 0.55...
    t_post 6 0.99...
    """
    spans = spans or host.spans()
    positive, negative = listed(positive), listed(negative)
    for side, prompts, name in zip(("positive", "negative"), (positive, negative), names):
        if not len(prompts):
            raise _nobody(side, name)
    up, down = (states(host, p, (position,), spans=spans, batch_size=batch_size)[:, :, 0] for p in (positive, negative))
    kinds, others = _values(positive, "category"), _values(negative, "category")
    out = {}
    for category in sorted(set(kinds), key=str):
        mine = [i for i, c in enumerate(kinds) if c == category]
        theirs = [i for i, c in enumerate(others) if c == category] or list(range(len(negative)))
        means = [
            cell_mean(up[mine], [positive[i] for i in mine], balance),
            cell_mean(down[theirs], [negative[i] for i in theirs], balance),
        ]
        about = {"category": category, "own negatives": category in others}
        out[str(category)] = _made(host, means, spans, position, names, (len(mine), len(theirs)), balance, about)
    return out


def states(
    host: Host,
    prompts: Sequence[Any],
    positions: Sequence[Position] = POSITIONS,
    *,
    spans: Spans | None = None,
    levels: Sequence[int] | None = None,
    edit: Edit | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Residual stream at named positions of prompts, which are checked to be those positions.

    Parameters
    ----------
    host : Host
    prompts : sequence of records, texts or ids
        A record with ``bare`` true has no post-instruction tokens; t_inst is then its last token.
    positions : sequence of "t_inst", "t_post" or int
    spans, levels, edit, batch_size
        As in `activations`.

    Returns
    -------
    float32 array, shape (prompts, levels, positions, width)

    Raises
    ------
    InputError
        A prompt that does not end as the template says, a bare one at t_post, or both positions are one token.

    Examples
    --------
    >>> from markovsafety.interventions import open_host, states
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> states(host, ms.organism.prompts(n=6), ["t_inst", "t_post"], levels=[0, 2, 4]).shape
    (6, 3, 2, 64)
    """
    from .record import activations

    spans, prompts = spans or host.spans(), listed(prompts)
    names = [p for p in positions if isinstance(p, str)]
    if unknown := [p for p in names if p not in POSITIONS]:
        raise InputError(
            f"there is no position {unknown[0]!r}", cause="names are t_inst and t_post", next="use one, or an index"
        )
    if len(set(names)) == 2:
        spans.separate()
    ids = host.prompt_ids(prompts)
    bare = np.array([isinstance(p, Mapping) and bool(p.get("bare")) for p in prompts])
    if bare.any() and "t_post" in names:
        raise InputError(
            f"prompt {int(bare.argmax())} has no t_post",
            cause="it was cut after the instruction, so that nothing says that the assistant begins",
            next="read it at t_inst, or give the whole prompt",
        )
    if names:
        for i in np.flatnonzero(~bare):
            spans.check(ids[i], f"prompt {i}", single_turn=False)
    out = None
    for group, cut in ((np.flatnonzero(~bare), 0), (np.flatnonzero(bare), len(spans.suffix))):
        if not len(group):
            continue
        at = [spans.t_inst[0] + cut if p == "t_inst" else -1 if p == "t_post" else int(p) for p in positions]
        found = activations(host, [ids[i] for i in group], at, levels=levels, edit=edit, batch_size=batch_size)
        out = np.zeros((len(ids), *found.shape[1:]), np.float32) if out is None else out
        out[group] = found
    assert out is not None
    return out


def cell_mean(values: np.ndarray, prompts: Sequence[Any], balance: Sequence[str] = ()) -> np.ndarray:
    """Mean over prompts, or over the means of cells of prompts.

    Parameters
    ----------
    values : array, shape (prompts, ...)
    prompts : sequence of records
    balance : sequence of str
        Keys whose values make the cells; none for the plain mean.

    Returns
    -------
    float64 array, shape (...)
    """
    if not balance:
        return values.astype(np.float64).mean(axis=0)
    cells = list(zip(*(_values(prompts, key) for key in balance)))
    sizes = Counter(cells)
    weights = np.array([1.0 / (len(sizes) * sizes[c]) for c in cells])
    return np.tensordot(weights, values.astype(np.float64), axes=1)


def _made(
    host: Host,
    means: Sequence[np.ndarray],
    spans: Spans,
    position: Position,
    names: tuple[str, str],
    counts: tuple[int, int],
    balance: Sequence[str],
    about: dict[str, Any],
) -> Direction:
    where = {"t_inst": spans.instruction, "t_post": spans.t_post}.get(str(position))
    if where is None:
        where = (int(position), int(position) + 1 or None)
    model, template = host.identity
    said = {**about, "balance": list(balance)}
    return Direction(means[0] - means[1], position, names, counts, where, None, model, template, said)


def _values(prompts: Sequence[Any], key: str) -> list[Hashable]:
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Mapping) or key not in prompt:
            raise InputError(
                f"prompt {i} has no {key!r}",
                cause="prompts are told apart by this key of their records",
                next=f"give records with {key!r}, or leave it out",
            )
    return [prompt[key] for prompt in prompts]


def _nobody(side: str, name: str) -> InputError:
    return InputError(
        f"there is no {name} prompt",
        cause=f"the {side} mean of a difference needs at least one",
        next="give some; prompts of a rare bucket are found by other wording or, for accepted harmful ones, by asking "
        "without post-instruction tokens (label(..., bare=True))",
    )
