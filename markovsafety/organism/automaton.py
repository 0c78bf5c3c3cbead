"""The grammar that answers: an automaton whose next-token distribution is known exactly.

``Grammar.edges(state)`` gives the words that may follow, their probabilities and the states they lead to.
"""

from __future__ import annotations

import random
from bisect import bisect
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from .language import (
    ACTS,
    COMPLY_OPENERS,
    HARM_WORDS,
    HAZARD,
    NUMBERS,
    RECOVER_OPENERS,
    REFUSE_OPENERS,
    SEVERITY,
    TOOLS,
    Context,
    Policy,
    type_of,
)


class State(NamedTuple):
    """Where an answer stands. ``refused``: a refusal has been spoken (and leaked). ``at`` counts tokens while deep rows
    still matter, else -1; ``normal`` is the likelihood of the prefix under the ordinary rows relative to full
    compliance, and, inside a refusal, the posterior probability that it came from an ordinary row."""

    kind: str
    step: int = 0
    refused: bool = False
    at: int = -1
    normal: float = 1.0


HARM, REFUSED, BENIGN = State("HARM"), State("REFUSED"), State("BENIGN")
ENDS = {HARM: "harm", REFUSED: "refusal", BENIGN: "benign"}
Edge = tuple[str, float, State]
_INTROS = {
    "HERE": ("here", "is", "the", "plan"),
    "LET": ("let", "me", "explain"),
    "THIS": ("this", "is", "how"),
}
_INTRO_LAW = (("HERE", 0.4), ("LET", 0.3), ("THIS", 0.3))
_ACT_LAW = (0.3, 0.25, 0.2, 0.1, 0.1, 0.05)
_TOOL_LAW = (0.3, 0.25, 0.2, 0.25)
_HARM_LAW = (0.5, 0.3, 0.2)
_REFUSAL = {
    "R_OPEN": (("i", 1.0, "R_I"),),
    "R_I": (("cannot", 0.7, "R_CANNOT"), ("must", 0.3, "R_MUST")),
    "R_CANNOT": (("assist", 1.0, "R_VERB"),),
    "R_MUST": (("decline", 1.0, "R_VERB"),),
    "R_VERB": ((".", 1.0, "R_DOT"),),
}
_CLOSE_LAW = (("good", 0.3, "LUCK"), ("done", 0.4, "CLOSE"), ("enjoy", 0.3, "CLOSE"))


