"""Published rates of harm that the theory is held against, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import InputError
from .profile import whole
from .width import unit

__all__ = ["PUBLISHED", "Rates"]


@dataclass(frozen=True)
class Rates:
    """Rates of harm at several depths (or steps), as a paper prints them.

    Parameters
    ----------
    at : tuple of int
        Numbers of forced tokens, or of gradient steps; rising.
    rate : tuple of float
        In [0, 1].
    sd : tuple of float or None, optional
        Standard deviations between repeated runs, None where none is printed. They say how much decoding varies, not
        which prompts were asked.
    n : int, optional
        Number of prompts behind each rate.
    source : str
    notes : tuple of str
        What to keep in mind.

    Examples
    --------
    Rates as a paper prints them, in the form that `fit_hazards` takes:

    >>> rates = ms.depth.Rates((0, 5, 20), (0.02, 0.4, 0.5), n=300, source="Table 1")
    >>> ms.depth.fit_hazards(rates).refusal.value.round(3)
    array([0.95, 0.2 ])
    >>> ms.depth.PUBLISHED["prefill"].rate
    (0.015, 0.421, 0.515, 0.561, 0.57)
    """

    at: tuple[int, ...]
    rate: tuple[float, ...]
    sd: tuple[float | None, ...] | None = None
    n: int | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        at, rate = tuple(whole(list(self.at), "at").tolist()), tuple(unit(list(self.rate), "rate").tolist())
        sd = (None,) * len(at) if self.sd is None else tuple(self.sd)
        unit([x for x in sd if x is not None], "sd")
        sizes = {len(at), len(rate), len(sd)}
        if len(sizes) > 1 or not at or list(at) != sorted(set(at)) or (self.n is not None and self.n < 1):
            raise InputError(
                f"{len(at)} depths, {len(rate)} rates, {len(sd)} deviations, n = {self.n}.",
                cause="There is one rate for each depth, depths rise, and at least one prompt was asked.",
                next="Pass tuples of one length.",
            )
        for name, value in (("at", at), ("rate", rate), ("sd", sd)):
            object.__setattr__(self, name, value)


_QI = "arXiv 2406.05946"
_OFF = (
    "the forced prefixes are those of another, jailbroken model, not of the one under test",
    "harm at 0 is of Table 4, measured under another prompt set-up than Table 3 (in Table 1 it is 0)",
)


def _table3(which: str, rates: tuple[float, ...], sd: tuple[float, ...]) -> Rates:
    source = f"{_QI}, Table 3, Llama-2-7B-Chat {which}, HEx-PHI (330 instructions)"
    return Rates((5, 10, 20, 40), rates, sd, 330, source, _OFF[:1])


_INITIAL = _table3("initial", (0.421, 0.515, 0.561, 0.570), (0.009, 0.016, 0.025, 0.004))

PUBLISHED: Mapping[str, Rates] = MappingProxyType(
    {
        "prefill": Rates(
            (0, *_INITIAL.at), (0.015, *_INITIAL.rate), (None, *(_INITIAL.sd or ())), 330, _INITIAL.source, _OFF
        ),
        "prefill, augmented": _table3("augmented", (0.028, 0.029, 0.034, 0.045), (0.004, 0.002, 0.006, 0.006)),
        "fine-tuning": Rates(
            (0, 2, 4, 6),
            (0.015, 0.224, 0.764, 0.879),
            None,
            330,
            f"{_QI}, fine-tuning attack on Llama-2-7B-Chat by gradient steps on 100 harmful pairs",
            ("the end of the attack is 0.889 (Table 4)",),
        ),
    }
)
"""Rates by name: "prefill" and "prefill, augmented" (arXiv 2406.05946, Table 3), "fine-tuning" (the same)."""
