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
from .schedules import ConstantSteps, GeometricSteps, GivenSteps, HarmonicSteps
from .sweep import sweep
from .tracing import Absorption, Trace, absorbing_when, trace, updated
from .tuning import AttackCurve, fit_attack_curve
from .updates import (
    AdditiveBias,
    BiasMatrix,
    ConvexMix,
    CrossEntropyFlow,
    LogitSteps,
    Verdict,
    cross_entropy_path,
    residual_after,
    steps_to,
    verdict_of,
)
from .width import chernoff, ensemble_floor, ensemble_harm, hoeffding, needed_width, over_refusal, why_no_width

__all__ = [
    "Absorption",
    "AdditiveBias",
    "AttackCurve",
    "BiasMatrix",
    "ConstantSteps",
    "ConvexMix",
    "CrossEntropyFlow",
    "Depth",
    "GeometricSteps",
    "GivenSteps",
    "Grid",
    "HarmonicSteps",
    "LogitSteps",
    "Needed",
    "Profile",
    "Reading",
    "Trace",
    "Verdict",
    "absorbing_when",
    "chernoff",
    "cross_entropy_path",
    "ensemble_floor",
    "ensemble_harm",
    "fit_attack_curve",
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
    "residual_after",
    "steps_to",
    "sweep",
    "token_average",
    "trace",
    "unassumed_harm",
    "unbiased_failure",
    "unbiased_power",
    "updated",
    "verdict_of",
    "why_no_width",
]