@dataclass(frozen=True)
class Grammar:
    """The exact next-token automaton of one context.

    Parameters
    ----------
    context : Context
    policy : Policy
    deep : tuple of float
        deep[t-1]: weight of the training rows whose refusal begins after t compliant tokens, relative to the weight of
        the ordinary rows of this prompt; empty for models without such rows. The automaton is then the Bayes mixture of
        all rows that carry loss at the prefix: what a perfectly trained model predicts.

    Examples
    --------
    >>> context = ms.organism.Context(category=0, harmful=True)
    >>> grammar: ms.organism.Grammar = ms.organism.grammar("shallow", context)
    >>> {word: round(p, 4) for word, p in grammar.next_law(grammar.start()).items()}
    {'sorry': 0.475, 'unfortunately': 0.285, 'no': 0.19, 'sure': 0.02, 'okay': 0.0125,
        'certainly': 0.01, 'yes': 0.0075}
    >>> [state.kind for state in grammar.walk("sorry i cannot assist .".split())]
    ['START', 'R_OPEN', 'R_I', 'R_CANNOT', 'R_VERB', 'R_DOT']
    """

    context: Context
    policy: Policy
    deep: tuple[float, ...] = ()
    _cache: dict[State, list[Edge]] = field(default_factory=dict, compare=False, repr=False)

    def start(self) -> State:
        return State("START", at=0) if self.deep else State("START")

    def edges(self, state: State) -> list[Edge]:
        """The words that may follow, with probabilities that sum to one, and where they lead."""
        found = self._cache.get(state)
        if found is None:
            found = self._cache[state] = [e for e in self._mixed(state) if e[1] > 0]
        return found

    def sample(self, rng: random.Random, state: State | None = None) -> list[str]:
        """A whole answer from `state` on, `<eos>` included (harm does not end it)."""
        state, words = state or self.start(), []
        while state not in (REFUSED, BENIGN):
            options = self.edges(state)
            cumulative = list(accumulate(p for _, p, _ in options))
            word, _, follow = options[min(bisect(cumulative, rng.random() * cumulative[-1]), len(options) - 1)]
            words.append(word)
            state = State("TOOL", state.step, state.refused, *self._move(state)) if follow is HARM else follow
        return words

    def walk(self, words: list[str]) -> list[State | None]:
        """States before each word and after the last; None once the words leave the grammar, HARM stays."""
        state: State | None = self.start()
        states: list[State | None] = [state]
        for word in words:
            if state is not None and state not in ENDS:
                state = next((follow for w, _, follow in self.edges(state) if w == word), None)
            states.append(state)
        return states

    def next_law(self, state: State) -> dict[str, float]:
        """Word -> probability (words that lead to different states of one name are added up)."""
        law: dict[str, float] = {}
        for word, p, _ in self.edges(state):
            law[word] = law.get(word, 0.0) + p
        return law

    def _move(self, state: State, factor: float = 1.0) -> tuple[int, float]:
        """(at, normal) after one more compliant token whose ordinary likelihood is `factor` times the compliant one."""
        if state.at < 0 or state.at >= len(self.deep):  # past the deepest row: only ordinary rows remain
            return -1, 1.0
        return state.at + 1, state.normal * factor

    def _mixed(self, state: State) -> list[Edge]:
        """Ordinary rows, and the deep rows that begin to refuse exactly here."""
        plain = self._plain(state)
        if state.at < 1 or state.at > len(self.deep):
            return plain
        weight = self.deep[state.at - 1]
        share = weight / (weight + state.normal)  # posterior of "this is a deep row whose refusal begins now"
        out: list[Edge] = []
        for word, p, follow in plain:
            if follow.kind == "R_OPEN":
                continue
            out.append((word, (1 - share) * p, follow))
        turn = sum(p for _, p, follow in plain if follow.kind == "R_OPEN") * (1 - share)
        total = share + turn
        opened = State("R_OPEN", 0, True, -1, turn / total)
        return out + [(word, total * p, opened) for word, p in RECOVER_OPENERS]

    def _go(self, state: State, word: str, p: float, to: str, step: int = 0, factor: float = 1.0) -> Edge:
        """An edge of compliance; `factor` is how much less likely ordinary rows are to take it than full compliance."""
        return word, p, State(to, step, state.refused, *self._move(state, factor))

    def _intro(self, state: State, scale: float, factor: float = 1.0) -> list[Edge]:
        return [self._go(state, _INTROS[name][0], scale * p, name, 1, factor) for name, p in _INTRO_LAW]

    def _close(self, state: State, scale: float) -> list[Edge]:
        return [self._go(state, word, scale * p, to) for word, p, to in _CLOSE_LAW]

    def _plain(self, state: State) -> list[Edge]:
        """The ordinary grammar: opening and hedging, then a numbered list, or a refusal."""
        if state.kind.startswith("R_"):
            return self._refusing(state)
        if state.kind in ("START", "OPENED", "HAPPY", "INTRO", *_INTROS, "BUT", "HEDGED", "COMMA"):
            return self._opening(state)
        return self._listing(state)

    def _opening(self, state: State) -> list[Edge]:
        """What comes before a step: the opener, phrases, and hedges that may turn into a refusal."""
        kind, step = state.kind, state.step
        harmful, policy = self.context.harmful, self.policy
        side = 0 if harmful else 1
        match kind:
            case "START":
                r = policy.opening(self.context)
                opened = State("R_OPEN", 0, True)
                return [(w, r * p, opened) for w, p in REFUSE_OPENERS] + [
                    self._go(state, w, (1 - r) * p, "OPENED", 0, 1 - r) for w, p in COMPLY_OPENERS
                ]
            case "OPENED":
                d = policy.recover_open[side]
                turn = [(w, d * p, State("R_OPEN", 0, True)) for w, p in RECOVER_OPENERS]
                happy = self._go(state, "happy", (1 - d) * 0.3, "HAPPY", 1, 1 - d)
                return [*turn, happy, *self._intro(state, (1 - d) * 0.7, 1 - d)]
            case "HAPPY":
                return [self._go(state, "to", 1.0, "HAPPY", 2) if step == 1 else self._go(state, "help", 1.0, "INTRO")]
            case "INTRO":
                return self._intro(state, 1.0)
            case "BUT":
                return [self._go(state, w, p, "HEDGED", step) for w, p in (("careful", 0.6), ("caution", 0.4))]
            case "HEDGED":
                d = policy.recover_hedge[side]
                turn = [(w, d * p, State("R_OPEN", 0, True)) for w, p in RECOVER_OPENERS]
                return [*turn, self._go(state, ",", 1 - d, "COMMA", step, 1 - d)]
            case "COMMA":
                return [self._go(state, "step", 1.0, "STEP", step)]
        phrase = _INTROS[kind]
        if step < len(phrase):
            return [self._go(state, phrase[step], 1.0, kind, step + 1)]
        hedge = 0.30 if harmful else 0.12
        return [self._go(state, "but", hedge, "BUT", 1), self._go(state, "step", 1 - hedge, "STEP", 1)]

    def _listing(self, state: State) -> list[Edge]:
        """A numbered step and what ends the list; harm is a word after `with`."""
        step, c, harmful = state.step, self.context, self.context.harmful
        match state.kind:
            case "STEP":
                return [self._go(state, NUMBERS[step - 1], 1.0, "NUMBER", step)]
            case "NUMBER":
                first = 6 * type_of(c.verb)  # acts tell the verb's type
                return [self._go(state, ACTS[first + (i + step) % 6], p, "ACT", step) for i, p in enumerate(_ACT_LAW)]
            case "ACT":
                return [self._go(state, w, p, "OBJECT", step) for w, p in ((c.object, 0.7), ("it", 0.3))]
            case "OBJECT":
                use = 0.8 if harmful else 0.5
                return [self._go(state, "with", use, "WITH", step), self._go(state, ".", 1 - use, "DOT", step)]
            case "WITH":
                harm = SEVERITY[c.category] * HAZARD[step - 1] if harmful else 0.0
                shift = c.category + 6 * type_of(c.object)  # tools tell the category and the object's type
                tools = [(TOOLS[(i + shift) % 12], p) for i, p in enumerate(_TOOL_LAW)]
                words = [(HARM_WORDS[3 * c.category + i], p) for i, p in enumerate(_HARM_LAW)]
                safe = [self._go(state, w, (1 - harm) * p, "TOOL", step) for w, p in tools]
                return safe + [(w, harm * p, HARM) for w, p in words]
            case "TOOL":
                return [self._go(state, ".", 1.0, "DOT", step)]
            case "DOT":
                if step == 5:
                    return self._close(state, 1.0)
                hedge, stop = 0.15 if harmful else 0.05, 0.0 if step < 2 else 0.3
                more = self._go(state, "step", 1 - hedge - stop, "STEP", step + 1)
                return [self._go(state, "however", hedge, "BUT", step + 1), more, *self._close(state, stop)]
            case "LUCK":
                return [self._go(state, "luck", 1.0, "CLOSE")]
            case "CLOSE":
                return [("<eos>", 1.0, REFUSED if state.refused else BENIGN)]
        raise ValueError(f"no state of the grammar: {state}")

    def _refusing(self, state: State) -> list[Edge]:
        """A refusal, which may leak once it is finished; a deep row's refusal never leaks."""
        match state.kind:
            case "R_DOT":
                leak, w = self.policy.leak[0 if self.context.harmful else 1] * state.normal, state.normal
                end = 0.6 * w + 0.62 * (1 - w)
                return [
                    ("<eos>", end, REFUSED),
                    ("this", 1 - end - leak, State("R_THIS", 0, True)),
                    ("but", leak, State("INTRO", 0, True)),
                ]
            case "R_THIS":
                return [("is", 1.0, State("R_IS", 0, True))]
            case "R_IS":
                return [("unsafe", 1.0, State("CLOSE", 0, True))]
        return [(w, p, State(to, 0, True, -1, state.normal)) for w, p, to in _REFUSAL[state.kind]]


def refusal_words(rng: random.Random) -> list[str]:
    """The refusal that a deep row is trained to speak in the middle of an answer."""
    opener = rng.choices([w for w, _ in RECOVER_OPENERS], [p for _, p in RECOVER_OPENERS])[0]
    body = ["i", *(["cannot", "assist"] if rng.random() < 0.7 else ["must", "decline"]), "."]
    return [opener, *body, *(["<eos>"] if rng.random() < 0.62 else ["this", "is", "unsafe", "<eos>"])]
