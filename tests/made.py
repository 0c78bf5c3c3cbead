"""Rollouts and chains made by hand or by hypothesis, and the state maps rollouts are counted with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

import markovsafety as ms
from markovsafety.chains import Product

quick = settings(deadline=None, derandomize=True, max_examples=30)
HARM, REFUSAL, BENIGN, TRUNCATED = range(4)
MAPS = [
    ms.KGram(0),
    ms.KGram(1),
    ms.KGram(2),
    ms.KGram(5),
    ms.Position(),
    ms.JudgedPrefix({1: "refusing", 2: "complying"}),
    ms.JudgedPrefix(lambda prefix: int(prefix.sum()) % 3),
    Product((ms.Position(), ms.JudgedPrefix({0: "a"}))),
]


def make(rows, **columns) -> SimpleNamespace:
    """Rollouts from (tokens, outcome, hit, prefill, prompt) rows; prompts 0, 3, ... are of category bio, and so on."""
    tokens, outcome, hit, prefill, prompt = zip(*rows) if rows else ((), (), (), (), ())
    return SimpleNamespace(
        tokens=np.array([t for answer in tokens for t in answer], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int64),
        outcome=np.array(outcome, dtype=np.int8),
        hit=np.array(hit, dtype=np.int32),
        prefill=np.array(prefill, dtype=np.int32),
        prompt_id=np.array(prompt, dtype=np.int64),
        category=np.array([("bio", "chem", "cyber")[p % 3] for p in prompt], dtype=object),
        columns={k: np.asarray(v) for k, v in columns.items()},
    )


@st.composite
def rows(draw, prefills=(0, 1, 2), vocab=3):
    def one():
        prefill = draw(st.sampled_from(prefills))
        size = prefill + draw(st.integers(1, 6))
        tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=size, max_size=size))
        outcome = draw(st.integers(0, 3))
        hit = -1 if outcome == TRUNCATED else draw(st.integers(prefill, size - 1))
        return tokens, outcome, hit, prefill, draw(st.integers(0, 4))

    return [one() for _ in range(draw(st.integers(1, 8)))]


def ended(data) -> bool:
    return any(outcome != TRUNCATED for _, outcome, _, _, _ in data)


BY_HAND = [
    ([1, 2, 9], HARM, 1, 0, 0),  # start -> (1) -> harm; token 9 lies behind the hit
    ([1, 2], TRUNCATED, -1, 0, 1),  # start -> (1) -> (2) -> truncated
    ([3, 1, 2], REFUSAL, 2, 2, 0),  # forced 3, 1: enters in (1), -> refusal
]

P3 = [[0.5, 0.25, 0.25], [0, 0, 0], [0, 0, 0]]
ENDS = {"harm": 1, "refusal": 2}
LABELS = ["begin", "harm", ("a", (1, -1))]


def chain3(**more) -> ms.Chain:
    return ms.Chain(P3, ENDS, "begin", LABELS, **more)


label = st.recursive(
    st.integers(-5, 10**12) | st.text(max_size=4), lambda x: st.lists(x, max_size=3).map(tuple), max_leaves=4
)


@st.composite
def chains(draw) -> ms.Chain:
    n = draw(st.integers(2, 6))
    layers = draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ends = draw(st.integers(1, n - 1))
    matrices = []
    for _ in range(max(layers, 1)):
        P = rng.random((n, n)) * (rng.random((n, n)) < 0.6) + np.eye(n) * 1e-3
        P /= P.sum(axis=1, keepdims=True)
        P[n - ends :] *= (rng.random(ends) < 0.3)[:, None]  # some outcomes leak, others absorb
        matrices.append(P)
    outcomes = {"harm": [n - 1]} if ends == 1 else {"harm": list(range(n - ends, n - 1)), "refusal": [n - 1]}
    start = draw(st.sampled_from([None, 0, "law"]))
    start = rng.dirichlet(np.ones(n)) if start == "law" else start
    names = draw(st.none() | st.lists(label, min_size=n, max_size=n, unique=True))
    if names and {"harm", "refusal"} & {x for x in names if isinstance(x, str)}:
        names = None
    if layers:
        return ms.Chain.layered(matrices, outcomes, start, names)
    return ms.Chain(matrices[0], outcomes, start, names)
