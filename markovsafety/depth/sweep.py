"""sweep: one front door from rollouts, a chain or a closed form to harm over depth and width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError
from ..evidence.cells import cell, forced, tally_of
from ..hitting import hitting_probability
from .closed import Profile
from .grid import Grid, Needed
from .measured import measured_width
from .profile import noted, whole
from .support import note_of, prompts_behind, supported
from .width import check_rule, ensemble_harm

__all__ = ["Grid", "Needed", "sweep"]

Coords = tuple[Any, ...]
DEFAULT = 20  # deepest depth of a chain's own axis


def sweep(
    source: Any,
    *,
    depth: Any = None,
    width: Any = (1,),
    capacity: Any = None,
    correlation: Any = None,
    rule: str = "any-refusal",
    attack: Any = None,
    level: float = 0.95,
) -> Grid:
    """Harm over depth and width.

    Parameters
    ----------
    source : Rollouts, Counts, Chain or Profile
        Where the harm comes from.
    depth : int or sequence of int, optional
        Rollouts and Chain: numbers k of forced tokens; None = all that were measured, or for a chain with fewer than
        two measured state laws 0 to 20, as far as some answer is still without an outcome (layered: before the last
        layer ends). Profile: trained depths d.
    width : int or sequence of int
        Numbers of answers, of which one harmless is enough.
    capacity : None
        Not built yet.
    correlation : None, or a sequence of numbers and "measured"
        None: no such axis; the correlation is what the source itself says (Rollouts: measured, see `measured_width`;
        Chain: answers share the state after the k tokens and are independent from there on, and for an estimated chain
        no upper end is below what its prompts support; Profile: independent).
        A number: beta-binomial with that intra-class correlation, 0 = independent. "measured": as None.
    rule : str
        How answers are combined; only "any-refusal".
    attack : None
        Not built yet.
    level : float
        Confidence level of the intervals.

    Returns
    -------
    Grid
        With ``grid.harm``, ``grid.needed(harm=eps)`` and ``grid.info``, which names the start law of the depth axis:
        for a Chain ``entry[k]`` if every swept depth was measured, else the chain conditioned on no outcome in k steps.

    Raises
    ------
    InputError
        If a depth was not measured, the source has no harm, or something is asked that does not exist.
    """
    check_rule(rule)
    for name, given in (("capacity", capacity), ("attack", attack)):
        if given is not None:
            raise InputError(
                f"sweep has no {name} yet.",
                cause="That axis belongs to the depth theory, which is not built.",
                next=f"Leave {name} out.",
            )
    widths = _axis(width, "width", least=1)
    mixes = _correlations(correlation)
    if isinstance(source, Profile):
        depths, cells, info = _of_profile(source, depth, widths, mixes)
    elif isinstance(source, Chain):
        depths, cells, info = _of_chain(source, depth, widths, mixes, level)
    else:
        depths, cells, info = _of_rollouts(source, depth, widths, mixes, level)
    coords: dict[str, Coords] = {"depth": depths, "width": widths}
    if correlation is not None:
        coords["correlation"] = tuple("measured" if c is None else c for c in mixes)
    harm = _stack(cells, correlation is None, info.get("note"))
    return Grid(harm, tuple(coords), coords, {"rule": rule, **info})


def _axis(values: Any, name: str, least: int = 0) -> Coords:
    """Sorted distinct whole numbers."""
    one = isinstance(values, (int, np.integer)) and not isinstance(values, bool)
    array = np.unique(whole([values] if one else list(values) if isinstance(values, Iterable) else values, name))
    if array.size == 0 or array[0] < least:
        raise InputError(f"{name} is {values!r}.", cause=f"An axis has values from {least} on.", next="Pass some.")
    return tuple(array.tolist())


def _correlations(correlation: Any) -> Coords:
    """The axis; None stands for what the source says."""
    if correlation is None:
        return (None,)
    given = [correlation] if isinstance(correlation, (str, int, float)) else list(correlation)
    if not given:
        raise InputError("correlation is empty.", cause="An axis has values.", next='Pass e.g. [0, "measured"].')
    mixes = []
    for x in given:
        number = isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)
        if not (x == "measured" if isinstance(x, str) else number and 0 <= x <= 1):
            raise InputError(
                f"correlation {x!r} is neither a correlation nor 'measured'.",
                cause="An intra-class correlation runs from 0 (independent answers) to 1 (all alike).",
                next='Pass numbers in [0, 1], or "measured".',
            )
        mixes.append(None if isinstance(x, str) else float(x))
    return tuple(mixes)


def _stack(cells: list[list[Bound]], squeeze: bool, note: str | None = None) -> Bound:
    """One bound of shape (depth, width[, correlation]) from bounds over width, by depth and correlation."""

    def table(get: Any) -> NDArray:
        whole_ = np.array([[np.asarray(get(b), dtype=np.float64) for b in row] for row in cells])  # depth, corr., width
        return whole_[:, 0] if squeeze else np.moveaxis(whole_, 1, 2)

    first = cells[0][0]
    known = [name for name, w in first.reasons.items() if w is not None]
    reasons = {name: table(lambda b, name=name: np.broadcast_to(b.reasons[name], b.shape)) for name in known}
    ends = [table(lambda b, s=s: getattr(b, s)) for s in ("value", "lower", "upper")]
    told = {"name": "P(harm)"} | ({"note": note} if note else {})
    return Bound(ends[0], ends[1], ends[2], first.level, reasons, None, told)


def _of_rollouts(source: Any, depth: Any, widths: Coords, mixes: Coords, level: float) -> Any:
    tally = tally_of(source)
    measured = tuple(np.unique(tally.prefill).tolist())
    depths = measured if depth is None else _axis(depth, "depth")
    absent = [k for k in depths if k not in measured]
    if absent:
        raise InputError(
            f"No rollout has {forced(absent[:1])}.",
            cause=f"Measured were {', '.join(map(str, measured))}; nothing is interpolated.",
            next="Sweep measured depths, sample the missing ones, or sweep an estimated chain.",
        )
    parts = [cell(tally, k) for k in depths]
    cells = [[measured_width(p.events, p.totals, widths, c, level) for c in mixes] for p in parts]
    info: dict[str, Any] = {
        "source": "rollouts",
        "kind": "forced",
        "start": "rollouts with k forced tokens",
        "start_why": "every swept depth was measured",
        "estimate": [[b.info["estimate"] for b in row] for row in cells],
        "prompts": [len(p.prompt_id) for p in parts],
        "truncated": [float(p.truncated.sum() / p.totals.sum()) for p in parts],
    }
    if note := noted([row[0].info.get("note", "") for row in cells], [f"k = {k}" for k in depths]):
        info["note"] = note
    if None in mixes:
        found = [row[mixes.index(None)].info["icc"] for row in cells]
        ends = [np.array([getattr(b, s) for b in found]) for s in ("value", "lower", "upper")]
        why = [b.info["why"] for b in found]
        half = (ends[2] - ends[1]) / 2
        info["icc"] = Bound(ends[0], ends[1], ends[2], level, {"sampling": half}, None, {"name": "ICC", "why": why})
    return depths, cells, info


def _of_profile(source: Profile, depth: Any, widths: Coords, mixes: Coords) -> Any:
    if depth is None:
        raise InputError(
            "A profile has no depths of its own.",
            cause="Its depth axis is the trained depth.",
            next="Pass e.g. depth=range(33).",
        )
    if None in mixes and len(mixes) > 1:
        raise InputError(
            "A profile has no measured correlation.",
            cause="It is a closed form, not rollouts.",
            next="Pass numbers as correlation, 0 for independent answers.",
        )
    depths = _axis(depth, "depth")
    q = source.harm(depths)
    cells = [[_through(q[i], widths, 0.0 if c is None else c) for c in mixes] for i in range(len(depths))]
    floor = source.floor()
    below = _stack([[_through(floor, widths, 0.0 if c is None else c) for c in mixes]], mixes == (None,))[0]
    info = {
        "source": "profile",
        "kind": "trained",
        "start": "the prompt, nothing forced",
        "start_why": "the depth axis is the trained depth",
        "estimate": "closed form; " + ("independent answers" if mixes == (None,) else "beta-binomial over the axis"),
        "floor": below,
    }
    return depths, cells, info


def _through(q: Bound, widths: Coords, rho: float) -> Bound:
    """A scalar bound of one answer's harm, carried through the ensemble; harm rises with q, so the ends stay ends."""
    ends = {s: ensemble_harm(getattr(q, s), widths, rho) for s in ("value", "lower", "upper")}
    reasons = {}
    for name, half in q.reasons.items():
        if half is not None:
            low, high = max(q.value - half, 0.0), min(q.value + half, 1.0)
            reasons[name] = (ensemble_harm(high, widths, rho) - ensemble_harm(low, widths, rho)) / 2
    return Bound(ends["value"], ends["lower"], ends["upper"], q.level, reasons)


