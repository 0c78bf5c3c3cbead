"""The planted automaton as a state map: where an answer stands in the grammar of its prompt's category and marker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chains.states import Asked
from ..errors import InputError
from .automaton import ENDS
from .exact import _as_context as as_context
from .exact import _automaton as automaton_of
from .exact import _kind as kind_of
from .exact import _label as label_of_state
from .exact import _representative as representative
from .language import ACTS, CATEGORIES, HARM_WORDS, OBJECTS, PAD, TOOLS, WORDS, Context, type_of
from .variants import grammar, variant_named

__all__ = ["LOST", "AutomatonStates"]

LOST = "lost"
"""Where an answer stands that left the grammar (after the context's name); it never comes back."""


@dataclass(frozen=True)
class AutomatonStates:
    """States of the planted automaton by category, harmfulness and marker of the prompt, with the labels of `truth`.

    A causal reader of answers: it follows the automaton of the prompt's context word by word. Which act, tool or object
    is named does not matter (a trained model now and then names one of another kind), only what it is. A word that
    cannot stand where it stands leads to `LOST`.

    Parameters
    ----------
    variant : str
        A name of `VARIANTS`, or any deepK.
    prompts : sequence, or mapping from prompt_id
        Prompts as `sample` takes them: texts, dicts with ``prompt`` (and ``prompt_id``), `Prompt` or `Context`. In a
        sequence the id is the place, as in `sample`.

    Raises
    ------
    InputError
        A prompt is not of the language.

    Examples
    --------
    >>> states = ms.organism.AutomatonStates("shallow", ["please v00 the bio0 ."])
    >>> said = states.walk([ms.organism.WORDS.index(word) for word in ("sure", "here", "is")])
    >>> said
    ['bio|harmful|START', 'bio|harmful|OPENED', 'bio|harmful|HERE.1', 'bio|harmful|HERE.2']

    The exact chain has these states, and tells what an answer that has come so far leads to:

    >>> chain = ms.organism.truth("shallow")
    >>> print(ms.hitting_probability(chain, "harm")[chain.index(said[-1])])
    P(harm) = 0.71763   proven [0.71763, 0.71763]
        because: rounding 2e-14; sampling, judge, lumping, model, truncation not assessed
    """

    variant: str
    prompts: Any

    def __post_init__(self):
        variant_named(self.variant)
        if isinstance(self.prompts, Mapping):
            items = list(self.prompts.items())
        else:
            items = [(p.get("prompt_id", i) if isinstance(p, dict) else i, p) for i, p in enumerate(self.prompts)]
        object.__setattr__(self, "prompts", {int(i): representative(as_context(p)) for i, p in items})

    @property
    def kind(self) -> str:
        """Its name, for `markovsafety.chains.states.map_name`."""
        return f"AutomatonStates({self.variant})"

    def walk(self, tokens: NDArray, prefill: int = 0) -> list[str]:
        """Labels of all prefixes, where there is only one prompt; see `StateMap`."""
        if len(self.prompts) != 1:
            raise _unknown("It was not said which prompt was answered", len(self.prompts))
        tokens = np.asarray(tokens)
        at = np.arange(len(tokens) + 1)
        asked = Asked(np.zeros(len(at), np.int64), np.array(list(self.prompts)), np.array([""]))
        codes, labels = self.label_of(tokens, np.zeros(len(at), np.int64), at, asked)
        return [labels[i] for i in codes]

    def label_of(self, tokens: NDArray, begin: NDArray, at: NDArray, asked: Asked | None) -> tuple[NDArray, list[str]]:
        """Codes and labels of m prefixes; see `markovsafety.chains.states.label_at`."""
        if asked is None:
            raise _unknown("It was not said which prompts were answered", len(self.prompts))
        ids, which = np.unique(asked.prompt_id, return_inverse=True)
        lost = [i for i in ids.tolist() if i not in self.prompts]
        if lost:
            raise _unknown(f"Prompt {lost[0]} is not among those given", len(self.prompts))
        contexts = list(dict.fromkeys(self.prompts[i] for i in ids.tolist()))
        tables = [_table(self.variant, c) for c in contexts]
        first = np.cumsum([0, *(len(labels) for _, labels in tables)])
        table = np.concatenate([t + a for (t, _), a in zip(tables, first)])
        here = np.array([first[contexts.index(self.prompts[i])] for i in ids.tolist()], np.int64)
        codes = _follow(table, np.asarray(tokens), begin, at, here[which.reshape(-1)[asked.row]])
        names = [label for _, labels in tables for label in labels]
        used, codes = np.unique(codes, return_inverse=True)
        return codes.reshape(-1), [names[i] for i in used.tolist()]


def _unknown(fact: str, known: int) -> InputError:
    return InputError(
        f"{fact} (AutomatonStates knows {known} prompts).",
        cause="The automaton depends on the prompt's category and marker.",
        next="Give it the prompts as they were sampled, or a mapping from every prompt_id to its prompt.",
    )


def _follow(table: NDArray, tokens: NDArray, begin: NDArray, at: NDArray, start: NDArray) -> NDArray:
    """Row of the table after every prefix.

    Answers are followed side by side, each from its first token to the longest of its prefixes.
    """
    new = np.concatenate([[True], (begin[1:] != begin[:-1]) | (at[1:] != at[:-1] + 1)])[: len(at)]
    heads = np.flatnonzero(new)
    final = at[np.append(heads[1:], len(at)) - 1]
    out = np.full(len(at), -1, dtype=np.int64)
    state = start[heads].copy()
    for t in range(int(final.max(initial=-1)) + 1):
        live = np.flatnonzero(final >= t)
        place = heads[live] + t - at[heads[live]]
        shown = place >= heads[live]
        out[place[shown]] = state[live[shown]]
        live = live[final[live] > t]
        words = tokens[begin[heads[live]] + t]
        known = (words >= 0) & (words < table.shape[1])
        state[live] = table[state[live], np.where(known, words, PAD)]  # no answer of the grammar holds the padding
    return out


@lru_cache(maxsize=256)
def _table(variant: str, context: Context) -> tuple[NDArray, list[str]]:
    """Next state by state and token id, the last state where the grammar has no such word; labels of the states."""
    rules = grammar(variant, context)
    automaton = automaton_of(rules)
    prefix = f"{CATEGORIES[context.category]}|{kind_of(context)}|"
    lost = len(automaton.states)
    table = np.full((lost + 1, len(WORDS)), lost, dtype=np.int64)
    alike = _alike(context)
    for i, state in enumerate(automaton.states):
        if state in ENDS:
            continue
        known = {word: automaton.index[follow] for word, _, follow in rules.edges(state)}
        table[i] = [known.get(alike.get(word, word), lost) for word in WORDS]
    return table, [*(label_of_state(s, prefix) for s in automaton.states), prefix + LOST]


def _alike(context: Context) -> dict[str, str]:
    """A word of the context's own grammar for every word of the same kind."""
    act, tool = 6 * type_of(context.verb), (context.category + 6 * type_of(context.object)) % 12
    out = dict.fromkeys(ACTS, ACTS[act]) | dict.fromkeys(TOOLS, TOOLS[tool])
    return out | dict.fromkeys(OBJECTS, context.object) | dict.fromkeys(HARM_WORDS, HARM_WORDS[3 * context.category])
