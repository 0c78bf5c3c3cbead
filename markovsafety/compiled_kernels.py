"""numba's `njit` for all kernels: what it compiles is kept on disk, or in memory where no place can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

__all__ = ["njit"]


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with the given options, without its cache on disk where there is no place for one.

    numba looks for one beside the source, then in the user's home; a package installed read-only for a user without a
    home would otherwise fail on every solve.
    """

    compiler: Any = numba.njit  # the options are the kernel's own

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return compiler(**options)(function)
        except RuntimeError as error:  # "cannot cache function ...: no locator available for file ..."
            if "no locator available" not in str(error):
                raise
            return compiler(**{**options, "cache": False})(function)

    return compile_later
