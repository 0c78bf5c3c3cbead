"""markovsafety: where in the answer does safety break?

A language model that answers token by token is a Markov chain; a safety failure is a first hit of a harmful state.
The road is ``sample -> count -> estimate -> hitting_probability -> sweep``; every name is loaded when first used, so
``import markovsafety`` has no side effect and takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "bound": ["Bound"],
    "errors": ["InputError", "MarkovsafetyError", "ModelError", "UntrustedError"],
    "outcomes": ["OUTCOMES"],
    "chains": ["ActivationBins", "Chain", "Counts", "JudgedPrefix", "KGram", "Position", "count", "estimate"],
    "chains.storage": ["read_chain", "write_chain"],
    "hitting": [
        "attribute",
        "committor",
        "critical",
        "hitting_distribution",
        "hitting_probability",
        "hitting_spread",
        "hitting_time",
        "sensitivity",
        "visits",
    ],
    "interventions": ["Direction", "Edit"],
    "evidence": ["agreement", "check", "compare", "confusion", "corrected"],
    "depth": ["Profile", "profile", "sweep"],
    "rollouts": ["Rollouts", "judge", "read_rollouts", "sample", "write_rollouts"],
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_MODULES = {
    "arithmetic",
    "chains",
    "depth",
    "evidence",
    "hitting",
    "interventions",
    "organism",
    "plot",
    "report",
    "rollouts",
    "toy",
}
__all__ = sorted([*_WHERE, *_MODULES, "__version__"])

if TYPE_CHECKING:
    from .bound import Bound as Bound
    from .chains import ActivationBins as ActivationBins
    from .chains import Chain as Chain
    from .chains import Counts as Counts
    from .chains import JudgedPrefix as JudgedPrefix
    from .chains import KGram as KGram
    from .chains import Position as Position
    from .chains import count as count
    from .chains import estimate as estimate
    from .chains import read_chain as read_chain
    from .chains import write_chain as write_chain
    from .depth import Profile as Profile
    from .depth import profile as profile
    from .depth import sweep as sweep
    from .errors import InputError as InputError
    from .errors import MarkovsafetyError as MarkovsafetyError
    from .errors import ModelError as ModelError
    from .errors import UntrustedError as UntrustedError
    from .evidence import agreement as agreement
    from .evidence import check as check
    from .evidence import compare as compare
    from .evidence import confusion as confusion
    from .evidence import corrected as corrected
    from .hitting import attribute as attribute
    from .hitting import committor as committor
    from .hitting import critical as critical
    from .hitting import hitting_distribution as hitting_distribution
    from .hitting import hitting_probability as hitting_probability
    from .hitting import hitting_spread as hitting_spread
    from .hitting import hitting_time as hitting_time
    from .hitting import sensitivity as sensitivity
    from .hitting import visits as visits
    from .interventions.directions import Direction as Direction
    from .interventions.edits import Edit as Edit
    from .outcomes import OUTCOMES as OUTCOMES
    from .rollouts import Rollouts as Rollouts
    from .rollouts import judge as judge
    from .rollouts import read_rollouts as read_rollouts
    from .rollouts import sample as sample
    from .rollouts import write_rollouts as write_rollouts


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
