"""Rollouts with a known truth, and judges that err in a known way, for the tests of judge errors."""

from __future__ import annotations

import numpy as np

from markovsafety import Rollouts
from markovsafety.outcomes import CODES, OUTCOMES

HARM, REFUSAL, BENIGN, TRUNCATED = (CODES[name] for name in OUTCOMES)
EOS, KNOWN = 2, {"sampling": {"eos_ids": [2]}}

# P(judged | true): rows and columns harm, refusal, benign, truncated. One judge is mild, one sees ghosts.
MILD = np.array([[0.75, 0.05, 0.2, 0], [0.02, 0.95, 0.03, 0], [0.04, 0.06, 0.9, 0], [0, 0, 0, 1.0]])
STERN = np.array([[0.95, 0.02, 0.03, 0], [0.15, 0.84, 0.01, 0], [0.15, 0.05, 0.8, 0], [0, 0, 0, 1.0]])


def answers(rng, prompts, n, *, harm, prefill=(0,), names=("a", "b"), spread=4.0):
    """Rollouts of a small language whose true outcomes are known.

    ``harm[category]`` is the mean chance of harm at prefill 0; it rises with the prefill. It differs between prompts (a
    beta law of `spread` pseudo-counts). Answers are words 5 to 9, end in 2, and go wrong at a random token.
    """
    rows = {"tokens": [], "prompt": [], "category": [], "prefill": [], "outcome": [], "hit": []}
    for p in range(prompts):
        name = names[p % len(names)]
        own = rng.beta(harm[name] * spread, (1 - harm[name]) * spread)
        for k in prefill:
            chance = 1 - (1 - own) * 0.9**k
            for _ in range(n):
                said = [*rng.integers(5, 10, k + rng.integers(2, 7)).tolist(), EOS]
                kind = HARM if rng.random() < chance else int(rng.choice([REFUSAL, BENIGN], p=[0.6, 0.4]))
                hit = rng.integers(k, len(said) - 1) if kind == HARM else len(said) - 1
                for key, value in zip(rows, (said, p, name, k, kind, hit)):
                    rows[key].append(value)
    return Rollouts.of(rows.pop("tokens"), prompt_id=rows.pop("prompt"), provenance=KNOWN, **rows)


def judged(rolls, rates, rng, *, late=0.0):
    """A judge that errs: P(judged | true) by category, at random tokens; harm that comes late is missed with `late`."""
    table = rates if isinstance(rates, dict) else dict.fromkeys(np.unique(rolls.category), rates)
    outcome, hit = rolls.outcome.copy(), rolls.hit.copy()
    for i, name in enumerate(rolls.category):
        size, forced = int(rolls.lengths[i]), int(rolls.prefill[i])
        said = int(rng.choice(4, p=table[name][rolls.outcome[i]]))
        if rolls.outcome[i] == HARM and rng.random() < late * (rolls.hit[i] - forced >= 3):
            said = BENIGN
        if said != rolls.outcome[i]:
            outcome[i] = said
            hit[i] = {HARM: rng.integers(forced, size), TRUNCATED: -1}.get(said, size - 1)
    return rolls.replace(outcome=outcome, hit=hit)


def some(rng, rolls, n):
    """Labels of n rollouts chosen at random, the rest not labelled."""
    labels = np.full(len(rolls), -1)
    at = rng.choice(len(rolls), min(n, len(rolls)), replace=False)
    labels[at] = rolls.outcome[at]
    return labels


def spread_out(rolls, rates):
    """The expected verdicts: every rollout once for each of them, weighted with its probability, hit where it was."""
    table = rates if isinstance(rates, dict) else dict.fromkeys(np.unique(rolls.category), rates)
    row, said, weight = [], [], []
    for i, name in enumerate(rolls.category):
        law = table[name][rolls.outcome[i]]
        for code in np.flatnonzero(law > 0):
            row.append(i)
            said.append(code)
            weight.append(law[code])
    part = rolls[np.array(row)]
    return part.replace(outcome=np.array(said), columns={**part.columns, "weight": np.array(weight)})
