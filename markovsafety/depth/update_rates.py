"""Whether an update of one probability moves it, and how fast what is left falls, in words; `verdict_of` says them."""

from __future__ import annotations

import math

from .schedules import ConstantSteps, GeometricSteps, HarmonicSteps, Schedule, total
from .updates import AdditiveBias, ConvexMix, CrossEntropyFlow, LogitSteps, Update

__all__ = ["moves", "rate"]


def moves(update: Update, p0: float) -> tuple[bool, str]:
    """Whether anything ever moves, and why not."""
    if isinstance(update, AdditiveBias) and update.bias + update.elsewhere == 0:
        return False, "a row without bias never moves"
    if isinstance(update, (LogitSteps, CrossEntropyFlow)) and p0 == 0:
        return False, "odds of zero stay zero whatever they are multiplied by"
    if not isinstance(update, CrossEntropyFlow) and float(total(update.schedule)) == 0:
        return False, "no step has a size"
    return True, ""


def rate(update: Update) -> str:
    """How fast the rest falls under an update that never stops."""
    if isinstance(update, CrossEntropyFlow):
        K = update.classes
        return f"the rest falls like {(K - 1) / (K * update.rate):.4g} / t"
    schedule = update.schedule
    power = isinstance(schedule, HarmonicSteps)
    if isinstance(update, AdditiveBias):
        beta = update.bias + update.elsewhere
        if power:
            return f"the rest falls like t^-{schedule.alpha * beta:.4g}"
        return f"the rest falls by {1 / (1 + _alpha(schedule) * beta):.4g} a step"
    if power:
        return f"the rest falls like t^-{schedule.alpha:.4g}"
    step = _alpha(schedule)
    return f"the rest falls by {1 - step if isinstance(update, ConvexMix) else math.exp(-step):.4g} a step"


def _alpha(schedule: Schedule) -> float:
    return schedule.alpha if isinstance(schedule, (ConstantSteps, GeometricSteps)) else math.nan