def _of_chain(chain: Chain, depth: Any, widths: Coords, mixes: Coords, level: float) -> Any:
    depths, why = _depths(chain, depth)
    laws, info = _laws(chain, depths)
    h = hitting_probability(chain, "harm", level=level)
    tally = prompts_behind(chain)
    cells = []
    for k, law in zip(depths, laws):
        here = h[min(k, chain.n_layers)] if chain.is_layered else h
        start = h.start if k == 0 and chain.start is not None and np.array_equal(law, chain.start) else None
        mean = _held(_branch(here, law, (1,), start), tally, k, (1,))
        wide = _held(_branch(here, law, widths, start), tally, k, widths, mean)
        cells.append([wide if c is None else _through(mean[0], widths, c) for c in mixes])
    rows = [np.asarray(h.value)[min(k, chain.n_layers)] if chain.is_layered else np.asarray(h.value) for k in depths]
    share = np.array([_alike(row, law) for row, law in zip(rows, laws)])
    info |= {
        "source": "chain",
        "kind": "forced",
        "depth_why": why,
        "estimate": "answers share the state after k tokens, independent from there on",
        "icc": share,
        "note": note_of(tally, depths, widths),
    }
    return depths, cells, info


def _depths(chain: Chain, depth: Any) -> tuple[Coords, str]:
    """The depth axis and where it comes from."""
    if depth is not None:
        return _axis(depth, "depth"), "as asked"
    if len(chain.entry) > 1 or (chain.entry and chain.start is None):
        return tuple(sorted(chain.entry)), "the depths with a measured state law"
    if chain.start is None:
        raise InputError(
            "This chain has neither a start law nor a measured state law.",
            cause="Without one of them it does not know where an answer begins.",
            next="Give the chain start=..., or estimate it from rollouts.",
        )
    last = min(DEFAULT, chain.n_layers - 1) if chain.is_layered else DEFAULT
    depths = tuple(k for k, _, _ in _walk(chain, last))
    if not depths:
        raise InputError(
            "Every answer of this chain starts in an outcome.",
            cause="Its start law has no mass outside the outcomes, so nothing can be forced.",
            next="Give the chain another start law.",
        )
    end = "" if depths[-1] == DEFAULT else ", where the last layer begins"
    if depths[-1] < last:
        end = ", behind which every answer has an outcome"
    return depths, f"by default: 0 to {depths[-1]}{end}"


