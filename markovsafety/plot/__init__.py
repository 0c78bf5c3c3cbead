"""Figures: every function takes data and an optional Axes, draws the intervals with the values, and returns the Axes.

One visual language. Outcomes always have the same colours (harm vermilion, refusal blue, benign green, truncated
grey); models take theirs from a second palette in the order they are given, each with its own marker, so that print
and colour-blind readers lose nothing (M. Okabe and K. Ito, Color Universal Design, 2008). Nothing here changes
matplotlib's global settings: every function draws inside its own `rc_context`, on figures without pyplot (with pyplot
only inside IPython, where that is what makes a figure show).
"""

from __future__ import annotations

from .bars import attribution, categories, outcomes, strikes
from .checks import check
from .columns import data, write_csv
from .curves import lines, traces
from .flow import Flow, flow
from .fronts import pareto
from .inside import beliefs, compared, detected, predicted, roc, separated
from .plane import plane
from .profiles import branch, depth, depth_signature, width
from .repair import cosines, tilts, trade_offs
from .roads import chain
from .sizes import capacity
from .steering import alphas, head_map
from .style import OUTCOME_COLOURS, figure, palette, panels, save, state_text
from .surfaces import contour
from .themes import theme

__all__ = [
    "OUTCOME_COLOURS",
    "Flow",
    "alphas",
    "attribution",
    "beliefs",
    "branch",
    "capacity",
    "categories",
    "chain",
    "check",
    "compared",
    "contour",
    "cosines",
    "data",
    "depth",
    "depth_signature",
    "detected",
    "figure",
    "flow",
    "head_map",
    "lines",
    "outcomes",
    "palette",
    "panels",
    "pareto",
    "plane",
    "predicted",
    "roc",
    "save",
    "separated",
    "state_text",
    "strikes",
    "theme",
    "tilts",
    "traces",
    "trade_offs",
    "width",
    "write_csv",
]
