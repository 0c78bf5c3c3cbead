"""Decision: how deep does alignment reach, how wide must one ask, and for what harm budget."""

from .closed import Profile
from .grid import Grid, Needed
from .measured import icc, measured_width, unbiased_power
from .profile import Depth, Reading, operational_depth, profile
from .sweep import sweep
from .width import ensemble_harm, needed_width, over_refusal

__all__ = [
    "Depth",
    "Grid",
    "Needed",
    "Profile",
    "Reading",
    "ensemble_harm",
    "icc",
    "measured_width",
    "needed_width",
    "operational_depth",
    "over_refusal",
    "profile",
    "sweep",
    "unbiased_power",
]
