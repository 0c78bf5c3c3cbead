"""How far to trust the numbers: every width under its name, labels, answers that share their beginning."""

from __future__ import annotations

import numpy as np
import pytest
from report_pages import rollouts

from markovsafety import KGram
from markovsafety.analysis import ALL, analyse


def test_every_width_is_told_by_name_beside_the_sampling_interval():
    rolls = rollouts({0: 0.3, 1: 0.5}, n=20)
    cut = rolls.replace(  # every tenth answer is cut off where it was harmless
        outcome=np.where((np.arange(len(rolls)) % 10 == 0) & (rolls.outcome != 0), 3, rolls.outcome),
        hit=np.where((np.arange(len(rolls)) % 10 == 0) & (rolls.outcome != 0), -1, rolls.hit),
    )
    a = analyse("m", cut, held_out=rollouts({0: 0.3, 1: 0.5}, seed=4), states=KGram(1))
    sampled, free = a.harm[ALL][0], cut.outcome[cut.prefill == 0]
    assert sampled.reasons["truncation"] is None
    assert a.whole.value == pytest.approx(sampled.value, abs=1e-12)
    assert a.whole.reasons["sampling"] == pytest.approx(sampled.reasons["sampling"], rel=1e-6)
    assert a.whole.reasons["model"] == pytest.approx(a.check.misfit.upper)
    assert a.whole.reasons["truncation"] >= (free == 3).mean() / 2 > 0
    assert (a.whole.reasons["judge"], a.whole.reasons["lumping"]) == (None, None)
    assert a.whole.level == pytest.approx(0.9)
    assert a.whole.upper >= min(1, sampled.upper + a.check.misfit.upper + (free == 3).mean()) - 1e-9
    # Without a held-out prefix nothing is known of the chain, and that is said.
    bare = analyse("m", rollouts({0: 0.3}), states=KGram(1)).whole
    assert (bare.reasons["model"], bare.reasons["truncation"], bare.level) == (None, 0, 0.95)
    assert analyse("m", rollouts({2: 0.3})).whole.reasons["sampling"] > 0


def test_labels_take_the_judges_errors_out_and_a_coin_is_told():
    true = rollouts({0: 0.3, 1: 0.5}, n=40)
    harm = true.outcome == 0
    missed = harm & (np.arange(len(true)) % 4 == 0)
    seen = true.replace(outcome=np.where(missed, 2, true.outcome))
    labels = {i: int(true.outcome[i]) for i in range(0, len(true), 3)}
    a = analyse("m", seen, states=KGram(1), labels=labels)
    right = harm[true.prefill == 0].mean()
    assert a.harm[ALL][0].value < 0.8 * right
    assert a.whole.value > 1.15 * a.harm[ALL][0].value
    assert a.whole.lower < right < a.whole.upper
    assert a.whole.reasons["judge"] > 0
    coin = true.replace(outcome=np.random.default_rng(0).permutation(true.outcome))
    told = analyse("m", coin, states=KGram(1), labels=labels)
    assert told.whole.reasons["judge"] > 0
    assert any("judge" in note for note in told.missing)


def test_answers_that_share_their_beginning():
    a = analyse("m", rollouts({0: 0.3, 1: 0.5}, prompts=30, n=8), states=KGram(1))
    assert a.branch.k == (0, 1)
    assert (np.asarray(a.branch.rho.lower) < 0.2).all()
    assert analyse("m", rollouts({0: 0.3, 1: 0.5}, n=1), states=KGram(1)).branch is None
