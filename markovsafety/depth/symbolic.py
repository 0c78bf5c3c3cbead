"""Closed forms as formulas: each derived by sympy from its recursion, to be read, differentiated, evaluated, typeset.

A `Derivation` does not assert its formula: its steps start from the model (one step of the chain, an integral, a sum)
and end with the formula, and `check` lets sympy confirm every step. The tests evaluate the same formula beside the
numeric code. ``derivation("aligned positions")`` makes one, ``derivations()`` lists them all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy

from ..errors import InputError

__all__ = ["Derivation", "derivation", "derivations"]


@dataclass(frozen=True, eq=False)
class Derivation:
    """A closed form with the steps that lead to it.

    Parameters
    ----------
    name : str
        What is derived, e.g. "aligned positions".
    statement : sympy.Eq
        Left: what it is a formula for; right: the closed form.
    symbols : dict of str to sympy symbol
        Parameters by the names of the numeric code; a name maps to the symbol of the formula.
    assumptions : str
        Where it holds.
    steps : tuple of (str, sympy expression)
        In order; an expression is an equation, or what is claimed to be identically zero.
    source : str
        Paper and equation, and whether the statement is our own.
    """

    name: str
    statement: Any
    symbols: Mapping[str, Any]
    assumptions: str
    steps: tuple[tuple[str, Any], ...] = ()
    source: str = ""
    checks: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def formula(self) -> Any:
        """The closed form."""
        return self.statement.rhs

    def check(self) -> list[str]:
        """Names of the steps that sympy cannot confirm; empty when the derivation stands."""
        failed = [text for text, step in self.steps if not _holds(step)]
        return failed + [f"check {i}" for i, step in enumerate(self.checks) if not _holds(step)]

    def evaluate(self, **values: float) -> float:
        """The closed form at numbers.

        Parameters
        ----------
        **values : float
            One for each of `symbols`.

        Returns
        -------
        float

        Raises
        ------
        InputError
            If a parameter is missing or unknown.
        """
        if set(values) != set(self.symbols):
            raise InputError(
                f"{self.name!r} was given {', '.join(values) or 'nothing'}.",
                cause=f"Its parameters are {', '.join(self.symbols)}.",
                next="Give a number for each of them.",
            )
        exact = {self.symbols[k]: v if isinstance(v, int) else sympy.Float(v, 40) for k, v in values.items()}
        return float(sympy.N(self.formula.subs(exact), 30))

    def latex(self) -> str:
        """The derivation as LaTeX: assumptions, steps, result."""
        lines = [rf"\textbf{{{self.name}}}\quad({self.assumptions})", r"\begin{align*}"]
        rows = [rf"&{_tex(step)} && \text{{{text}}}" for text, step in self.steps]
        lines.append(" \\\\\n".join([*rows, rf"&\boxed{{{sympy.latex(self.statement)}}}"]))
        return "\n".join([*lines, r"\end{align*}"])

    def _repr_latex_(self) -> str:
        return f"${sympy.latex(self.statement)}$"

    def __str__(self) -> str:
        left, right = (sympy.sstr(side) for side in (self.statement.lhs, self.statement.rhs))
        return f"{self.name}: {left} = {right}   ({self.assumptions})"


def _tex(step: Any) -> str:
    return sympy.latex(step if isinstance(step, (sympy.Eq, sympy.Rel)) else sympy.Eq(step, 0, evaluate=False))


def _holds(step: Any) -> bool:
    if step is True or step == sympy.true:
        return True
    sides: tuple[Any, Any] = (step.lhs, step.rhs) if isinstance(step, sympy.Eq) else (step, 0)
    return sympy.simplify(sides[0] - sides[1]) == 0


# Name -> (module of this package, function that makes the Derivation).
_TABLE: dict[str, tuple[str, str]] = {
    "severity ladder": ("symbolic_hazards", "severity_ladder"),
    "aligned positions": ("symbolic_hazards", "aligned_positions"),
    "aligned positions under a geometric attack": ("symbolic_hazards", "attacked_positions"),
    "needed depth": ("symbolic_hazards", "needed_depth"),
    "operational depth": ("symbolic_hazards", "operational_depth"),
    "price optimum": ("symbolic_hazards", "price_optimum"),
    "checkpoint": ("symbolic_hazards", "checkpoint"),
    "checkpoint under a geometric attack": ("symbolic_hazards", "checkpoint_attacked"),
    "checkpoint optimum": ("symbolic_hazards", "checkpoint_optimum"),
    "leaky refusal": ("symbolic_hazards", "leaky_refusal"),
    "survival ratio": ("symbolic_hazards", "survival_ratio"),
    "twirled harm": ("symbolic_symmetry", "twirled_harm"),
    "participation ratio of a ring": ("symbolic_symmetry", "participation_ratio"),
    "spread hazard": ("symbolic_symmetry", "hazard_budget"),
    "any refusal": ("symbolic_width", "any_refusal"),
    "beta-binomial any refusal": ("symbolic_width", "beta_binomial"),
    "power tail of width": ("symbolic_width", "power_tail"),
    "majority floor": ("symbolic_width", "majority_floor"),
    "odd majority": ("symbolic_width", "odd_majority"),
    "even majority": ("symbolic_width", "even_majority"),
    "common shock": ("symbolic_width", "common_shock"),
    "iso-safety hyperbola": ("symbolic_width", "hyperbola"),
    "cost optimum": ("symbolic_width", "cost_optimum"),
    "worth of width in tokens": ("symbolic_width", "worth_in_tokens"),
    "token average": ("symbolic_width", "token_average"),
    "best of N": ("symbolic_width", "best_of_n"),
    "shifted mass": ("symbolic_capacity", "shifted_mass"),
    "strings of a context": ("symbolic_capacity", "language_size"),
    "density of a language chain": ("symbolic_capacity", "language_density"),
    "loose factor": ("symbolic_capacity", "loose_factor"),
    "additive bias": ("symbolic_updates", "additive_bias"),
    "geometric bias": ("symbolic_updates", "geometric_bias"),
    "harmonic bias": ("symbolic_updates", "harmonic_bias"),
    "convex mix": ("symbolic_updates", "convex_mix"),
    "logit steps": ("symbolic_updates", "logit_steps"),
    "cross-entropy flow": ("symbolic_updates", "cross_entropy_flow"),
    "leak under bias": ("symbolic_updates", "leak_under_bias"),
    "odds of the optimum": ("symbolic_optimum", "odds_of_the_optimum"),
    "KL of the optimum": ("symbolic_optimum", "kl_of_the_optimum"),
    "KL to second order": ("symbolic_optimum", "kl_second_order"),
    "harm information": ("symbolic_optimum", "harm_information"),
    "gradient by depth": ("symbolic_optimum", "gradient_by_depth"),
    "recovery law": ("symbolic_optimum", "recovery_law"),
    "attack length": ("symbolic_optimum", "attack_length"),
}


def derivations() -> tuple[str, ...]:
    """Names of all derivations."""
    return tuple(_TABLE)


def derivation(name: str) -> Derivation:
    """Make a derivation.

    Parameters
    ----------
    name : str
        One of `derivations`.

    Returns
    -------
    Derivation

    Raises
    ------
    InputError
        There is no such derivation.
    """
    if name not in _TABLE:
        raise InputError(
            f"There is no derivation {name!r}.",
            cause=f"Known are {', '.join(_TABLE)}.",
            next="Use one of these names.",
        )
    module, function = _TABLE[name]
    make: Callable[[], Derivation] = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    return make()