def _held(b: Bound, tally: Any, k: int, widths: Coords, one: Bound | None = None) -> Bound:
    """`b` with upper ends held up to what the prompts behind the chain support; `one` is the bound of width 1."""
    if tally is None:
        return b
    harm = b.value[0] if one is None else one.value[0]
    least = supported(tally, k, float(harm), widths, b.level)
    if one is not None and not (tally.prefill == k).any():
        least = np.maximum(least, one.upper[0])
    upper = np.maximum(b.upper, least)
    reasons = b.reasons | {"sampling": np.where(upper > b.upper, (upper - b.lower) / 2, b.reasons["sampling"])}
    return Bound(b.value, b.lower, upper, b.level, reasons, None, dict(b.info))


def _alike(h: NDArray, law: NDArray) -> float:
    """Correlation of two answers that share the state, Var h(X) / (E h (1 - E h)); nan if harm is certain or absent."""
    mean = float(law @ h)
    return float(law @ (h - mean) ** 2) / (mean * (1 - mean)) if 0 < mean < 1 else float("nan")


def _branch(h: Bound, law: NDArray, widths: Coords, start: Bound | None) -> Bound:
    """E over the state law of h^m, from the enclosure of h state by state."""
    m = np.array(widths)[:, None]
    on = law > 0  # so that a state that is never entered widens nothing

    def mean(x: Any) -> NDArray:
        return np.clip(np.power(np.clip(np.asarray(x)[on], 0.0, 1.0)[None, :], m) @ law[on], 0.0, 1.0)

    value = mean(h.value)
    lower, upper = np.minimum(mean(h.lower), value), np.maximum(mean(h.upper), value)
    known = {name: np.broadcast_to(w, h.shape) for name, w in h.reasons.items() if w is not None}
    reasons = {name: (mean(h.value + w) - mean(h.value - w)) / 2 for name, w in known.items()}
    if start is not None:
        # At the start the clustered interval of the rollouts is there too; the wider of both is kept.
        power = np.array(widths)
        low, high = np.power(start.lower, power), np.power(start.upper, power)
        one = power == 1
        lower = np.where(one, np.minimum(start.lower, value), np.minimum(lower, low))
        upper = np.where(one, np.maximum(start.upper, value), np.maximum(upper, high))
        if "sampling" in reasons:
            reasons["sampling"] = (upper - lower) / 2
    return Bound(value, lower, upper, h.level, reasons)


