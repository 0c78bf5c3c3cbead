"""All cases of the hitting benchmark by name."""

from __future__ import annotations

from functools import lru_cache

from ..errors import InputError
from .cases import Case, solves
from .devices import on_device
from .workloads import workloads

__all__ = ["cases", "chosen", "find"]


@lru_cache
def cases() -> dict[str, Case]:
    """Every case by its name, in the order of the table."""
    return {case.name: case for case in [*solves(), *workloads(), *on_device()]}


def find(name: str) -> Case:
    """The case of this name.

    Raises
    ------
    InputError
        If there is none.
    """
    return chosen([name])[0]


def chosen(names: list[str] | tuple[str, ...], gpu: bool = False) -> list[Case]:
    """Cases by name, or by the beginning of several names; all (with or without GPU) if no name is given.

    Raises
    ------
    InputError
        If a name fits no case.
    """
    found: dict[str, Case] = {}
    for name in names:
        exact = [name] if name in cases() else [x for x in cases() if x.split("-")[0] == name]
        if not exact:
            raise InputError(
                f"There is no case {name!r}.",
                cause=f"The cases are {', '.join(cases())}.",
                next="Name one of them, or the part before the first hyphen for all that begin so.",
            )
        found |= {x: cases()[x] for x in exact}
    return list(found.values()) if names else [c for c in cases().values() if c.gpu == gpu]
