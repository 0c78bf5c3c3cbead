"""Decision: how deep does alignment reach, how wide must one ask, and for what harm budget."""

from .attack import AttackLaw, Optimum
from .attacker import BestOfN, anchored, best_of_n, fit_best_of_n
from .capacity import Perturbation, perturbation_bound, row_concentration, row_distance
from .checkpoint import Checkpoint
from .closed import Profile
from .fit import Exponential, HazardFit, fit_hazards
from .generalisation import PRETRAINED, Deviation, deviation
from .gradient import HarmGradient, harm_gradient, harm_information
from .grid import Grid, Needed
from .hazards import ChainDepth, Hazards, chain_depth
from .isosafety import Cheapest, Hyperbola, cheapest, hyperbola, iso_widths, worth_in_tokens
from .language_chain import LanguageChain, Mixing, language_chain, mixing, n_strings, parity_model
from .leaky import LeakyRefusal
from .low_rank import CapacityCurve, LowRank, capacity_curve, low_rank
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
from .optimum import needed_strength, optimum
from .pareto import Front, Pareto, pareto
from .penalty import attack_length, recovery_law, with_recovery
from .profile import Depth, Reading, operational_depth, profile
from .published import PUBLISHED, Rates
from .recovery import HeldOut, Recovery, fit_recovery, held_out_profile
from .robust import robust_harm
from .schedules import ConstantSteps, GeometricSteps, GivenSteps, HarmonicSteps
from .spending import Inefficiency, KLProfile, OddsShift, alignment_inefficiency, kl_profile, odds_shift
from .sweep import sweep
from .symmetry import HazardBudget, Twirl, hazard_budget, participation_ratio, twirl, twirl_direction
from .symmetry_check import TwirlCheck, twirl_experiment
from .tracing import Absorption, Trace, absorbing_when, trace, updated
from .training_path import TrainingPath, recovery_mix, training_path, trajectory
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
    "PRETRAINED",
    "PUBLISHED",
    "Absorption",
    "AdditiveBias",
    "AttackCurve",
    "AttackLaw",
    "BestOfN",
    "BiasMatrix",
    "CapacityCurve",
    "ChainDepth",
    "Cheapest",
    "Checkpoint",
    "ConstantSteps",
    "ConvexMix",
    "CrossEntropyFlow",
    "Depth",
    "Deviation",
    "Exponential",
    "Front",
    "GeometricSteps",
    "GivenSteps",
    "Grid",
    "HarmGradient",
    "HarmonicSteps",
    "HazardBudget",
    "HazardFit",
    "Hazards",
    "HeldOut",
    "Hyperbola",
    "Inefficiency",
    "KLProfile",
    "LanguageChain",
    "LeakyRefusal",
    "LogitSteps",
    "LowRank",
    "Mixing",
    "Needed",
    "OddsShift",
    "Optimum",
    "Pareto",
    "Perturbation",
    "Profile",
    "Rates",
    "Reading",
    "Recovery",
    "Trace",
    "TrainingPath",
    "Twirl",
    "TwirlCheck",
    "Verdict",
    "absorbing_when",
    "alignment_inefficiency",
    "anchored",
    "attack_length",
    "best_of_n",
    "capacity_curve",
    "chain_depth",
    "cheapest",
    "chernoff",
    "cross_entropy_path",
    "deviation",
    "ensemble_floor",
    "ensemble_harm",
    "fit_attack_curve",
    "fit_best_of_n",
    "fit_hazards",
    "fit_recovery",
    "harm_gradient",
    "harm_information",
    "hazard_budget",
    "held_out_profile",
    "hoeffding",
    "hyperbola",
    "icc",
    "iso_widths",
    "kl_profile",
    "language_chain",
    "latent_correlation",
    "least_correlation",
    "low_rank",
    "measured_width",
    "members_harm",
    "members_over_refusal",
    "mixing",
    "n_strings",
    "needed_strength",
    "needed_width",
    "odds_shift",
    "operational_depth",
    "optimum",
    "over_refusal",
    "pair_limits",
    "paired_range",
    "pareto",
    "parity_model",
    "participation_ratio",
    "perturbation_bound",
    "poisson_binomial",
    "profile",
    "recovery_law",
    "recovery_mix",
    "residual_after",
    "robust_harm",
    "row_concentration",
    "row_distance",
    "steps_to",
    "sweep",
    "token_average",
    "trace",
    "training_path",
    "trajectory",
    "twirl",
    "twirl_direction",
    "twirl_experiment",
    "unassumed_harm",
    "unbiased_failure",
    "unbiased_power",
    "updated",
    "verdict_of",
    "why_no_width",
    "with_recovery",
    "worth_in_tokens",
]
