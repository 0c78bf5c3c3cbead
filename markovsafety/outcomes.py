"""The four outcomes that every rollout, count and estimated chain shares."""

from __future__ import annotations

__all__ = ["CODES", "NOT_JUDGED", "OUTCOMES"]

OUTCOMES = ("harm", "refusal", "benign", "truncated")
CODES = {name: code for code, name in enumerate(OUTCOMES)}
NOT_JUDGED = -1
