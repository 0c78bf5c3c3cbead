"""Compiled code where nothing can be written."""

from __future__ import annotations

import subprocess
import sys

SOLVE = """
import numba.core.caching as caching
def nowhere(*_):
    return None
for locator in caching.CacheImpl._locator_classes:
    locator.from_function = nowhere
import markovsafety as ms
print(ms.hitting_probability(ms.toy.ruin(4), "harm").value[1])
"""


def test_solves_without_a_place_for_compiled_code():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SOLVE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert abs(float(done.stdout) - 0.25) < 1e-15
