"""Decision: how deep does alignment reach, how wide must one ask, and for what harm budget."""

from .closed import Profile
from .grid import Grid, Needed
from .measured import icc, measured_width, unbiased_failure, unbiased_power
from .members import (
    least_correlation,
    members_harm,
    members_over_refusal,
    pair_limits,
    paired_range,
    poisson_binomial,
    token_average,
    unassumed_harm,
)
from .mixtures import latent_correlation
from .profile import Depth, Reading, operational_depth, profile
from .sweep import sweep
from .width import chernoff, ensemble_floor, ensemble_harm, hoeffding, needed_width, over_refusal, why_no_width

__all__ = [
    "Depth",
    "Grid",
    "Needed",
    "Profile",
    "Reading",
    "chernoff",
    "ensemble_floor",
    "ensemble_harm",
    "hoeffding",
    "icc",
    "latent_correlation",
    "least_correlation",
    "measured_width",
    "members_harm",
    "members_over_refusal",
    "needed_width",
    "operational_depth",
    "over_refusal",
    "pair_limits",
    "paired_range",
    "poisson_binomial",
    "profile",
    "sweep",
    "token_average",
    "unassumed_harm",
    "unbiased_failure",
    "unbiased_power",
    "why_no_width",
]
