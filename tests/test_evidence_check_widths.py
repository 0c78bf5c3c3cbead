"""What `check` adds to a probability (truncation, misfit), states that know the prompt, and odd evidence by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_depth import make_rollouts
from test_evidence_check_parts import ROLLS, said

import markovsafety as ms
from markovsafety.bench.check_worlds import exact
from markovsafety.bound import Bound
from markovsafety.chains.states import ByPrompt, Product
from markovsafety.evidence import censored_harm, with_misfit, with_truncation
from markovsafety.evidence.walks import walks


def test_truncation_is_a_width():
    rolls = said(limit=3)
    b = censored_harm(rolls)
    harm, cut = (float((rolls.outcome == code).mean()) for code in (0, 3))
    assert cut > 0.1
    assert b.value == pytest.approx(harm)
    assert b.info["truncated"] == pytest.approx(cut)
    assert b.reasons["truncation"] == pytest.approx(cut / 2)
    assert b.upper > harm + cut
    assert b.lower == ms.check(exact(), rolls).table[0]["measured_lower"]
    # The chain of the same rollouts says the same at its start, and by state.
    chain = ms.estimate(ms.count(rolls, ms.KGram(1)))
    c = censored_harm(chain)
    assert c.at_start.value == pytest.approx(harm)
    assert c.at_start.reasons["truncation"] == pytest.approx(cut / 2)
    assert c.at_start.upper == pytest.approx(ms.hitting_probability(chain, ["harm", "truncated"]).at_start.upper)
    assert c.shape == (chain.n_states,)
    # With more tokens the truth lies inside: P(harm) of the exact chain.
    assert b.lower < ms.hitting_probability(exact(), "harm").at_start.value < b.upper
    nothing = censored_harm(said())
    assert nothing.reasons["truncation"] == 0
    for call in (
        lambda: with_truncation(b, Bound(0.0, 0.0, 1.0)),
        lambda: with_truncation(b, b),  # truncation is there already
        lambda: censored_harm(rolls, prefill=7),
    ):
        with pytest.raises(ms.InputError):
            call()


def test_check_of_cut_rollouts_widens_and_says_so():
    chain = exact()
    held = said(4, limit=2, prefix=(2, 1), prompts=60, n=40)
    result = ms.check(chain, held, margin=0.1)
    row = result.table[0]
    assert row["truncated"] == pytest.approx(float((held.outcome == 3).mean()))
    assert row["truncated"] > 0.3
    # The chain is right: its difference from what was seen is the harm that the limit hid.
    assert row["difference"] > 0.1
    assert row["difference_lower"] < -0.1
    assert row["measured_upper"] > row["measured"] + row["truncated"]
    assert result.passed is None
    assert "cut off by the token limit" in result.verdict
    cut = ms.estimate(ms.count(said(5, limit=2), ms.KGram(1)))
    row = ms.check(cut, said(4, prefix=(2, 1)), margin=0.1).table[0]
    assert row["predicted_truncated"] > 0.3
    assert row["difference_lower"] < 0 < row["difference_upper"]


def test_misfit_is_a_width():
    chain = exact()
    result = ms.check(chain, said(6, prefix=(2, 1)))
    b = ms.hitting_probability(chain, "harm").at_start
    wide = with_misfit(b, result)
    assert wide.reasons["model"] == result.misfit.upper
    assert wide.upper == pytest.approx(b.upper + result.misfit.upper)
    assert wide.level == pytest.approx(0.95)  # a proven number with a misfit of 95 %
    assert result.misfit.value == abs(result.table[0]["difference"])
    # Over two depths the interval allows for both.
    both = ms.check(chain, ms.Rollouts.concat([said(6, prefix=(2, 1)), said(6, prefix=(2,))]))
    assert both.misfit.upper > max(abs(r[f"difference_{end}"]) for r in both.table for end in ("lower", "upper")) + 1e-4
    with pytest.raises(ms.InputError, match="there already"):
        with_misfit(wide, result)
    with pytest.raises(ms.InputError, match="no misfit"):
        with_misfit(b, ms.check(chain, said()))
    json.dumps(result.to_json(), allow_nan=False)


def test_by_prompt():
    labels = {i: f"kind {i % 3}" for i in range(40)}
    chain = ms.estimate(ms.count(ROLLS, Product([ByPrompt(labels), ms.KGram(1)])))
    assert {x[0] for x in chain.states if isinstance(x, tuple)} == {"kind 0", "kind 1", "kind 2"}
    w = walks(ROLLS, ByPrompt(labels))
    assert all(w.labels[s] == labels[int(ROLLS.prompt_id[r])] for r, s in zip(w.row, w.state))
    for call in (
        lambda: ms.count(ROLLS, ByPrompt({0: "a"})),
        lambda: ByPrompt("marker"),
        lambda: ByPrompt().walk(np.array([1, 2]), 0),
        lambda: ms.check(chain, said(prefix=(1,), prompts=50), states=Product([ByPrompt(labels), ms.KGram(1)])),
    ):
        with pytest.raises(ms.InputError):
            call()


def test_odd_evidence_is_named():
    chain = ms.estimate(ms.count(ROLLS, ms.KGram(1)))
    one = ms.check(chain, said(7, prompts=1, n=50, prefix=(1,)))
    assert any("one prompt" in w for w in one.warnings)
    assert all(f.verdict == "not tested" for f in one.findings if f.name != "order")
    other = said(7, prefix=(1,)).replace(category=np.full(800, "strange", dtype=object))
    assert any("strange" in w for w in ms.check(chain, other).warnings)
    assert not ms.check(chain, other, assumptions=False).findings
    layered = ms.Chain.layered([chain.P] * 3, {"harm": chain.mask("harm")}, chain.start, chain.states)
    assert ms.check(layered, said(prefix=(1,)), states=ms.KGram(1)).findings == ()
    lone = make_rollouts([1, 0, 2, 1, 0, 1], [3] * 6, prefill=2)
    assert ms.check(chain, lone).passed is None
