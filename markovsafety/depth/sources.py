"""Evidence over depth, width, correlation and attack: blocks of harm from rollouts and from chains.

The depth axis is the number k of forced tokens. With a law of the attack it is the most that the attack forces: harm is
the mean of h(min(K, k)) over the law of K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError
from ..evidence.cells import cell, tally_of
from ..hitting import hitting_probability
from .block import ENDS, Asked, Block, Coords, as_block, as_bound, axis, through
from .measured import measured_width
from .over_attacks import Weights, joint, mixed, shared, unmeasured
from .profile import noted
from .start import depths_of, laws_at
from .support import note_of, prompts_behind, supported

__all__ = ["of_chain", "of_numbers", "of_rollouts"]


def of_rollouts(source: Any, depth: Any, asked: Asked) -> Block:
    """Harm from rollouts, or whatever remembers them: nothing is interpolated between measured depths."""
    tally = tally_of(source)
    measured = tuple(np.unique(tally.prefill).tolist())
    depths, weights, rest = mixed(depth, asked, measured)
    ks = sorted({k for row in weights for w in row for k in w})
    absent = [k for k in ks if k not in measured]
    if absent:
        raise unmeasured(absent, measured, asked.laws, rest)
    parts = [cell(tally, k) for k in ks]
    level = joint(asked.level, weights)
    bounds = [_widths(p, asked, level) for p in parts]
    info: dict[str, Any] = {
        "source": "rollouts",
        "kind": "forced",
        "start": "rollouts with k forced tokens",
        "start_why": "every swept depth was measured",
        "estimate": [[b.info["estimate"] for b in row] for row in bounds],
        "prompts": [len(p.prompt_id) for p in parts],
        "truncated": [float(p.truncated.sum() / p.totals.sum()) for p in parts],
    }
    notes = [noted([row[0].info.get("note", "") for row in bounds], [f"k = {k}" for k in ks])]
    if asked.laws != (None,):
        info |= {"forced": ks, "start": "rollouts, the mean over the attack, which forces at most k tokens"}
        notes.append(shared(weights))
    if note := "; ".join(n for n in notes if n):
        info["note"] = note
    if None in asked.mixes:
        info["icc"] = _icc([row[asked.mixes.index(None)].info["icc"] for row in bounds], level)
    return _block(depths, ks, bounds, weights, rest, asked, info)


def of_numbers(harm: Mapping[int, Bound], depth: Any, asked: Asked) -> Block:
    """One model's harm by numbers of forced tokens, given as scalar bounds: with none, or the mean over the attack."""
    measured = axis(list(harm), "forced tokens")
    if any(not isinstance(b, Bound) or b.shape for b in harm.values()):
        raise InputError(
            "A model's harm by forced tokens is not a mapping to scalar bounds.",
            cause="Each number of forced tokens has one probability with its interval.",
            next="Pass {k: Bound}, rollouts or a chain.",
        )
    depths, weights, rest = mixed(0 if asked.laws == (None,) else depth, asked, measured)
    ks = sorted({k for row in weights for w in row for k in w})
    if absent := [k for k in ks if k not in measured]:
        raise unmeasured(absent, measured, asked.laws, rest)
    most = max(len(w) for row in weights for w in row)
    lost = most * max(1 - harm[k].level for k in ks)
    if lost >= 1:
        raise InputError(
            f"Means over {most} numbers of forced tokens say nothing.",
            cause=f"Intervals of level {harm[ks[0]].level:g} fail together with probability up to {lost:.3g}.",
            next="Give intervals of a higher level, or an attack with fewer numbers of tokens.",
        )
    bounds = []
    for k in ks:
        parts = through(harm[k], asked)
        bounds.append(
            [as_bound({n: x[:, c] for n, x in parts.items()}, harm[k].level) for c in range(len(asked.mixes))]
        )
    info = {"source": "bound", "kind": "forced", "start": "numbers as given", "estimate": "numbers as given"}
    block = _block(depths, ks, bounds, weights, rest, asked, info)
    return replace(block, level=1 - lost)


