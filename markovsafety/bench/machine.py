"""The machine in words and the versions of everything that is measured; no names of hosts or users."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .. import __version__

__all__ = ["PEERS", "machine", "processor", "versions"]

PEERS = ("numpy", "scipy", "numba", "jax", "klujax", "pyamg", "pypardiso", "stormpy", "deeptime", "lineax")


def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """Processor, cores, memory and system, such as "AMD EPYC, 2 cores, 24 GB, Linux x86_64"."""
    parts = [processor(), f"{os.cpu_count()} cores"]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB")
    return ", ".join([*parts, f"{platform.system()} {platform.machine()}"])


def versions(names: Sequence[str] = PEERS) -> dict[str, str]:
    """Python's, the package's own, and those of the named packages ("not installed" where one is missing)."""
    found = {"python": platform.python_version(), "markovsafety": __version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
