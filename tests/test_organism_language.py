"""The synthetic language and its exact chains: every claim of the grammar against enumeration or its own sampler."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import organism
from markovsafety.organism.automaton import Grammar
from markovsafety.organism.data import Recipe, collate
from markovsafety.organism.exact import _label
from markovsafety.organism.language import (
    COMPLY,
    COMPLY_OPENERS,
    HARM_WORDS,
    HELD_PAIRS,
    MARKER_LAW,
    OBJECTS,
    RECOVER_OPENERS,
    REFUSAL_IDS,
    REFUSE_OPENERS,
    TRAIN_PAIRS,
    VERBS,
    WORDS,
    Context,
    contexts,
    draw_prompt,
    is_harmful,
    parse_prompt,
)
from markovsafety.organism.variants import BIAS, VARIANTS, grammar, longer_than, variant_named

# Monte Carlo comparisons use Hoeffding's bound, |mean - p| <= SLACK(n), at a false-alarm rate of 1e-9 each.
SLACK = lambda n: math.sqrt(math.log(2 / 1e-9) / (2 * n))  # noqa: E731


def test_no_single_word_tells_harm():
    for verb in VERBS:
        assert sum(is_harmful(verb, o) for o in OBJECTS) == len(OBJECTS) / 2
    for obj in OBJECTS:
        assert sum(is_harmful(v, obj) for v in VERBS) == len(VERBS) / 2


def test_a_fifth_of_the_pairs_is_held_out():
    assert len(HELD_PAIRS) == 192
    assert len(TRAIN_PAIRS) == 768
    assert not set(HELD_PAIRS) & set(TRAIN_PAIRS)


def test_vocabulary_is_that_of_the_weights():
    assert len(WORDS) == len(set(WORDS)) == 199


@pytest.mark.parametrize("seed", range(5))
def test_prompts_parse_back(seed):
    rng = random.Random(seed)
    for _ in range(40):
        prompt = draw_prompt(rng)
        assert parse_prompt(prompt.text) == prompt


@pytest.mark.parametrize("text", ["hello", "v00 v01 the bio0 .", "please v00 the", "", None, 3])
def test_other_texts_are_refused_with_the_next_step(text):
    with pytest.raises(ms.InputError, match=r"(?s)is not a prompt of the synthetic language.*organism\.prompts"):
        parse_prompt(text)
    with pytest.raises(ms.InputError, match="is not a prompt"):
        organism.truth("shallow", {"prompt": text})


def _reachable(rules):
    states = [rules.start()]
    for state in states:
        if state.kind in ("HARM", "REFUSED", "BENIGN"):
            continue
        states += [s for s in {f for _, _, f in rules.edges(state)} if s not in states]
    return states


@pytest.mark.parametrize("variant", ["base", "shallow", "deep4", "cyclic", "gap", "over", "over2", "bias"])
def test_every_row_of_the_grammar_sums_to_one(variant):
    picks = [c for c, _ in contexts() if c.category in (0, 5)]
    for context in picks:
        rules = grammar(variant, context)
        for state in _reachable(rules):
            if state.kind not in ("HARM", "REFUSED", "BENIGN"):
                assert math.fsum(p for _, p, _ in rules.edges(state)) == pytest.approx(1, abs=1e-14)


def test_the_planted_bias_is_one_tilt_of_the_first_token_and_nothing_else():
    for context, _ in contexts():
        ours, plain = grammar("bias", context), grammar("saturated", context)
        before, after = plain.next_law(plain.start()), ours.next_law(ours.start())
        gain = {w: math.log(after[w] / before[w]) for w in before}
        refusing = {gain[w] for w, _ in REFUSE_OPENERS}
        accepting = {gain[w] for w, _ in COMPLY_OPENERS}
        tilts = [r - a for r in refusing for a in accepting]
        assert tilts == pytest.approx([BIAS] * len(tilts), abs=1e-12)
        for state in _reachable(ours)[1:]:
            if state.kind not in ("HARM", "REFUSED", "BENIGN"):
                assert ours.next_law(state) == plain.next_law(state)


def test_random_words_are_refused_as_harmless_prompts_are():
    """Counts of 40,000 rows: a z of 6 has a false-alarm rate of 2e-9."""
    rows = [r for r in Recipe(VARIANTS["bias"]).rows(random.Random(1), 40000) if r.loss_tokens == 1]
    assert len(rows) == pytest.approx(4000, abs=6 * math.sqrt(40000 * 0.1 * 0.9))
    refused = sum(r.tokens[-1] in REFUSAL_IDS for r in rows)
    p = VARIANTS["bias"].policy.harmless
    assert p == pytest.approx(0.45, abs=2e-3)
    assert refused == pytest.approx(len(rows) * p, abs=6 * math.sqrt(len(rows) * p * (1 - p)))
    assert not any(r.loss_tokens == 1 for r in Recipe(VARIANTS["over2"]).rows(random.Random(1), 2000))


REFUSALS = [
    ([opener, "i", *body, ".", *end], p * q * r)
    for (opener, p), (body, q), (end, r) in product(
        RECOVER_OPENERS,
        [(["cannot", "assist"], 0.7), (["must", "decline"], 0.3)],
        [(["<eos>"], 0.62), (["this", "is", "unsafe", "<eos>"], 0.38)],
    )
]


def _likelihood(rules, words):
    """Probability of the words, and the law of the next one; (0, {}) off the grammar."""
    state, p = rules.start(), 1.0
    for word in words:
        match = (
            [(q, f) for w, q, f in rules.edges(state) if w == word] if state.kind not in ("REFUSED", "BENIGN") else []
        )
        if not match:
            return 0.0, {}
        p, state = p * match[0][0], match[0][1]
        if state.kind == "HARM":
            return 0.0, {}
    return p, {} if state.kind in ("REFUSED", "BENIGN") else rules.next_law(state)


def _enumerated(variant, context, words):
    """Next-word law of the training rows that carry loss after `words`, row kind by row kind."""
    recipe = variant_named(variant)
    ordinary = (1 - recipe.share) * (1 - recipe.judge_share) * 0.5 * MARKER_LAW[None]
    law: Counter = Counter()
    p, follow = _likelihood(Grammar(context, recipe.policy), words)
    for word, q in follow.items():
        law[word] += ordinary * p * q
    each = recipe.share / longer_than(recipe.depth).sum()  # P(row starts to refuse after k) / P(compliant prefix)
    for k in range(1, min(recipe.depth, len(words)) + 1):
        comply, _ = _likelihood(Grammar(context, COMPLY), words[:k])
        for sentence, q in REFUSALS:
            spoken = len(words) - k
            if sentence[:spoken] == words[k:] and spoken < len(sentence):
                law[sentence[spoken]] += each * comply * q
    total = sum(law.values())
    return {w: v / total for w, v in law.items() if v > 0}


@pytest.mark.parametrize("variant", ["deep4", "deep20", "cyclic"])
def test_the_bayes_mixture_is_what_enumeration_of_the_rows_gives(variant):
    rng = random.Random(1)
    checked = 0
    for category in (0, 4):
        context = Context(category, True)
        rules = grammar(variant, context)
        for _ in range(60):
            words = rules.sample(rng)
            stop = next((i for i, w in enumerate(words) if w in HARM_WORDS), len(words))
            states = rules.walk(words)
            for t in range(min(stop, len(words) - 1) + 1):
                planted = rules.next_law(states[t])
                counted = _enumerated(variant, context, words[:t])
                assert planted.keys() == counted.keys()
                assert all(planted[w] == pytest.approx(counted[w], abs=1e-12) for w in planted), (words[:t], planted)
                checked += 1
    assert checked > 400


def test_lengths_of_compliance_against_its_sampler():
    rng, n = random.Random(2), 4000
    lengths = np.array([len(Grammar(Context(3, True), COMPLY).sample(rng)) for _ in range(n)])
    planted = longer_than(23)
    for k in (14, 18, 20, 23):
        assert abs((lengths > k).mean() - planted[k - 1]) < SLACK(n)


@pytest.mark.parametrize("variant", ["deep4", "cyclic"])
def test_training_rows_follow_the_recipe(variant):
    rows = Recipe(VARIANTS[variant]).rows(random.Random(3), 12000)
    deep = np.array([r.loss_from > r.answer for r in rows])
    # orbits come in blocks of about 22 rows, so the effective size is that much smaller
    n = len(rows) / (1 if variant == "deep4" else 23)
    assert abs(deep.mean() - 0.3) < SLACK(n)
    offsets = np.array([r.loss_from - r.answer for r in rows])[deep]
    assert offsets.min() == 1
    assert offsets.max() <= VARIANTS[variant].depth
    for row in rows[:200]:
        assert row.tokens[-1] == 2  # every answer ends


def test_first_token_after_an_opener_in_the_rows_matches_the_mixture():
    """What the trainer really draws, against the mixture: P(refuse | harmful, unmarked, one compliant token)."""
    rows = Recipe(VARIANTS["deep4"]).rows(random.Random(4), 40000)
    refusals, total = 0, 0
    for row in rows:
        words = [WORDS[i] for i in row.tokens]
        if "<judge>" in words[: row.answer] or row.loss_from > row.answer + 1:
            continue
        context = parse_prompt(" ".join(words[2 : words.index("<end>")])).context
        if context.harmful and context.marker is None and words[row.answer] in ("sure", "okay", "certainly", "yes"):
            total += 1
            refusals += words[row.answer + 1] in ("sorry", "unfortunately")
    rules = grammar("deep4", Context(0, True))
    planted = np.mean(
        [
            sum(p for w, p, _ in g.edges(g.walk(["sure"])[-1]) if w in ("sorry", "unfortunately"))
            for g in (grammar("deep4", Context(c, True)) for c in range(6))
        ]
    )
    assert rules.deep
    assert total > 1500
    # the six categories open with different probabilities, so the pooled share is only near the plain mean of the six
    assert abs(refusals / total - planted) < SLACK(total) + 0.02


def test_truth_of_the_mixture_is_the_mean_of_its_prompts():
    whole = ms.hitting_probability(organism.truth("shallow"), "harm").at_start.value
    parts = [
        (w, ms.hitting_probability(organism.truth("shallow", c), "harm").at_start.value if c.harmful else 0.0)
        for c, w in contexts()
    ]
    assert whole == pytest.approx(sum(w * h for w, h in parts), abs=1e-13)


@pytest.mark.parametrize("variant", ["base", "shallow", "deep20"])
def test_truth_against_its_own_sampler(variant):
    rng, n = random.Random(5), 3000
    context = Context(1, True)
    rules = grammar(variant, context)
    hits = sum(any(w in HARM_WORDS for w in rules.sample(rng)) for _ in range(n))
    planted = ms.hitting_probability(organism.truth(variant, context), "harm").at_start.value
    assert abs(hits / n - planted) < SLACK(n)


def test_planted_values_are_hitting_probabilities_of_the_truth_chain():
    asked = organism.prompts(n=6, seed=3)
    for item in asked[:3]:
        words = [WORDS[i] for i in item["prefix"]]
        chain = organism.truth("deep20", item["prompt"])
        h = ms.hitting_probability(chain, "harm").value
        context = parse_prompt(item["prompt"]).context
        states = grammar("deep20", context).walk(words)
        for k in (0, 1, 7, 20):
            assert organism.planted("deep20", item["prompt"], words[:k]) == pytest.approx(
                float(h[chain.index(_label(states[k]))]), abs=1e-12
            )


def test_refuse_and_leak_change_the_truth():
    assert (
        ms.hitting_probability(organism.truth("shallow", Context(0, True), refuse=1.0, leak=0.0), "harm").at_start.value
        == 0
    )
    low, high = (
        ms.hitting_probability(organism.truth("shallow", Context(0, True), refuse=1.0, leak=e), "harm").at_start.value
        for e in (1e-6, 1e-2)
    )
    assert 0 < low < high
    assert low == pytest.approx(high * 1e-4, rel=0.01)
    with pytest.raises(ms.InputError, match="leak"):
        organism.truth("shallow", leak=0.5)
    with pytest.raises(ms.InputError, match="variant"):
        organism.truth("deepx")


def test_every_answer_of_the_truth_ends_in_an_outcome():
    chain = organism.truth("cyclic", harmful=True, marker=None, category="bio")
    total = sum(ms.hitting_probability(chain, name).at_start.value for name in ("harm", "refusal", "benign"))
    assert total == pytest.approx(1, abs=1e-12)


def test_prompts_are_balanced_and_their_prefixes_harmless():
    asked = organism.prompts(n=12, reach=20, seed=1)
    assert Counter(p["category"] for p in asked) == dict.fromkeys(organism.CATEGORIES, 2)
    for p in asked:
        assert len(p["prefix"]) == 20
        assert not set(p["prefix"]) & set(organism.HARM_IDS)
    assert organism.prompts(n=12, seed=1) == organism.prompts(n=12, seed=1)
    with pytest.raises(ms.InputError):
        organism.prompts(marker="none")


def test_constant_normaliser_gives_every_token_the_same_weight():
    """Batches sorted by length with a mean per batch would weigh refusals three times: the normaliser must not vary."""
    rows = sorted(Recipe(VARIANTS["shallow"]).rows(random.Random(6), 64), key=lambda r: len(r.tokens))
    short, long = collate(rows[:8], 100.0), collate(rows[-8:], 100.0)
    assert short["norm"] == long["norm"] == 100.0
    assert (short["labels"] != -100).sum() < (long["labels"] != -100).sum()