def _widths(part: Any, asked: Asked, level: float) -> list[Bound]:
    """Bounds over width, by correlation."""
    out = []
    for c in asked.mixes:
        if c is None or asked.model == "beta-binomial":
            out.append(measured_width(part.events, part.totals, asked.widths, c, level, asked.rule))
            continue
        rate = measured_width(part.events, part.totals, [1], c, level)
        one = replace(asked, mixes=(c,))
        ends = {name: x[0, :, 0] for name, x in through(rate, one).items()}
        how = [f"{asked.model}, correlation {c:g}"] * len(asked.widths)
        out.append(as_bound(ends, level, {**rate.info, "estimate": how}))
    return out


def _icc(found: list[Bound], level: float) -> Bound:
    ends = {s: np.array([getattr(b, s) for b in found]) for s in ENDS}
    info = {"name": "ICC", "why": [b.info["why"] for b in found]}
    return as_bound(ends | {"sampling": (ends["upper"] - ends["lower"]) / 2}, level, info)


def of_chain(chain: Chain, depth: Any, asked: Asked) -> Block:
    """Harm of a chain: answers share the state after the forced tokens, and are independent from there on."""
    if asked.laws == (None,):
        depth, why = depths_of(chain, depth)
    else:
        why = "the most that the attack forces" if depth is None else "as asked"
    depths, weights, rest = mixed(depth, asked, None)
    ks = sorted({k for row in weights for w in row for k in w})
    laws, info = laws_at(chain, tuple(ks))
    level = joint(asked.level, weights)
    h = hitting_probability(chain, "harm", level=level)
    tally = prompts_behind(chain)
    bounds, share = [], []
    for k, law in zip(ks, laws):
        here = h[min(k, chain.n_layers)] if chain.is_layered else h
        start = h.start if k == 0 and chain.start is not None and np.array_equal(law, chain.start) else None
        mean = _held(_branch(here, law, replace(asked, widths=(1,)), start), tally, k, (1,))
        wide = _branch(here, law, asked, start)
        if asked.rule == "any-refusal":
            wide = _held(wide, tally, k, asked.widths, mean)
        elif tally is not None:
            wide = _loosened(wide, mean, asked)
        bounds.append([wide if c is None else _assumed(mean[0], asked, c) for c in asked.mixes])
        share.append(_alike(np.asarray(here.value), law))
    notes = [note_of(tally, tuple(ks), asked.widths)]
    info |= {
        "source": "chain",
        "kind": "forced",
        "depth_why": why,
        "estimate": "answers share the state after k tokens, independent from there on",
        "icc": np.array(share),
    }
    if asked.laws != (None,):
        info |= {"forced": ks, "start": f"{info['start']}; the mean over the attack, which forces at most k tokens"}
        notes.append(shared(weights))
    info["note"] = "; ".join(n for n in notes if n)
    return _block(depths, ks, bounds, weights, rest, asked, info)


def _assumed(one: Bound, asked: Asked, c: float) -> Bound:
    """Width by an assumed correlation."""
    parts = {name: x[:, 0] for name, x in through(one, replace(asked, mixes=(c,))).items()}
    return as_bound(parts, one.level)


def _held(b: Bound, tally: Any, k: int, widths: Coords, one: Bound | None = None) -> Bound:
    """`b` with upper ends held up to what the prompts behind the chain support; `one` is the bound of width 1."""
    if tally is None:
        return b
    harm = b.value[0] if one is None else one.value[0]
    least = supported(tally, k, float(harm), widths, b.level)
    if one is not None and not (tally.prefill == k).any():
        least = np.maximum(least, one.upper[0])
    return _raised(b, np.maximum(b.upper, least))


def _loosened(b: Bound, one: Bound, asked: Asked) -> Bound:
    """Upper ends of rules that count refusals, where nothing says how alike prompts are.

    By Markov's inequality at least t of m answers are harmful with probability at most m q / t, whatever they share.
    """
    from .rules import harmful_needed

    m = np.array(asked.widths)
    most = np.minimum(m / harmful_needed(asked.rule, m) * one.upper[0], 1.0)
    return _raised(b, np.maximum(b.upper, most))


