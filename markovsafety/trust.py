"""How far to trust one model's numbers: every width that can be assessed, the chain's assumptions, the correlation of
answers that share their beginning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .arithmetic import widened
from .bound import Bound
from .errors import InputError, MarkovsafetyError, UntrustedError
from .evidence import (
    Branch,
    Check,
    Confusion,
    Finding,
    branch,
    censored_harm,
    confusion,
    corrected,
    with_misfit,
)
from .evidence.findings import judged

__all__ = ["correlation", "findings", "whole"]


def whole(
    rolls: Any, k: int, at_start: Bound | None, check: Check | None, labels: Any = None, level: float = 0.95
) -> tuple[Bound, list[str]]:
    """P(harm) after k forced tokens with every width that the data allow to assess.

    Parameters
    ----------
    rolls : Rollouts
        Judged.
    k : int
        Number of forced tokens.
    at_start : Bound or None
        The same probability from the chain; without one the measured share is taken.
    check : Check or None
        Of that chain.
    labels : Confusion, or what `confusion` takes, optional
        True outcomes of some of the rollouts.
    level : float

    Returns
    -------
    Bound
        Widths: sampling; judge where there are labels (the value is then the corrected one); truncation, which is 0
        where nothing was cut off; model, the misfit of the chain, where it was checked after forced tokens. The level
        allows for that of the misfit.
    list of str
        What stood in the way of a width.
    """
    limited = censored_harm(rolls, prefill=k, level=level)
    bound, hidden, notes = limited if at_start is None else at_start, float(limited.reasons["truncation"]), []
    if labels is not None:
        bound, notes = _labelled(rolls, k, labels, level)
    if bound.reasons["truncation"] is None:
        # What was cut off may have been harm: the upper end moves by that share, and by its sampling error.
        more = max(2 * hidden, limited.upper - bound.upper) if hidden else 0.0
        bound = widened(bound, least=0.0, most=1.0, truncation=(0.0, more))
    if at_start is not None and check is not None and check.misfit is not None:
        try:
            bound = with_misfit(bound, check)
        except InputError as error:
            notes.append(f"The misfit of the chain is no width here: {error.fact}")
    return replace(bound, info={**bound.info, "name": "P(harm)"}), notes


def _labelled(rolls: Any, k: int, labels: Any, level: float) -> tuple[Bound, list[str]]:
    """P(harm) with the judge's errors taken out; kept, with a note, if the judge may be a coin."""
    found, notes = labels if isinstance(labels, Confusion) else confusion(rolls, labels), []
    try:
        harm = corrected(rolls, found, level=level)
    except UntrustedError as error:
        harm = error.partial
        notes.append(f"{error.fact} {error.next}")
    return harm[harm.info["coords"]["depth"].index(k)], notes


def findings(check: Check | None) -> tuple[Finding, ...]:
    """What a check says of a chain's assumptions, the time of the first hit included.

    Parameters
    ----------
    check : Check or None

    Returns
    -------
    tuple of Finding
    """
    if check is None:
        return ()
    curve = check.curve
    if curve is None:
        return check.findings
    gap = Bound(curve["gap"], curve["gap_lower"], curve["gap_upper"], check.level)
    said = (
        f"P(harm within t tokens) is predicted with a largest gap of {gap.value:.3f} "
        f"[{gap.lower:.3f}, {gap.upper:.3f}], at {curve['at']} tokens."
    )
    return (*check.findings, Finding("time of the first hit", judged(gap, check.margin), said, gap))


def correlation(rolls: Any, level: float = 0.95) -> Branch | None:
    """Branch correlation by number of forced tokens; None where no prefix has several continuations, or it cannot be
    seen at any depth.

    Parameters
    ----------
    rolls : Rollouts
    level : float

    Returns
    -------
    Branch or None
    """
    try:
        return branch(rolls, level=level)
    except MarkovsafetyError:
        return None
