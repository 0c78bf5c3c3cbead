"""Evidence: how far to believe a chain, and what changed between two models."""

from . import rare
from .agreement import Agreement, agreement
from .check import Check, check
from .compare import Comparison, compare
from .judging import Confusion, confusion
from .judging_chains import corrected_counts, corrected_harm
from .judging_rates import corrected

__all__ = [
    "Agreement",
    "Check",
    "Comparison",
    "Confusion",
    "agreement",
    "check",
    "compare",
    "confusion",
    "corrected",
    "corrected_counts",
    "corrected_harm",
    "rare",
]