def _raised(b: Bound, upper: NDArray) -> Bound:
    reasons = b.reasons | {"sampling": np.where(upper > b.upper, (upper - b.lower) / 2, b.reasons["sampling"])}
    return Bound(b.value, b.lower, upper, b.level, reasons, None, dict(b.info))


def _alike(h: NDArray, law: NDArray) -> float:
    """Correlation of two answers that share the state, Var h(X) / (E h (1 - E h)); nan if harm is certain or absent."""
    mean = float(law @ h)
    return float(law @ (h - mean) ** 2) / (mean * (1 - mean)) if 0 < mean < 1 else float("nan")


def _branch(h: Bound, law: NDArray, asked: Asked, start: Bound | None) -> Bound:
    """E over the state law of the harm of m answers, from the enclosure of h state by state."""
    m = np.array(asked.widths)[:, None]
    on = law > 0  # so that a state that is never entered widens nothing
    plain = asked.rule == "any-refusal"

    def wide(x: NDArray, m: NDArray) -> NDArray:
        return np.power(x, m) if plain else asked.ensemble(x, m)

    def mean(x: Any) -> NDArray:
        return np.clip(wide(np.clip(np.asarray(x)[on], 0.0, 1.0)[None, :], m) @ law[on], 0.0, 1.0)

    value = mean(h.value)
    lower, upper = np.minimum(mean(h.lower), value), np.maximum(mean(h.upper), value)
    known = {name: np.broadcast_to(w, h.shape) for name, w in h.reasons.items() if w is not None}
    reasons = {name: (mean(h.value + w) - mean(h.value - w)) / 2 for name, w in known.items()}
    if start is not None:
        # At the start the clustered interval of the rollouts is there too; the wider of both is kept.
        power = m[:, 0]
        low, high = (wide(np.full(power.shape, x), power) for x in (start.lower, start.upper))
        one = power == 1
        lower = np.where(one, np.minimum(start.lower, value), np.minimum(lower, low))
        upper = np.where(one, np.maximum(start.upper, value), np.maximum(upper, high))
        if "sampling" in reasons:
            reasons["sampling"] = (upper - lower) / 2
    return Bound(value, lower, upper, h.level, reasons)


def _block(
    depths: Coords,
    ks: list[int],
    bounds: list[list[Bound]],
    weights: Weights,
    rest: dict[int, float],
    asked: Asked,
    info: dict[str, Any],
) -> Block:
    """The means over the attack of bounds over width, by number of forced tokens and correlation."""
    first = bounds[0][0]
    known = [name for name, w in first.reasons.items() if w is not None]
    parts = {s: _table(bounds, lambda b, s=s: getattr(b, s)) for s in ENDS}
    parts |= {name: _table(bounds, lambda b, name=name: np.broadcast_to(b.reasons[name], b.shape)) for name in known}
    if asked.laws == (None,):
        out = {name: part[..., None] for name, part in parts.items()}
    else:
        at = {k: i for i, k in enumerate(ks)}
        matrix = np.zeros((len(asked.laws), len(depths), len(ks)))
        for i, row in enumerate(weights):
            for a, law in enumerate(row):
                for k, w in law.items():
                    matrix[a, i, at[k]] = w
        out = {name: np.moveaxis(np.tensordot(matrix, part, 1), 0, -1) for name, part in parts.items()}
        out |= {s: np.clip(out[s], 0.0, 1.0) for s in ENDS}
        if rest:
            left = np.array([rest.get(a, 0.0) for a in range(len(asked.laws))])
            out["truncation"] = np.broadcast_to(left, out["value"].shape)
            out["lower"] = np.maximum(out["lower"] - left, 0.0)
            out["upper"] = np.minimum(out["upper"] + left, 1.0)
        out["lower"], out["upper"] = np.minimum(out["lower"], out["value"]), np.maximum(out["upper"], out["value"])
    level = asked.level if first.level < 1 else 1.0
    return as_block(depths, out, level, info)


def _table(bounds: list[list[Bound]], get: Any) -> NDArray:
    """An array of shape (forced tokens, width, correlation)."""
    return np.moveaxis(np.array([[np.asarray(get(b), dtype=np.float64) for b in row] for row in bounds]), 1, 2)
