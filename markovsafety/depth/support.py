"""What the prompts behind an estimated chain support: how low the upper end of its harm may go.

A chain mixes the prompts that it was estimated from. Two answers share no more than a state there, so the power of its
harm lacks what the answers to one prompt have in common, and its visits count tokens, not prompts. Its upper ends are
therefore held up to what the prompts themselves say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import clopper_pearson
from ..chains import Chain
from ..chains.tally import Tally
from ..evidence.cells import cell, forced, tally_of
from .measured import measured_width
from .profile import noted

__all__ = ["note_of", "prompts_behind", "supported"]

PLAIN = (
    "the state law and the Markov property are taken as given (see check); differences between prompts that the states "
    "do not show are not in the chain, so its widths promise too much where prompts differ"
)


def prompts_behind(chain: Chain) -> Tally | None:
    """The rollouts of an estimated chain by prompt; None for a chain whose numbers were given."""
    if chain.evidence is None or chain.is_layered or chain.evidence.outcomes.sum() == 0:
        return None
    return tally_of(chain)


def supported(tally: Tally, k: int, harm: float, widths: tuple[Any, ...], level: float) -> NDArray:
    """Smallest upper ends that the prompts allow, for one depth.

    Parameters
    ----------
    tally : Tally
        The rollouts behind the chain.
    k : int
        Number of forced tokens.
    harm : float
        Harm of one answer by the chain.
    widths : tuple of int
    level : float

    Returns
    -------
    array, shape (W,)
        Where rollouts have k forced tokens: the upper ends of `measured_width` for them (without credit for width if
        they are weighted). Elsewhere nothing is known of how prompts differ: E[h^m] <= E[h] gives width no credit, and
        one answer's harm is known no better than from the effective number of rollouts at the smallest depth that was
        measured (which is the number of prompts where no harm was seen).
    """
    part = cell(tally, k)
    if len(part.totals):
        whole = all(bool(np.all(a == np.floor(a))) for a in (part.events, part.totals))
        return np.asarray(measured_width(part.events, part.totals, widths, None if whole else 1.0, level).upper)
    size = cell(tally, int(tally.prefill[tally.outcomes.sum(axis=1) > 0].min())).bound(level).info["n_eff"]
    return np.full(len(widths), clopper_pearson(min(max(harm, 0.0), 1.0) * size, size, level)[1])


def measured_at(tally: Tally, k: int) -> bool:
    """Whether any rollout behind the chain has k forced tokens."""
    return len(cell(tally, k).totals) > 0


def note_of(tally: Tally | None, depths: tuple[int, ...], widths: tuple[Any, ...]) -> str:
    """What the intervals of a chain's grid leave out, and what holds their upper ends up."""
    if tally is None:
        return PLAIN
    parts = ["the state law and the Markov property are taken as given (see check)"]
    known = [k for k in depths if measured_at(tally, k)]
    other = [k for k in depths if k not in known]
    ends = []
    if known:
        ends.append(f"with {forced(known)} they are at least those of the rollouts themselves")
    if other:
        credit = "width earns no credit and " if max(widths) > 1 else ""
        ends.append(
            f"with {forced(other)}, where no prompt was sampled, {credit}the effective number of rollouts counts"
        )
    parts.append(
        "the answers of the chain share a state, not a prompt, so the upper ends are held up to what its prompts "
        f"support: {'; '.join(ends)} (a number as correlation assumes how alike answers are instead)"
    )
    first = int(tally.prefill[tally.outcomes.sum(axis=1) > 0].min())
    seen = [cell(tally, k if k in known else first).bound().info.get("note", "") for k in depths]
    lonely = noted(seen, [f"k = {k}" for k in depths])
    return "; ".join([*parts, *([lonely] if lonely else [])])
