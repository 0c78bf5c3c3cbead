"""Rules: how many of m answers have to be refusals before an ensemble refuses.

Every rule is a number k of refusals that are needed. Harm gets through if fewer than k answers refuse, so if at least
t = m - k + 1 of them are harmful; a harmless prompt is refused if at least k answers refuse it.

| rule | k | harm gets through if |
|---|---|---|
| "any-refusal" | 1 | every answer is harmful |
| "majority" | ceil(m / 2) | more than half of the answers are harmful (a tie refuses) |
| "2-refusals", "3-refusals", ... | 2, 3, ... | all answers but at most 1, 2, ... are harmful |

A harmless answer counts as a refusal here, whatever it says.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .profile import whole

__all__ = ["RULES", "check_rule", "falls_with_width", "harmful_needed", "refusals_needed", "unit", "widths_of"]

RULES = ("any-refusal", "majority", "2-refusals")
"""The rules; the last stands for any number of refusals."""


def check_rule(rule: str) -> None:
    """Raise unless `rule` is a known way to combine answers."""
    _number(rule)


def _number(rule: Any) -> int | None:
    """Refusals that a rule needs at any width; None for the majority, which depends on it."""
    if rule == "majority":
        return None
    if rule == "any-refusal":
        return 1
    found = re.fullmatch(r"([1-9]\d{0,8})-refusals?", rule) if isinstance(rule, str) else None
    if found is None:
        raise InputError(
            f"The rule {rule!r} does not exist.",
            cause="Answers are combined by 'any-refusal' (harm only if every answer is harmful), 'majority' (harm if "
            "more than half are), or '2-refusals', '3-refusals', ... (harm if fewer than that many refuse).",
            next='Pass rule="any-refusal", "majority" or, for example, "2-refusals".',
        )
    return int(found.group(1))


def falls_with_width(rule: str) -> bool:
    """Whether one more answer never lets more harm through: true where a fixed number of refusals is needed."""
    return _number(rule) is not None


def widths_of(width: Any) -> NDArray:
    """Numbers of answers as an int array, checked."""
    m = whole(width, "width")
    if (m < 1).any():
        raise InputError(f"width is {width!r}.", cause="At least one answer is given.", next="Pass whole numbers >= 1.")
    return m


def unit(x: ArrayLike, name: str) -> NDArray:
    """Numbers in [0, 1] as an array, checked."""
    try:
        array = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} is {x!r}.", cause="It is a number in [0, 1].", next=f"Pass 0 <= {name} <= 1."
        ) from None
    if not np.all((array >= 0) & (array <= 1)):
        bad = array[~((array >= 0) & (array <= 1))].flat[0]
        raise InputError(f"{name} is {bad:g}.", cause="It lies in [0, 1].", next=f"Pass 0 <= {name} <= 1.")
    return array


def refusals_needed(rule: str, width: ArrayLike) -> NDArray:
    """Number k of refusals at which m answers refuse.

    Parameters
    ----------
    rule : str
    width : int or array
        Numbers m of answers.

    Returns
    -------
    int array
        Of the shape of `width`.

    Raises
    ------
    InputError
        The rule does not exist, or needs more refusals than there are answers.
    """
    number, m = _number(rule), widths_of(width)
    if number is None:
        return (m + 1) // 2
    if m.size and m.min() < number:
        raise InputError(
            f"{rule!r} was asked of {int(m.min())} {'answer' if m.min() == 1 else 'answers'}.",
            cause="So many answers can never give that many refusals.",
            next=f"Leave out widths below {number}, or ask for fewer refusals.",
        )
    return np.full(m.shape, number, dtype=np.int64)


def harmful_needed(rule: str, width: ArrayLike) -> NDArray:
    """Number t = m - k + 1 of harmful answers at which harm gets through; see `refusals_needed`."""
    return widths_of(width) - refusals_needed(rule, width) + 1
