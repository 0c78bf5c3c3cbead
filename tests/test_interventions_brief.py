"""Results show themselves on one line, however large they are."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from markovsafety import Bound, interventions, organism
from markovsafety.brief import brief
from markovsafety.interventions import Guard, Pair, Triplet, Triplets, open_host
from markovsafety.interventions.separation import Probed


@dataclass(frozen=True, eq=False)
class Many:
    x: Any
    hidden: Any = field(default=1, repr=False)

    __repr__ = brief


def test_large_things_are_told_by_kind_and_size():
    b = Bound(0.25, 0.125, 0.5, info={"name": "P(harm)"})
    told = {
        "float64 (500, 3)": np.zeros((500, 3)),
        "0.25 [0.125, 0.5]": b,
        "Bound (2,)": Bound(np.array([0.1, 0.2]), np.zeros(2), np.ones(2)),
        "(1, 2, 5)": (1.0, 2.0, 5.0),
        "(7,)": (7,),
        "[1, 2]": [1, 2],
        "{'a': 0.25 [0.125, 0.5]}": {"a": b},
        "list of 1000": list(range(1000)),
        "dict of 40": {str(i): b for i in range(40)},
        "list of 3": [{"table": "x" * 50}] * 3,
        "(((1, 2), (2, 1)),)": (((1, 2), (2, 1)),),
        "Pair": Pair(tuple(range(100)), (2,)),
        "Many(x=0.5)": Many(0.5),
        "'refusal'": "refusal",
        "'aaaaaaaaaaaa...'": "a" * 64,
        "None": None,
    }
    assert {shown: repr(Many(x)) for shown, x in told.items()} == {shown: f"Many(x={shown})" for shown in told}
    some = Triplets((Triplet([1], [2], [3]),) * 99, ("bio",) * 99)
    assert repr(some) == "Triplets(items=tuple of 99, category=tuple of 99)"


def test_results_with_arrays_are_brief():
    """What compares by identity holds arrays or results; dataclasses would print all their numbers."""
    files = list(interventions._HOME)
    modules = {f: importlib.import_module(f"markovsafety.interventions.{f}") for f in files}
    things = [getattr(modules[f], name) for f in files for name in interventions._HOME[f]]
    large = [t for t in things if inspect.isclass(t) and dataclasses.is_dataclass(t) and t.__eq__ is object.__eq__]
    assert len(large) > 45
    assert [t.__name__ for t in large if hasattr(t.__repr__, "__wrapped__")] == []  # as dataclasses make it


def test_a_model_shows_what_it_is_not_its_modules():
    host = open_host(organism.model_path("shallow"))
    assert repr(host) == "<Host: LlamaForCausalLM, 4 blocks of 4 heads x 16, width 64>"
    one = Bound(1.0, 0.9, 1.0)
    assert str(Guard(host)) == "Guard(means=<Host: LlamaForCausalLM, 4 blocks of 4 heads x 16, width 64>, threshold=0)"
    assert repr(Probed(one, one, np.zeros(19), np.zeros(48))) == (
        "Probed(accuracy=1 [0.9, 1], auc=1 [0.9, 1], shuffled=float64 (19,), scores=float64 (48,))"
    )
