"""Closed forms over depth, width, correlation and attack, all cells at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from ..errors import InputError
from .block import ENDS, Asked, Block, Coords, as_block, as_bound, axis, through
from .closed import Profile
from .hazards import Hazards
from .leaky import LeakyRefusal

__all__ = ["of_form"]

DENSE = 1 << 22  # weights that are kept as a full matrix
CELLS = 1 << 22  # cells of one slab of depths


def of_form(source: Any, depth: Any, asked: Asked) -> Block:
    """Harm of a closed form.

    Parameters
    ----------
    source : Profile, Checkpoint, Hazards or LeakyRefusal
        Its method ``harm`` gives the Bound of all depths at once.
    depth : int or sequence of int, optional
        Trained depths d (Profile, Checkpoint), or numbers k of forced tokens (Hazards: 0 to L if not given; a
        LeakyRefusal is the same at every k).
    asked : Asked

    Returns
    -------
    Block

    Notes
    -----
    With an attack all answers face the same forced tokens, so the mean over their number is taken last. Beyond the
    deepest trained position more forced tokens change nothing, so no law is cut off.
    """
    if asked.chosen and None in asked.mixes:
        raise InputError(
            f"{_named(source)} has no measured correlation.",
            cause="It is a closed form, not rollouts.",
            next="Pass numbers as correlation, 0 for independent answers.",
        )
    trained = not isinstance(source, (Hazards, LeakyRefusal))
    depths = axis(_own(source, asked) if depth is None else depth, "depth")
    parts = _over_attacks(source, depths, asked)
    level = _harm(source, np.array(0), np.array(0)).level
    start = "the prompt, nothing forced" if trained else "after k forced tokens"
    if asked.laws != (None,):
        start = "the mean over the attack" + ("" if trained else ", which forces at most k tokens")
    how = "independent answers" if asked.mixes == (None,) else f"{asked.model} over the axis"
    info = {
        "source": type(source).__name__.lower(),
        "kind": "trained" if trained else "forced",
        "start": start,
        "start_why": f"the depth axis is the {'trained depth' if trained else 'number of forced tokens'}",
        "estimate": f"closed form; {how}",
    }
    return as_block(depths, parts, level, info, _floor(source, asked))


def _named(source: Any) -> str:
    return f"A {''.join(f' {c.lower()}' if c.isupper() else c for c in type(source).__name__).strip()}"


def _own(source: Any, asked: Asked) -> Any:
    """The depths of a form that was asked for none."""
    if isinstance(source, LeakyRefusal):
        return 0
    if isinstance(source, Hazards):
        return range(len(source) + 1) if asked.laws == (None,) else len(source)
    raise InputError(
        f"{_named(source)} has no depths of its own.",
        cause="Its depth axis is the trained depth.",
        next="Pass e.g. depth=range(33), or --depth 0:33.",
    )


def _harm(source: Any, d: NDArray, k: NDArray) -> Bound:
    """Harm at depth d when the attack forces k tokens; without trained depth d is the most that it may force."""
    if isinstance(source, Hazards):
        return source.harm(np.minimum(d, k))
    if isinstance(source, LeakyRefusal):  # forced tokens leave it on the trajectory, which is the same everywhere
        one, shape = source.harm(), np.broadcast_shapes(d.shape, k.shape)
        known = {n: w for n, w in one.reasons.items() if w is not None}
        return as_bound({n: np.full(shape, w) for n, w in (_ends(one) | known).items()}, one.level)
    return source.harm(d, k)


def _ends(b: Bound) -> dict[str, Any]:
    return {s: getattr(b, s) for s in ENDS}


def _over_attacks(source: Any, depths: Coords, asked: Asked) -> dict[str, NDArray]:
    d = np.array(depths)
    if asked.laws == (None,):
        trained = not isinstance(source, (Hazards, LeakyRefusal))
        q = _harm(source, d, np.zeros_like(d) if trained else d)
        return {name: part[..., None] for name, part in through(q, asked).items()}
    k = np.arange(depths[-1] + 1)
    rows = max(1, CELLS // len(k))
    done = [_means(_harm(source, d[i : i + rows, None], k[None, :]), k, asked) for i in range(0, len(d), rows)]
    return {name: np.concatenate([part[name] for part in done]) for name in done[0]}


def _means(q: Bound, k: NDArray, asked: Asked) -> dict[str, NDArray]:
    """Means over the laws of what `through` gives for q of shape (depth, k); the last k stands for all beyond it."""
    first, inverse = _distinct(q)
    known = _ends(q) | {n: w for n, w in q.reasons.items() if w is not None}
    few = {name: np.broadcast_to(w, q.shape).reshape(-1)[first] for name, w in known.items()}
    parts = through(as_bound(few, q.level), asked)
    weights = []
    for law in asked.laws:
        p = law.probability(k)
        p[-1] = law.survival(int(k[-1]))
        weights.append(_matrix(np.broadcast_to(p, q.shape), inverse.reshape(q.shape), len(first)))

    def mean(part: NDArray) -> NDArray:
        flat = part.reshape(len(first), -1)
        out = [np.asarray(w @ flat).reshape(q.shape[0], *part.shape[1:]) for w in weights]
        return np.stack(out, axis=-1)

    means = {name: mean(part) for name, part in parts.items()}
    # Weights that sum to 1 up to rounding may not push a probability beyond 1, nor an end beyond the value.
    for s in ENDS:
        means[s] = np.clip(means[s], 0.0, 1.0)
    means["lower"] = np.minimum(means["lower"], means["value"])
    means["upper"] = np.maximum(means["upper"], means["value"])
    return means


def _distinct(q: Bound) -> tuple[NDArray, NDArray]:
    """Where each distinct cell of q is found first, and which of them every cell is."""
    columns = [np.asarray(x, dtype=np.float64).reshape(-1) for x in (q.value, q.lower, q.upper)]
    columns += [np.broadcast_to(w, q.shape).reshape(-1) for w in q.reasons.values() if w is not None]
    _, first, inverse = np.unique(columns[0], return_index=True, return_inverse=True)
    if any(not np.array_equal(c, c[first][inverse]) for c in columns[1:]):
        _, first, inverse = np.unique(np.stack(columns, 1), axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _matrix(weight: NDArray, which: NDArray, size: int) -> Any:
    """Weights by depth and distinct cell."""
    from scipy.sparse import csr_array

    depth = np.broadcast_to(np.arange(len(weight))[:, None], weight.shape)
    keep = weight > 0
    made = csr_array((weight[keep], (depth[keep], which[keep])), shape=(len(weight), size))
    return made.toarray() if len(weight) * size <= DENSE else made


def _floor(source: Any, asked: Asked) -> tuple[NDArray, NDArray, NDArray] | None:
    """Harm at unlimited depth, whatever the attack; None where deeper is not always better."""
    if not isinstance(source, Profile):
        return None
    parts = through(source.floor(), asked)
    shape = (len(asked.widths), len(asked.mixes), len(asked.laws))
    value, lower, upper = (np.broadcast_to(parts[s][..., None], shape) for s in ENDS)
    return value, lower, upper
