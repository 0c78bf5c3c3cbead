"""The README's story of a refusal that leaks with probability 1e-15."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_story_of_the_leak(capsys):
    (story,) = [
        x for x in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S) if "spsolve" in x
    ]
    exec(compile(story, "README.md", "exec"), names := {})
    other, ours, rational = capsys.readouterr().out.splitlines()
    exact = names["ms"].hitting_probability(names["chain"], "harm", method="exact").at_start.exact
    assert rational == str(float(exact))
    assert ours.startswith("P(harm) = 0.526913   proven [0.526913, 0.526913]")
    bound = names["ms"].hitting_probability(names["chain"], "harm").at_start
    assert bound.value == pytest.approx(float(exact), rel=1e-14, abs=0)
    assert bound.lower <= exact <= bound.upper
    assert abs(float(other) - float(exact)) > 1e-3  # what makes it a story; the size of the error depends on the BLAS
