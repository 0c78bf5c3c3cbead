"""Evidence: how far to believe a chain, and what changed between two models."""

from . import rare
from .agreement import Agreement, agreement
from .branch import Branch, branch, branch_exact
from .check import Check, check
from .compare import Comparison, compare
from .findings import Finding
from .judging import Confusion, confusion
from .judging_chains import corrected_counts, corrected_harm
from .judging_rates import corrected
from .lump import Lumped, lump
from .lumpable import Lumpable, lumpable
from .order import Orders, orders
from .widths import censored_harm, with_misfit, with_truncation

__all__ = [
    "Agreement",
    "Branch",
    "Check",
    "Comparison",
    "Confusion",
    "Finding",
    "Lumpable",
    "Lumped",
    "Orders",
    "agreement",
    "branch",
    "branch_exact",
    "censored_harm",
    "check",
    "compare",
    "confusion",
    "corrected",
    "corrected_counts",
    "corrected_harm",
    "lump",
    "lumpable",
    "orders",
    "rare",
    "with_misfit",
    "with_truncation",
]
