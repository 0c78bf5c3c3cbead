"""What was factored once is kept with the chain: probability, times, visits and every target share it.

What a class's factors depend on, its inside rates and its exits, does not depend on what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BUDGET", "kept"]

BUDGET = 256 * 2**20  # bytes per chain; the oldest go first


def kept(memo: dict[Any, Any], kind: str, own: NDArray, make: Callable[[], Any]) -> Any:
    """The factors of a class, made if they are not there.

    Parameters
    ----------
    memo : dict
        `Rates.memo`.
    kind : str
        Which factors.
    own : int array, shape (m,)
        The states of the class.
    make : callable
        Returns an object with `nbytes`, or None (which is not kept).
    """
    store = memo.setdefault("classes", {})
    key = kind, len(own), int(own[0])
    found = store.get(key)
    if found is not None and np.array_equal(found[0], own):
        return found[1]
    made = make()
    if made is None or made.nbytes + own.nbytes > BUDGET:
        return made
    store.pop(key, None)
    store[key] = own, made
    while sum(own.nbytes + held.nbytes for own, held in store.values()) > BUDGET:
        store.pop(next(iter(store)))
    return made
