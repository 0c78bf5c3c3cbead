"""Decision: how deep does alignment reach, how wide must one ask, and for what harm budget."""

from .attack import AttackLaw, Optimum
from .checkpoint import Checkpoint
from .closed import Profile
from .fit import Exponential, HazardFit, fit_hazards
from .grid import Grid, Needed
from .hazards import ChainDepth, Hazards, chain_depth
from .leaky import LeakyRefusal
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
from .pareto import Front, Pareto, pareto
from .profile import Depth, Reading, operational_depth, profile
from .published import PUBLISHED, Rates
from .recovery import HeldOut, Recovery, fit_recovery, held_out_profile
from .schedules import ConstantSteps, GeometricSteps, GivenSteps, HarmonicSteps
from .sweep import sweep
from .symmetry import HazardBudget, Twirl, hazard_budget, participation_ratio, twirl, twirl_direction
from .symmetry_check import TwirlCheck, twirl_experiment
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
    "PUBLISHED",
    "Absorption",
    "AdditiveBias",
    "AttackCurve",
    "AttackLaw",
    "BiasMatrix",
    "ChainDepth",
    "Checkpoint",
    "ConstantSteps",
    "ConvexMix",
    "CrossEntropyFlow",
    "Depth",
    "Exponential",
    "Front",
    "GeometricSteps",
    "GivenSteps",
    "Grid",
    "HarmonicSteps",
    "HazardBudget",
    "HazardFit",
    "Hazards",
    "HeldOut",
    "LeakyRefusal",
    "LogitSteps",
    "Needed",
    "Optimum",
    "Pareto",
    "Profile",
    "Rates",
    "Reading",
    "Recovery",
    "Trace",
    "Twirl",
    "TwirlCheck",
    "Verdict",
    "absorbing_when",
    "chain_depth",
    "chernoff",
    "cross_entropy_path",
    "ensemble_floor",
    "ensemble_harm",
    "fit_attack_curve",
    "fit_hazards",
    "fit_recovery",
    "hazard_budget",
    "held_out_profile",
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
    "pareto",
    "participation_ratio",
    "poisson_binomial",
    "profile",
    "residual_after",
    "steps_to",
    "sweep",
    "token_average",
    "trace",
    "twirl",
    "twirl_direction",
    "twirl_experiment",
    "unassumed_harm",
    "unbiased_failure",
    "unbiased_power",
    "updated",
    "verdict_of",
    "why_no_width",
]
