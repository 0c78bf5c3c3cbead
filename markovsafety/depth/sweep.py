"""sweep: one front door from rollouts, a chain or a closed form to harm over depth, width, capacity and attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, check_level
from ..chains import Chain
from ..errors import InputError, UntrustedError
from .block import ENDS, Asked, Block, Coords, as_block, axis, correlations, laws_of, names_of
from .forms import of_form
from .grid import Grid, Needed
from .over_attacks import over_laws
from .sources import of_chain, of_numbers, of_rollouts
from .width import check_rule

__all__ = ["Grid", "Needed", "sweep"]

NOTHING = "no source was given for it"


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
    model: str = "beta-binomial",
) -> Grid:
    """Harm over depth and width, and where asked over capacity, correlation and attack.

    Parameters
    ----------
    source : Rollouts, Counts, Chain, Profile, Checkpoint, Hazards or LeakyRefusal, or a mapping or function of these
        Where the harm comes from. A mapping ``{capacity: source}`` makes the axis of capacities, as does a function of
        the capacity; each entry may itself be ``{trained depth: source}`` with Rollouts, Chains, scalar Bounds (nothing
        forced) or ``{k: Bound}``. None, or the reason as text, stands for a model that was not trained, or failed its
        checks.
    depth : int or sequence of int, optional
        Rollouts and Chain: numbers k of forced tokens; None = all that were measured, or for a chain with fewer than
        two measured state laws 0 to 20, as far as some answer is still without an outcome (layered: before the last
        layer ends). Closed forms: trained depths d.
    width : int or sequence of int
        Numbers of answers, combined by `rule`.
    capacity : sequence, optional
        The capacities to show, for a mapping (None: all of it) or a function.
    correlation : None, or a sequence of numbers and "measured"
        None: no such axis; the correlation is what the source itself says (Rollouts: measured, see `measured_width`;
        Chain: answers share the state after the k tokens and are independent from there on, and for an estimated chain
        no upper end is below what its prompts support; closed forms: independent).
        A number: answers are alike as `model` says with that intra-class correlation, 0 = independent. "measured": as
        None.
    rule : str
        How answers are combined: "any-refusal", "majority", "2-refusals" and so on.
    attack : AttackLaw, mapping {k: weight}, or a sequence of these, optional
        Law of the number K of forced tokens, an axis. The mean over K is taken after the ensemble, for all answers face
        the same forced tokens. Closed forms: mean of h(K; d). Rollouts and Chain: depth becomes the most that the
        attack forces, h is the mean of h(min(K, k)); without depth, all of the law. Every k that has weight must have
        been measured; a chain has them all.
    level : float
        Confidence level of the intervals.
    model : str
        How answers of a given correlation are alike: "beta-binomial", "copula", "common-shock".

    Returns
    -------
    Grid
        With ``grid.harm``, ``grid.needed(harm=eps)``, ``grid.pareto(...)`` and ``grid.info``, which names the start law
        of the depth axis: for a Chain ``entry[k]`` if every swept depth was measured, else the chain conditioned on no
        outcome in k steps. Cells that were not trained or not measured are nan in [0, 1]; ``grid.info["absent"]`` says
        why, and no budget holds there.

    Raises
    ------
    InputError
        If a depth was not measured, the source has no harm, or something is asked that does not exist.

    Notes
    -----
    Our own. Closed forms are evaluated for all cells at once. Means over an attack add the ends of intervals that hold
    together by Bonferroni's inequality, for the same prompts are behind all of them.

    Examples
    --------
    Eight answers, all of which have to be harmful, keep harm within 5 % after one forced token:

    >>> grid = ms.sweep(ms.toy.shallow(3), depth=[0, 1, 3], width=[1, 2, 8])
    >>> grid
    <Grid P(harm) by depth 3, width 3: 4.29e-05 to 0.8, proven>
    >>> print(grid.needed(harm=0.05))
    harm within 0.05 (by the upper end):
      width 1: withstands nothing, not even the smallest depth
      width 2: withstands nothing, not even the smallest depth
      width 8: withstands 1 forced token
      none: harm at 0 forced tokens exceeds 0.05 there
    """
    check_rule(rule)
    check_level(level)
    widths, mixes, laws = axis(width, "width", least=1), correlations(correlation), laws_of(attack)
    asked = Asked(widths, mixes, laws, rule, model, level, chosen=correlation is not None)
    asked.ensemble(0.5, np.array(asked.widths), 0.0)  # refuses a rule, width or model before any work
    coords: dict[str, Coords] = {"width": asked.widths}
    if isinstance(source, Mapping) or (callable(source) and not _is_form(source)):
        names, blocks, absent = _by_capacity(source, capacity, depth, asked)
        coords["capacity"] = names
    elif capacity is not None:
        raise InputError(
            f"A single {type(source).__name__} has no capacity.",
            cause="Capacity is an axis over models: each value needs a source of its own.",
            next="Pass {capacity: source}, or a function of the capacity.",
        )
    else:
        blocks, absent = [_block_of(source, depth, asked)], []
    if correlation is not None:
        coords["correlation"] = tuple("measured" if c is None else c for c in asked.mixes)
    if attack is not None:
        coords["attack"] = names_of(asked.laws)
    return _grid(blocks, coords, absent, asked)


def _is_form(source: Any) -> bool:
    return callable(getattr(source, "harm", None))


def _block_of(source: Any, depth: Any, asked: Asked) -> Block:
    if isinstance(source, Chain):
        return over_laws(of_chain, source, depth, asked)
    if _is_form(source):
        return of_form(source, depth, asked)
    return over_laws(of_rollouts, source, depth, asked)


# --- capacity ---


def _by_capacity(source: Any, capacity: Any, depth: Any, asked: Asked) -> tuple[Coords, list[Any], list[dict]]:
    """Capacities, a block (or None) for each, and why cells are absent."""
    if capacity is None and not isinstance(source, Mapping):
        raise InputError(
            "A function of the capacity needs capacities.",
            cause="It does not say for which values it can be asked.",
            next="Pass e.g. capacity=[8, 16, 32].",
        )
    given = source if capacity is None else [capacity] if isinstance(capacity, (str, int, float)) else capacity
    names = tuple(x.item() if isinstance(x, np.generic) else x for x in dict.fromkeys(given))
    if all(isinstance(x, (int, float)) for x in names):
        names = tuple(sorted(names))
    if not names:
        raise InputError("There is no capacity.", cause="An axis has values.", next="Pass {capacity: source}.")
    get = source if callable(source) else lambda name: source.get(name, NOTHING)
    blocks, absent = [], []
    for name in names:
        try:
            part = get(name)
        except UntrustedError as error:
            part = error.fact
        if part is None or isinstance(part, str):
            blocks.append(None)
            absent.append({"capacity": name, "why": f"not trained: {part or NOTHING}"})
            continue
        if isinstance(part, Mapping):
            block, gaps = _trained(part, depth, asked)
            absent += [{"capacity": name, **gap} for gap in gaps]
        else:
            block = _measured(part, depth, asked)
            if block is None:
                absent.append({"capacity": name, "why": "not measured: none of these depths"})
        blocks.append(block)
    if all(b is None for b in blocks):
        raise InputError(
            "No capacity has a source.",
            cause="; ".join(dict.fromkeys(f"{gap['capacity']}: {gap['why']}" for gap in absent)),
            next="Train at least one of them.",
        )
    return names, blocks, absent


def _measured(source: Any, depth: Any, asked: Asked) -> Block | None:
    """The block of one capacity; of its rollouts only depths that were measured (the union over all is shown)."""
    if depth is None or isinstance(source, Chain) or _is_form(source) or asked.laws != (None,):
        return _block_of(source, depth, asked)
    from ..evidence.cells import tally_of

    known = set(np.unique(tally_of(source).prefill).tolist())
    there = [k for k in axis(depth, "depth") if k in known]
    return of_rollouts(source, there, asked) if there else None


def _trained(sources: Mapping[int, Any], depth: Any, asked: Asked) -> tuple[Block | None, list[dict]]:
    """Models of several trained depths as one block: harm with nothing forced, or the mean over the attack."""
    depths = axis(list(sources) if depth is None else depth, "depth")
    blocks, gaps = [], []
    for d in depths:
        part = sources.get(d, NOTHING)
        if part is None or isinstance(part, str):
            gaps.append({"depth": d, "why": f"not trained: {part or NOTHING}"})
        elif isinstance(part, (Bound, Mapping)):
            blocks.append((d, over_laws(of_numbers, {0: part} if isinstance(part, Bound) else part, None, asked)))
        else:
            blocks.append((d, _block_of(part, 0 if asked.laws == (None,) else None, asked)))
    if not blocks:
        return None, gaps
    joined = [{s: getattr(b, s) for s in ENDS} | b.reasons for _, b in blocks]
    names = set(joined[0]).intersection(*joined)
    parts = {name: np.concatenate([j[name] for j in joined]) for name in names}
    first = blocks[0][1]
    info = {
        **{k: v for k, v in first.info.items() if k in ("source", "estimate")},
        "kind": "trained",
        "start": "the prompt, nothing forced" if asked.laws == (None,) else "the mean over the attack",
        "start_why": "the depth axis is the trained depth, a model for each",
    }
    if notes := "; ".join(dict.fromkeys(b.info["note"] for _, b in blocks if b.info.get("note"))):
        info["note"] = notes
    level = min(b.level for _, b in blocks)
    return as_block(tuple(d for d, _ in blocks), parts, level, info), gaps


# --- one grid ---


def _grid(blocks: Sequence[Block | None], coords: dict[str, Coords], absent: list[dict], asked: Asked) -> Grid:
    there = [b for b in blocks if b is not None]
    kinds = {b.info["kind"] for b in there}
    if len(kinds) > 1:
        raise InputError(
            "Some capacities count forced tokens, others trained depths.",
            cause="Both are called depth, but more of one is a stronger attack and more of the other a stronger model.",
            next="Pass sources of one kind.",
        )
    depths = tuple(sorted({d for b in there for d in b.depths} | {gap["depth"] for gap in absent if "depth" in gap}))
    for name, block in zip(coords.get("capacity", ()), blocks):
        told = {gap.get("depth") for gap in absent if gap["capacity"] == name}
        for d in depths:
            if block is not None and d not in block.depths and d not in told:
                why = "not measured" if kinds == {"forced"} else f"not trained: {NOTHING}"
                absent.append({"capacity": name, "depth": d, "why": why})
    drop = tuple(2 + i for i, name in enumerate(("capacity", "correlation", "attack")) if name not in coords)

    def joined(get: Callable[[Block], NDArray], fill: float) -> NDArray:
        whole = [_placed(b, get, depths, fill, asked) for b in blocks]
        made = np.squeeze(np.stack(whole, axis=2) if len(whole) > 1 else whole[0][:, :, None], axis=drop)
        made = np.ascontiguousarray(made)
        made.flags.writeable = False
        return made

    names = sorted({name for b in there for name in b.reasons if all(name in o.reasons for o in there)})
    value = joined(lambda b: b.value, np.nan)
    sure = all(b.lower is b.value or np.array_equal(b.lower, b.value) for b in there) and len(there) == len(blocks)
    sure = sure and not absent and all(np.array_equal(b.upper, b.value) for b in there)
    lower, upper = (value, value) if sure else (joined(lambda b: b.lower, 0.0), joined(lambda b: b.upper, 1.0))
    reasons = {name: joined(lambda b, name=name: b.reasons[name], 0.5) for name in names}
    info = _info(there, blocks, coords, absent, asked)
    if "attack" in coords:
        info["attack"] = [_told(name, law) for name, law in zip(coords["attack"], asked.laws)]
    told = {"name": "P(harm)"} | ({"note": info["note"]} if info.get("note") else {})
    harm = Bound(value, lower, upper, min(b.level for b in there), reasons, None, told)
    if all(b.floor is not None for b in there) and len(there) == len(blocks):
        info["floor"] = _floor(blocks, drop, harm.level)
    ordered = {"depth": depths, **coords}
    return Grid(harm, tuple(ordered), ordered, info)


def _told(name: str, law: Any) -> dict[str, Any]:
    """A law of the attack in plain words."""
    fixed = law.tail == 0 and int(np.count_nonzero(law.pmf)) == 1
    return {"name": name, "mean": float(law.mean), "fixed": fixed, "endless": bool(law.tail > 0)}


def _placed(b: Block | None, get: Callable[[Block], NDArray], depths: Coords, fill: float, asked: Asked) -> NDArray:
    """Rows of a block at their depths, and `fill` where it has none."""
    if b is not None and b.depths == depths:
        return get(b)
    out = np.full((len(depths), len(asked.widths), len(asked.mixes), len(asked.laws)), fill)
    if b is not None:
        out[[depths.index(d) for d in b.depths]] = get(b)
    return out


def _floor(blocks: Sequence[Any], drop: tuple[int, ...], level: float) -> Bound:
    ends = [np.stack([b.floor[i] for b in blocks], axis=1) for i in range(3)]
    value, lower, upper = (np.squeeze(x, axis=tuple(i - 1 for i in drop)) for x in ends)
    return Bound(value, lower, upper, level, {}, None, {"name": "floor"})


def _info(
    there: Sequence[Block], blocks: Sequence[Any], coords: dict[str, Coords], absent: list[dict], asked: Asked
) -> dict:
    first = there[0].info
    info: dict[str, Any] = {"rule": asked.rule, **({"model": asked.model} if asked.model != "beta-binomial" else {})}
    if "capacity" not in coords:
        return info | first
    info |= {k: first[k] for k in ("source", "kind", "start", "start_why", "depth_why") if k in first}
    names = [str(name) for name in coords["capacity"]]
    for key in ("estimate", "prompts", "truncated", "icc"):
        if any(key in b.info for b in there):
            info[key] = {n: b.info.get(key) for n, b in zip(names, blocks) if b is not None}
    starts = {b.info.get("start") for b in there}
    if len(starts) > 1:
        info["start"] = "; ".join(f"{n}: {b.info.get('start')}" for n, b in zip(names, blocks) if b is not None)
    notes = list(dict.fromkeys(b.info["note"] for b in there if b.info.get("note")))
    if absent:
        info["absent"] = absent
        few = sorted({gap["why"].split(":")[0] for gap in absent})
        notes.append(f"{' or '.join(few)}: {_where(absent)}; no budget holds there")
    if notes:
        info["note"] = "; ".join(notes)
    return info


def _where(absent: list[dict]) -> str:
    places = [f"capacity {gap['capacity']}" + (f" at depth {gap['depth']}" if "depth" in gap else "") for gap in absent]
    return ", ".join(places[:6]) + (f" and {len(places) - 6} more" if len(places) > 6 else "")
