"""Where answers begin: the depths of a chain's own, and its state law after k forced tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain
from ..errors import InputError
from ..evidence.cells import forced
from .block import axis

__all__ = ["depths_of", "laws_at"]

DEFAULT = 20  # deepest depth of a chain's own axis


def depths_of(chain: Chain, depth: Any = None) -> tuple[tuple[int, ...], str]:
    """The depths to sweep, and where they come from."""
    if depth is not None:
        return axis(depth, "depth"), "as asked"
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


def laws_at(chain: Chain, depths: tuple[int, ...]) -> tuple[list[NDArray], dict[str, Any]]:
    """The state law at every depth, all of one kind, and which one that is."""
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
