"""One process of the benchmark: measures some contenders of a case on one core and reports line by line.

Reads one JSON object from standard input and writes one per line to standard output: ``{"begin": name}`` when somebody
starts to solve, ``{"row": ...}`` for a result, ``{"numbers": ...}`` at the end. Whatever libraries print goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from .measure import measured, median, pin

__all__ = ["work"]


def work(order: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Measure contenders of one case.

    Parameters
    ----------
    order : dict
        ``case`` (its name), ``who`` (names of contenders), ``quick``, ``turns``; ``alone``: the others are measured
        elsewhere, and so are the case's own numbers.
    tell : called with every message
    """
    from .catalogue import find

    case = find(order["case"])
    problem = case.make(order["quick"])
    chosen = [c for c in case.contenders if c.name in order["who"]]
    reference = case.reference(problem) if any(c.installed for c in chosen) else {}
    rows: dict[str, Any] = {}
    for row in measured(chosen, problem, reference, order["turns"], lambda who: tell({"begin": who})):
        rows[row["who"]] = summary(row)
        tell({"row": rows[row["who"]]})
    if case.numbers is not None and not order.get("alone"):
        tell({"numbers": case.numbers(problem, rows)})


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its medians, numbers rounded to what a clock can tell."""
    made = dict(row)
    if row.get("seconds"):
        made["median"], made["setup_median"] = median(row["seconds"]), median(row["setup"])
        for key in ("seconds", "setup"):
            made[key] = [float(f"{x:.4g}") for x in row[key]]
    return made


def main() -> None:
    # JSON goes to what was standard output; from here on that is standard error, for libraries that print.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = json.loads(sys.stdin.read())
    if order.get("pin", True):
        pin()

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    work(order, tell)


if __name__ == "__main__":
    main()