def _laws(chain: Chain, depths: Coords) -> tuple[list[NDArray], dict[str, Any]]:
    """The state law at every depth, all of one kind."""
    missing = [k for k in depths if k not in chain.entry]
    if not missing:
        return [chain.entry[k] for k in depths], {
            "start": "entry[k]: the measured state law after k forced tokens",
            "start_why": "every swept depth was measured",
        }
    if chain.start is None:
        raise InputError(
            f"This chain has neither a start law nor a state law after {forced(missing[:1])}.",
            cause="Without one of them it does not know where an answer begins.",
            next="Give the chain start=..., or estimate it from rollouts.",
        )
    if chain.is_layered and depths[-1] > chain.n_layers:
        raise InputError(
            f"Depth {depths[-1]} lies behind the last of {chain.n_layers} layers.",
            cause="A layered chain ends there.",
            next=f"Sweep depths up to {chain.n_layers}.",
        )
    found = {k: (law, share) for k, law, share in _walk(chain, depths[-1])}
    if depths[-1] not in found:
        first = min(k for k in depths if k not in found)
        raise InputError(
            f"No answer is without an outcome after {first} token{'' if first == 1 else 's'}.",
            cause="All mass of the chain has ended in an outcome by then.",
            next=f"Sweep depths below {first}.",
        )
    why = f"there is no measured state law after {forced(missing)}"
    if chain.entry:
        why += f"; measured laws exist for {forced(sorted(chain.entry))}, sweep these alone to use them"
    return [found[k][0] for k in depths], {
        "start": "the chain conditioned on no outcome in k steps",
        "start_why": why,
        "alive": [found[k][1] for k in depths],
    }


def _walk(chain: Chain, last: int) -> Iterator[tuple[int, NDArray, float]]:
    """Depth, state law given no outcome so far, and the share of such answers, while there are any."""
    dead, share = chain.outcome_mask, 1.0
    v = np.asarray(chain.start)
    for k in range(last + 1):
        v = np.where(dead, 0.0, v if k == 0 else chain.layers[k - 1 if chain.is_layered else 0].T @ v)
        total = float(v.sum())
        if total <= 0:
            return
        share, v = share * total, v / total  # keeps deep laws off underflow
        yield k, v, share
