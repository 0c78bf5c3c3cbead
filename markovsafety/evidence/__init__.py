"""Evidence: how far to believe a chain, and what changed between two models."""

from . import rare
from .check import Check, check
from .compare import Comparison, compare

__all__ = ["Check", "Comparison", "check", "compare", "rare"]
