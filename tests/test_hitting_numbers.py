"""Several targets and starts in one call, derivatives as two factors, attribution, and the command that tells them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_chains import LAYERS, SEEDS, quick, random_chain
from test_hitting_evidence import answers

import markovsafety as ms
from markovsafety import toy
from markovsafety.bound import Bound
from markovsafety.cli import main
from markovsafety.hitting import Factored, core

# Several targets, several starts


@quick
@given(seed=SEEDS, layers=LAYERS, leaky=st.booleans())
def test_several_targets_are_the_single_calls(seed, layers, leaky):
    chain, _, _ = random_chain(seed, layers, leaky)
    targets = {"first": "harm", "both": ["harm", "benign"], "state": 0}
    n = chain.n_states
    for call in (
        lambda t: ms.hitting_probability(chain, t),
        lambda t: ms.hitting_time(chain, t, given=True),
        lambda t: ms.hitting_spread(chain, t, given=True),
        lambda t: ms.committor(chain, "refusal", t),
    ):
        joint = call(targets)
        assert joint.shape == ((layers + 1, n, 3) if layers else (n, 3))
        assert joint.info["targets"] == list(targets)
        for k, target in enumerate(targets.values()):
            one = call(target)
            for name in ("value", "lower", "upper"):
                assert np.array_equal(getattr(one, name), getattr(joint, name)[..., k], equal_nan=True)
                assert np.array_equal(getattr(one.at_start, name), getattr(joint.at_start, name)[k], equal_nan=True)
            width = joint.reasons["rounding"][..., k]
            assert np.array_equal(width, one.reasons["rounding"], equal_nan=True)


@quick
@given(seed=SEEDS)
def test_outcomes_add_up(seed):
    """On a chain where every walk ends, the probabilities of the ends sum to one; so do their fractions."""
    chain, _, _ = random_chain(seed)
    ends = {name: name for name in chain.outcomes}
    joint = ms.hitting_probability(chain, ends)
    every = ms.hitting_probability(chain, list(chain.outcomes))
    assert joint.value.sum(axis=1) == pytest.approx(every.value, abs=1e-13)
    exact = ms.hitting_probability(chain, ends, method="exact")
    whole = ms.hitting_probability(chain, list(chain.outcomes), method="exact")
    assert [sum(row) for row in exact.exact] == whole.exact
    assert sum(exact.at_start.exact) == whole.at_start.exact


def test_times_of_several_targets_may_include_any_outcome():
    chain = toy.ladder()
    joint = ms.hitting_time(chain, {"any": None, "harm": "harm"})
    assert np.isinf(joint.value[1, 1])
    assert joint.value[:, 0].tolist() == ms.hitting_time(chain).value.tolist()


def test_several_targets_of_an_estimated_chain_keep_their_intervals():
    chain = ms.estimate(ms.count(answers(240), states=ms.KGram(1)))
    joint = ms.hitting_probability(chain, {"harm": "harm", "refusal": "refusal"})
    assert joint.level == 0.95
    for k, name in enumerate(("harm", "refusal")):
        one = ms.hitting_probability(chain, name)
        assert (joint.lower[:, k] == one.lower).all()
        assert joint.at_start.upper[k] == one.at_start.upper
        assert joint.reasons["sampling"][:, k] == pytest.approx(one.reasons["sampling"])
    assert ms.hitting_distribution(chain, "harm", horizon=9).probability.reasons["sampling"] is None
    assert ms.hitting_spread(chain).at_start.reasons["sampling"] is None


@pytest.mark.parametrize("targets", [{}, {1: "harm"}])
def test_targets_have_names(targets):
    with pytest.raises(ms.InputError, match="targets are"):
        ms.hitting_probability(toy.ladder(), targets)


def test_what_could_not_be_proven_is_told_for_all_targets(monkeypatch):
    whole = core.probability

    def doubtful(w, *args):
        answer = whole(w, *args)
        return core.Answer(answer.X, answer.method, answer.why, None, (7,) if w.name == "harm" else ())

    monkeypatch.setattr(core, "probability", doubtful)
    with pytest.raises(ms.UntrustedError, match=r"^second: .* 7 states") as caught:
        ms.hitting_probability(toy.ladder(), {"first": "refusal", "second": "harm"})
    assert isinstance(caught.value.partial, Bound)
    assert caught.value.partial.shape == (7, 2)


@quick
@given(seed=SEEDS, layers=LAYERS)
def test_starts_are_a_loop(seed, layers):
    chain, _, _ = random_chain(seed, layers)
    rng = np.random.default_rng(seed)
    laws = rng.dirichlet(np.ones(chain.n_states), size=3)
    seen = ms.visits(chain, laws)
    assert seen.shape == (3, *ms.visits(chain).shape)
    derivatives = ms.sensitivity(chain, "harm", start=laws)
    for k, law in enumerate(laws):
        one = ms.visits(chain, law)
        assert np.array_equal(one.lower, seen.lower[k])
        assert np.array_equal(one.upper, seen.upper[k])
        alone = ms.sensitivity(chain, "harm", start=law)
        for a, b in zip(alone if layers else [alone], derivatives[k] if layers else [derivatives[k]]):
            assert (a.data == b.data).all()
    own = ms.visits(chain, chain.start)
    assert np.array_equal(own.value, ms.visits(chain).value)
    states = ms.visits(chain, [0, chain.n_states - 1])
    assert np.array_equal(states.value[0], ms.visits(chain, 0).value)


def test_starts_may_be_labels():
    chain = toy.ladder()
    both = ms.visits(chain, ["level 2", "level 3"])
    assert both.value[1].tolist() == ms.visits(chain, 3).value.tolist() == ms.visits(chain).value.tolist()
    pairs = ms.Chain([[0, 1], [0, 0]], {"harm": 1}, states=[("a",), ("b",)])
    assert ms.visits(pairs, ("a",)).value.tolist() == [1, 1]  # a tuple that is a label
    assert ms.visits(pairs, [("a",), ("b",)]).value.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("start", [[], [9], "nowhere", [0.5, 0.6, 0, 0, 0, 0, 0], [[0.5] * 7], [0, 0, 0, 0, 0, 0, 1]])
def test_what_is_no_start_is_refused(start):
    with pytest.raises(ms.InputError, match="start"):
        ms.visits(toy.ladder(), start)


def test_visits_of_an_estimated_chain_from_elsewhere():
    chain = ms.estimate(ms.count(answers(240), states=ms.KGram(1)))
    assert ms.visits(chain, chain.entry[0]).level == 0.95  # rollouts began there
    elsewhere = ms.visits(chain, 1)
    assert elsewhere.level == 1
    assert "no rollouts were started" in elsewhere.info["sampling"]


# Derivatives as two factors


@quick
@given(seed=SEEDS, layers=LAYERS)
def test_the_factors_are_the_matrix(seed, layers):
    chain, _, _ = random_chain(seed, layers)
    both = ms.sensitivity(chain, "harm", factored=True)
    whole = ms.sensitivity(chain, "harm")
    matrices = whole if layers else [whole]
    assert (both.entries() == np.concatenate([m.data for m in matrices])).all()
    ranked = []
    for t, (P, m) in enumerate(zip(chain.layers, matrices)):
        at = (t,) if layers else ()
        rows = np.repeat(np.arange(chain.n_states), np.diff(m.indptr))
        assert (m.indices == P.indices).all()
        for i, j, d in zip(rows.tolist(), m.indices.tolist(), m.data.tolist()):
            assert both.at(*at, i, j) == d == both.row(*at, i)[j]
            ranked.append(((*at, i, j), d, both.constrained(*at, i, j)))
    for constrained in (False, True):
        sizes = sorted((abs(e[1 + constrained]) for e in ranked if e[1 + constrained]), reverse=True)
        for k in (1, 3, 1000):
            best = both.top(k, constrained=constrained)
            assert [abs(e[-1]) for e in best] == sizes[:k]
            for e in best:
                assert e[-1] == (both.constrained if constrained else both.at)(*e[:-1])


@quick
@given(seed=SEEDS, layers=LAYERS)
def test_constrained_derivatives_are_finite_differences(seed, layers):
    """Mass e moves into one transition, the rest of the row is scaled down by 1 - e."""
    chain, _, _ = random_chain(seed, layers)
    both = ms.sensitivity(chain, "harm", factored=True)
    rng = np.random.default_rng(seed)
    t = int(rng.integers(max(layers, 1)))
    n, e = chain.n_states, 2.0**-20
    i, j = int(rng.integers(n - 3)), int(rng.integers(n))
    h = ms.hitting_probability(chain, "harm").at_start.value

    def moved(e):
        dense = [P.toarray() for P in chain.layers]
        dense[t][i] *= 1 - e
        dense[t][i, j] += e
        other = (
            ms.Chain.layered(dense, chain.outcomes, chain.start)
            if layers
            else ms.Chain(dense[0], chain.outcomes, chain.start)
        )
        return ms.hitting_probability(other, "harm").at_start.value

    slope = (4 * moved(e) - moved(2 * e) - 3 * h) / (2 * e)  # second order, from one side
    known = both.constrained(t, i, j) if layers else both.constrained(i, j)
    if (both.h[t, i] if layers else both.h[i]) > 0 or layers:
        assert known == pytest.approx(slope, abs=1e-4 * max(1.0, abs(known)) ** 2)


def test_the_largest_are_found_where_they_are():
    """The states that are visited most lead to the refusal only, so the rows looked at first are not the best."""
    n = 400
    P = np.zeros((n + 2, n + 2))
    P[:300, n + 1], P[300:n, n] = 1, 1
    P[:n, :3] += 0.5
    P[:n] /= P[:n].sum(axis=1, keepdims=True)
    chain = ms.Chain(P, {"harm": n, "refusal": n + 1})
    h = np.append(np.full(n, 1e-3), [1, 0])
    both = Factored(chain, np.append(np.linspace(2, 1, n), [0, 0]), h)
    rows = np.repeat(np.arange(n + 2), np.diff(chain.P.indptr))
    for constrained, values in ((False, both.entries()), (True, both.visits[rows] * (h[chain.P.indices] - h[rows]))):
        found = both.top(5, constrained=constrained)
        assert [abs(e[-1]) for e in found] == sorted(np.abs(values), reverse=True)[:5]
        assert [e[:2] for e in found] == [(300 + i, n) for i in range(5)]


def test_factors_by_label_and_their_refusals():
    chain = toy.ladder()
    both = ms.sensitivity(chain, "harm", factored=True)
    assert both.at("level 3", "level 4") == both.at(3, 4) > 0
    assert both.row(6).tolist() == [0] * 7  # the target's row is never read
    assert "7 x 7" in repr(both)
    for wrong in ((3,), (1, 2, 3), (3, 9), (3, "nowhere")):
        with pytest.raises(ms.InputError):
            both.at(*wrong)
    with pytest.raises(ms.InputError, match="k is"):
        both.top(0)
    layered = ms.sensitivity(ms.Chain.layered([chain.P] * 2, chain.outcomes, 3), "harm", factored=True)
    with pytest.raises(ms.InputError, match="layer, i, j"):
        layered.at(3, 4)


@quick
@given(seed=SEEDS, layers=LAYERS)
def test_attribution_adds_up(seed, layers):
    chain, _, _ = random_chain(seed, layers)
    rng = np.random.default_rng(seed)
    dense = [P.toarray() for P in chain.layers]
    ends = chain.outcome_mask
    for D in dense:
        D[~ends] = (D[~ends] + rng.dirichlet(np.ones(len(D)), size=int((~ends).sum()))) / 2
    other = (
        ms.Chain.layered(dense, chain.outcomes, chain.start)
        if layers
        else ms.Chain(dense[0], chain.outcomes, chain.start)
    )
    share = ms.attribute(chain, other, "harm")
    change = ms.hitting_probability(other, "harm").at_start.value - ms.hitting_probability(chain, "harm").at_start.value
    assert share.sum() == pytest.approx(change, abs=1e-12)
    assert ms.attribute(other, chain, "harm") == pytest.approx(-share, abs=1e-12)  # entries vanish as well as appear
    same = ms.attribute(chain, chain, "harm")
    assert (same == 0).all()


# The command


def test_solve_tells_several_targets_the_deviation_and_the_law(tmp_path, capsys):
    chain = toy.ladder()
    path = str(ms.write_chain(chain, tmp_path / "c.npz"))

    def told(*words):
        assert main(["solve", path, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["result"]

    fixed = {"target", "at_start", "method", "certified", "n_states", "expected_tokens"}
    single = told()
    assert single.keys() == fixed | {"deviation_tokens"}
    assert single["target"] == "harm"
    assert single["deviation_tokens"]["value"] == ms.hitting_spread(chain).at_start.value
    both = told("--target", "harm", "--target", "refusal", "--horizon", "20")
    assert both["target"] == ["harm", "refusal"]
    assert (
        both["at_start"]["value"]
        == ms.hitting_probability(chain, {"a": "harm", "b": "refusal"}).at_start.value.tolist()
    )
    law = ms.hitting_distribution(chain, "refusal", horizon=20)
    assert both["distribution"]["refusal"] == json.loads(json.dumps(law.to_json()))
    assert told("--target", "harm,refusal", "--horizon", "20") == both
    assert told("--horizon", "20")["distribution"] == both["distribution"]["harm"]
    table = tmp_path / "t.csv"
    assert main(["solve", path, "--target", "harm,refusal", "--horizon", "9", "--out", str(table)]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "P(harm) = 0.0729" in line
    assert "P(refusal) = 0.927" in line
    assert "by token 9: " in line
    head, *rows = table.read_text().splitlines()
    assert head.startswith("state,harm value,harm lower,harm upper,refusal value")
    assert float(rows[3].split(",")[4]) == ms.hitting_probability(chain, "refusal").value[3]


def test_solve_refuses_a_horizon_without_a_start(tmp_path, capsys):
    chain = ms.Chain([[0.5, 0.5], [0, 0]], {"harm": 1})
    path = str(ms.write_chain(chain, tmp_path / "c.npz"))
    assert main(["solve", path, "--horizon", "5"]) == 2
    assert "start" in capsys.readouterr().err
    assert main(["solve", path]) == 0
    assert "no start law" in capsys.readouterr().out
