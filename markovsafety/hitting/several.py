"""Several targets or several starts in one call: the answers of the single calls side by side.

What the calls share, the rates of the chain and the factors of its cyclic classes, is kept with the chain, so each
further target or start costs a substitution and its proof."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import REASONS, Bound
from ..chains import Chain
from ..chains.checks import as_law
from ..errors import InputError, UntrustedError

__all__ = ["beside", "each_start", "each_target", "laws_of", "named_targets"]

NESTED = ("exact", "expression")  # what `info` holds by state


def named_targets(target: Any) -> dict[str, Any] | None:
    """The targets by name if several were given, else None.

    Raises
    ------
    InputError
        If the mapping is empty or a name is no text.
    """
    if not isinstance(target, Mapping):
        return None
    if target and all(isinstance(name, str) for name in target):
        return dict(target)
    raise InputError(
        f"The targets are {target!r}.",
        cause="Several targets are a dict from names to targets, with one of them at least.",
        next='Pass for instance {"harm": "harm", "either": ["harm", "refusal"]}.',
    )


def each_target(targets: Mapping[str, Any], one: Callable[[Any], Bound]) -> Bound:
    """One answer per target, side by side in a new last axis.

    Raises
    ------
    UntrustedError
        If one could not be proven; `partial` has all of them.
    """
    found: dict[str, Bound] = {}
    errors: dict[str, UntrustedError] = {}
    for name, target in targets.items():
        try:
            found[name] = one(target)
        except UntrustedError as error:
            if not isinstance(error.partial, Bound):
                raise
            found[name], errors[name] = error.partial, error
    bounds = list(found.values())
    joint = beside(bounds, -1)
    info = {**joint.info, "name": ", ".join(str(b.info.get("name", name)) for name, b in found.items())}
    info |= {"targets": list(found), "why": {name: b.info.get("why") for name, b in found.items()}}
    start = None if joint.start is None else replace(joint.start, info={**joint.start.info, "targets": list(found)})
    joint = replace(joint, info=info, start=start)
    if not errors:
        return joint
    name, error = next(iter(errors.items()))
    raise UntrustedError(f"{name}: {error.fact}", cause=error.cause, next=error.next, partial=joint)


def beside(bounds: Sequence[Bound], axis: int) -> Bound:
    """Bounds of one shape along a new axis; an interval's level is the lowest, a reason is known if it is in all."""
    put = lambda parts: np.stack([np.asarray(x, dtype=np.float64) for x in parts], axis=axis)  # noqa: E731
    value, lower, upper = (put([getattr(b, name) for b in bounds]) for name in ("value", "lower", "upper"))
    reasons: dict[str, Any] = {}
    for reason in REASONS:
        widths = [b.reasons[reason] for b in bounds]
        if all(w is not None for w in widths):
            reasons[reason] = put([np.broadcast_to(w, b.shape) for w, b in zip(widths, bounds)])
    starts = [b.start for b in bounds if b.start is not None]
    start = beside(starts, 0) if len(starts) == len(bounds) else None
    return Bound(value, lower, upper, min(b.level for b in bounds), reasons, start, _info(bounds, axis))


def _info(bounds: Sequence[Bound], axis: int) -> dict[str, Any]:
    """What the bounds say alike; methods joined, certified only if all are, values by state side by side."""
    first = bounds[0].info
    info = {k: v for k, v in first.items() if k not in NESTED and all(_same(b.info.get(k), v) for b in bounds)}
    names = dict.fromkeys(str(b.info.get("name")) for b in bounds)
    info["name"] = next(iter(names)) if len(names) == 1 else ", ".join(names)
    methods = dict.fromkeys(b.info["method"] for b in bounds if b.info.get("method"))
    if methods:
        info["method"] = ", ".join(methods)
    if "certified" in first:
        info["certified"] = all(b.info.get("certified") for b in bounds)
    notes = dict.fromkeys(b.info["note"] for b in bounds if "note" in b.info)
    if notes:
        info["note"] = "; ".join(notes)
    for key in NESTED:
        if all(key in b.info for b in bounds):
            values = [b.info[key] for b in bounds]
            info[key] = values if axis == 0 or not isinstance(values[0], list) else _zipped(values)
    return info


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, (str, bool, int, float, tuple)) and a == b


def _zipped(parts: list[Any]) -> list[Any]:
    """Nested lists of one shape with a new innermost level."""
    return [_zipped(list(p)) if isinstance(p[0], list) else list(p) for p in zip(*parts)]


def laws_of(chain: Chain, start: Any) -> tuple[list[NDArray[np.float64]], bool]:
    """The start laws that an argument names, and whether it names several.

    Parameters
    ----------
    chain : Chain
    start : int, label, law of shape (n,), array of shape (s, n), or sequence of indices, labels and laws
        None: the chain's own. A flat sequence of whole numbers is one of indices, of floats a law.

    Raises
    ------
    InputError
        If it is empty, names no state, or holds something that is no law.
    """
    if start is None and chain.start is not None:
        return [chain.start], False
    lookup = chain._lookup
    law = lambda x: np.array(as_law(x, chain.n_states, lookup, chain._name, "start"))  # noqa: E731
    if isinstance(start, np.ndarray) and start.ndim == 1 and start.dtype.kind == "f" and start.size:
        return [law(start)], False  # without a look at every entry
    items = start.tolist() if isinstance(start, np.ndarray) and start.ndim == 1 else start
    if not isinstance(items, (list, tuple, range, np.ndarray)) or _known(items, lookup):
        return [law(start)], False
    items = list(items)
    if not items:
        raise InputError("start is empty.", cause="There is no law in it.", next="Pass a start, or leave it out.")
    if not all(isinstance(x, (bool, int, float, np.number)) for x in items):
        return [law(x) for x in items], True
    if any(isinstance(x, (float, np.floating)) for x in items):
        return [law(items)], False
    if len(items) == chain.n_states > 1 and sum(items) == 1:
        raise InputError(
            f"start is {items!r}.",
            cause="These whole numbers are a law as well as indices.",
            next="Pass a law as floats, several laws as rows of an array, several indices in another order.",
        )
    return [law(x) for x in items], True


def _known(x: Any, lookup: Mapping[Any, int]) -> bool:
    try:
        return x in lookup
    except (TypeError, ValueError):
        return False


def each_start(chain: Chain, start: Any, one: Callable[[NDArray], Bound]) -> Bound:
    """The answer for a start, or for several in a new first axis."""
    laws, several = laws_of(chain, start)
    return beside([one(law) for law in laws], 0) if several else one(laws[0])
