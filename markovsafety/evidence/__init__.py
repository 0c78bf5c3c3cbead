"""Evidence: how far to believe a chain, and what changed between two models."""

from . import rare
from .agreement import Agreement, agreement
from .branch import Branch, branch, branch_exact
from .check import Check, check
from .compare import Comparison, compare
from .design import Allocation, Enough, allocate, enough
from .findings import Finding
from .judging import Confusion, confusion
from .judging_chains import corrected_counts, corrected_harm
from .judging_rates import corrected
from .lump import Lumped, lump
from .lumpable import Lumpable, lumpable
from .order import Orders, orders
from .posterior import posterior
from .resample import bootstrap, delta
from .widths import censored_harm, with_misfit, with_truncation

__all__ = [
    "Agreement",
    "Allocation",
    "Branch",
    "Check",
    "Comparison",
    "Confusion",
    "Enough",
    "Finding",
    "Lumpable",
    "Lumped",
    "Orders",
    "agreement",
    "allocate",
    "bootstrap",
    "branch",
    "branch_exact",
    "censored_harm",
    "check",
    "compare",
    "confusion",
    "corrected",
    "corrected_counts",
    "corrected_harm",
    "delta",
    "enough",
    "lump",
    "lumpable",
    "orders",
    "posterior",
    "rare",
    "with_misfit",
    "with_truncation",
]
