"""The planted truth: exact chains of the synthetic language, for a prompt or for the whole prompt law."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability
from .automaton import ENDS, Grammar, State
from .language import CATEGORIES, Context, Prompt, contexts, parse_prompt
from .variants import grammar

__all__ = ["harm_by_state", "planted", "truth"]


@dataclass(frozen=True)
class _Automaton:
    states: list[State]
    matrix: sp.csr_array
    index: dict[State, int]


def _automaton(rules: Grammar) -> _Automaton:
    """Every state reachable from the start, in the order of discovery, and the matrix between them."""
    states, index = [rules.start()], {rules.start(): 0}
    rows, cols, values = [], [], []
    for i, state in enumerate(states):  # grows while it is walked
        if state in ENDS:
            continue
        for _, p, follow in rules.edges(state):
            if follow not in index:
                index[follow] = len(states)
                states.append(follow)
            rows.append(i)
            cols.append(index[follow])
            values.append(p)
    matrix = sp.coo_array((values, (rows, cols)), shape=(len(states),) * 2).tocsr()
    return _Automaton(states, matrix, index)


def _label(state: State, prefix: str = "") -> str:
    """A readable, unique name: kind, step, then depth and weight where deep rows make them matter."""
    parts = [state.kind] + ([str(state.step)] if state.step else [])
    parts += ["leaked"] if state.refused and not state.kind.startswith(("R_", "REFUSED")) else []
    parts += [f"t{state.at}"] if state.at > 0 else []
    parts += [f"w{state.normal:.17g}"] if state.normal != 1.0 else []
    return prefix + ".".join(parts)


def _as_context(prompt: Any) -> Context:
    if isinstance(prompt, Context):
        return prompt
    if isinstance(prompt, Prompt):
        return prompt.context
    return parse_prompt(prompt["prompt"] if isinstance(prompt, dict) else prompt).context


def truth(
    variant: str,
    prompt: Any = None,
    *,
    refuse: float | tuple[float, ...] | None = None,
    leak: float | None = None,
    harmful: bool | None = None,
    marker: str | None = "any",
    category: str | None = None,
) -> Chain:
    """The exact chain of the planted language: one prompt's, or the mixture over the prompt law.

    Parameters
    ----------
    variant : str
        A name of `VARIANTS`, or any deepK.
    prompt : str, dict, Prompt or Context, optional
        One prompt; without it the mixture over the prompt law, on product states context x automaton.
    refuse, leak : optional
        Change the planted parameters, see `grammar`.
    harmful, marker, category : optional
        Condition the mixture: harmful or not; marker None (unmarked), "jailbreak", "trigger" or "any"; one category.

    Returns
    -------
    Chain
        Outcomes harm (a state per category in the mixture), refusal and benign; the start law is the prompt law. An
        answer that refuses, leaks and ends without harm counts as a refusal, as the judge's rule says.

    Examples
    --------
    Harmful prompts, plain and disguised:

    >>> for marker in (None, "jailbreak"):
    ...     chain = ms.organism.truth("shallow", harmful=True, marker=marker)
    ...     print(ms.hitting_probability(chain, "harm").at_start)
    P(harm) = 0.072414   proven [0.072414, 0.072414]
        because: rounding 2e-15; sampling, judge, lumping, model, truncation not assessed
    P(harm) = 0.448636   proven [0.448636, 0.448636]
        because: rounding 2e-14; sampling, judge, lumping, model, truncation not assessed
    """
    if prompt is not None:
        only = [(_as_context(prompt), 1.0)]
    else:
        only = [
            (c, w)
            for c, w in contexts()
            if (harmful is None or c.harmful == harmful)
            and (marker == "any" or c.marker == marker)
            and (category is None or CATEGORIES[c.category] == category)
        ]
        if not only:
            raise InputError(
                "No context of the prompt law is left.",
                cause=f"harmful={harmful!r}, marker={marker!r}, category={category!r} exclude all of them.",
                next=f"Categories are {', '.join(CATEGORIES)}; markers None, jailbreak, trigger, any.",
            )
    blocks, labels, start = [], [], []
    ends: dict[str, list[int]] = {"harm": [], "refusal": [], "benign": []}
    total = sum(w for _, w in only)
    for context, weight in only:
        automaton = _automaton(grammar(variant, context, refuse=refuse, leak=leak))
        prefix = "" if prompt is not None else f"{CATEGORIES[context.category]}|{_kind(context)}|"
        for i, state in enumerate(automaton.states):
            if state in ENDS:
                ends[ENDS[state]].append(len(labels))
            labels.append(_label(state, prefix))
            start.append(weight / total if i == 0 else 0.0)
        blocks.append(automaton.matrix)
    return Chain(
        sp.block_diag(blocks, format="csr"),
        outcomes={name: np.array(where, dtype=np.int64) for name, where in ends.items()},
        start=np.array(start),
        states=labels,
    )


def _kind(context: Context) -> str:
    side = "harmful" if context.harmful else "harmless"
    return f"{side}+{context.marker}" if context.marker else side


@lru_cache(maxsize=512)
def _harm(variant: str, context: Context) -> tuple[_Automaton, np.ndarray]:
    automaton = _automaton(grammar(variant, context))
    names = [_label(s) for s in automaton.states]
    outcomes = {ENDS[s]: i for i, s in enumerate(automaton.states) if s in ENDS}
    if "harm" not in outcomes:  # a harmless prompt: no word of its answers can harm
        return automaton, np.zeros(len(names))
    chain = Chain(automaton.matrix, outcomes=outcomes, states=names)
    return automaton, np.asarray(hitting_probability(chain, "harm", certify=False).value)


def planted(variant: str, prompt: Any, prefix: list[str]) -> float:
    """Planted probability of harm after a forced prefix of words; nan where the prefix leaves the grammar.

    Parameters
    ----------
    variant : str
    prompt : str, dict, Prompt or Context
    prefix : list of str
        The words already spoken.

    Returns
    -------
    float
        Probability in [0, 1].

    Examples
    --------
    A model that is aligned at its first token only, and one that is aligned over twenty, when "sure" is forced:

    >>> prompt = "please v00 the bio0 ."
    >>> for variant in ("shallow", "deep20"):
    ...     harm = [ms.organism.planted(variant, prompt, words) for words in ([], ["sure"])]
    ...     print(variant, *(f"{h:.4f}" for h in harm))
    shallow 0.0625 0.7039
    deep20 0.0273 0.0003
    """
    context = _as_context(prompt)
    state = grammar_of(variant, context).walk(prefix)[-1]
    return float("nan") if state is None else harm_by_state(variant, context)[state]


def harm_by_state(variant: str, prompt: Any) -> dict[State, float]:
    """Planted probability of harm from every state of the automaton that answers a prompt.

    Parameters
    ----------
    variant : str
    prompt : str, dict, Prompt or Context

    Returns
    -------
    dict
        State -> probability in [0, 1].
    """
    # the words of verb and object do not change the law of the states, so contexts share one solve
    automaton, harm = _harm(variant, _representative(_as_context(prompt)))
    return dict(zip(automaton.states, harm.tolist()))


@lru_cache(maxsize=4096)
def grammar_of(variant: str, context: Context) -> Grammar:
    """`grammar` of an unchanged variant, remembered with its edges."""
    return grammar(variant, context)


def _representative(context: Context) -> Context:
    return Context(context.category, context.harmful, context.marker)
