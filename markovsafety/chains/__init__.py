"""What a chain is, and how evidence becomes one."""

from .activation import ActivationBins, drift, grid
from .chain import Chain, Evidence
from .counting import count
from .counts import Counts
from .estimate import estimate, single_token_outcomes
from .pooled import Pooled, read_pooled
from .pooling import pool
from .states import ByPrompt, JudgedPrefix, KGram, Position, Product, StateMap
from .storage import read_chain, read_counts, write_chain, write_counts
from .stored_layers import StoredLayers, write_layers
from .tally import Tally
from .transitions import Transitions, count_transitions

__all__ = [
    "ActivationBins",
    "ByPrompt",
    "Chain",
    "Counts",
    "Evidence",
    "JudgedPrefix",
    "KGram",
    "Pooled",
    "Position",
    "Product",
    "StateMap",
    "StoredLayers",
    "Tally",
    "Transitions",
    "count",
    "count_transitions",
    "drift",
    "estimate",
    "grid",
    "pool",
    "read_chain",
    "read_counts",
    "read_pooled",
    "single_token_outcomes",
    "write_chain",
    "write_counts",
    "write_layers",
]
