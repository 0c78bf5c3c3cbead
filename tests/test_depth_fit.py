"""Hazards fitted to measured profiles: survival ratios, the exponential, and recovery since a forced prefix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from test_depth import make_rollouts

import markovsafety as ms
from markovsafety.depth import (
    PUBLISHED,
    Hazards,
    HeldOut,
    Rates,
    fit_hazards,
    fit_recovery,
    held_out_profile,
    profile,
)

quick = settings(deadline=None, derandomize=True, max_examples=30)
ROOT = Path(__file__).resolve().parents[1]

# --- published rates ---


def test_prefill_table_of_llama_2():
    # 2406.05946, Table 3 (initial), with harm at 0 of Table 4: survival ratios, and the exponential behind token 0.
    fit = fit_hazards(PUBLISHED["prefill"], draws=200)
    assert np.round(100 * fit.refusal.value, 1).tolist() == [96.4, 18.3, 8.2, 1.6]
    assert 100 * fit.refusal.value[1] == pytest.approx(18.25, abs=0.005)  # printed elsewhere as 18.2
    assert [f"{x:.3f}" for x in fit.per_token.value[:1]] == ["0.487"]
    assert [f"{x:.4f}" for x in fit.per_token.value[1:]] == ["0.0395", "0.0085", "0.0008"]
    curve = fit.exponential
    assert [f"{x.value:.3f}" for x in (curve.a, curve.b, curve.at_zero)] == ["0.569", "0.401", "0.168"]
    assert f"{curve.c.value:.2f}" == "5.02"
    assert curve.depths == (5, 10, 20, 40)
    assert curve.freedom == 1
    assert curve.p > 0.5
    assert curve.harm([5, 40]) == pytest.approx(np.array([0.421, 0.57]) - curve.residuals[[0, 3]])
    assert any("another, jailbroken model" in c for c in fit.caveats)
    assert any("time since the forced prefix" in c for c in fit.caveats)


def test_the_gate_at_zero_is_not_proven_by_the_table():
    # Extrapolated 16.8 % against 1.5 % looks like a gate; by the printed deviations alone c may be so small that the
    # curve goes through 1.5 %. (0.569 - 0.554 exp(-k / 3.8) is within one deviation of all four rates.)
    fit = fit_hazards(PUBLISHED["prefill"], noise="runs")
    assert fit.exponential.at_zero.lower < 0.015 < fit.exponential.at_zero.value
    assert any("cannot be told" in c for c in fit.caveats)
    k, sd = np.array(PUBLISHED["prefill"].at[1:]), np.array(PUBLISHED["prefill"].sd[1:], dtype=float)
    assert (abs(0.569 - 0.554 * np.exp(-k / 3.8) - np.array(PUBLISHED["prefill"].rate[1:])) <= sd).all()


def test_the_ratio_makes_an_augmented_model_look_slow():
    fit = fit_hazards(PUBLISHED["prefill, augmented"])
    assert [f"{x:.3f}" for x in fit.per_token.value] == ["0.007", "0.016", "0.014"]
    assert fit.exponential is None
    assert any("no exponential" in c for c in fit.caveats)


@quick
@given(st.lists(st.integers(1, 199), min_size=2, max_size=6, unique=True), st.integers(1, 7))
def test_hazards_repeat_a_rising_profile(harms, gap):
    harms = sorted(harms)
    at = tuple(2 + gap * i for i in range(len(harms)))
    rates = {k: x / 200 for k, x in zip(at, harms)}
    fit = fit_hazards(rates, n=200, draws=20)
    h = fit.hazards().harm(at).value
    assert h == pytest.approx(list(rates.values()), abs=1e-12)
    assert isinstance(fit.hazards(), Hazards)
    assert (1 - fit.per_token.value) ** gap == pytest.approx(1 - fit.refusal.value, abs=1e-12)
    assert (fit.refusal.lower <= fit.refusal.value).all()
    assert "refused" in str(fit)


def test_the_exponential_is_found_and_covered():
    k = np.array([1, 2, 4, 8, 16, 32])
    truth = 0.7 - 0.6 * np.exp(-k / 6.0)
    exact = fit_hazards(dict(zip(k.tolist(), truth)), n=10**6, draws=20).exponential
    assert (exact.a.value, exact.b.value, exact.c.value) == pytest.approx((0.7, 0.6, 6.0), rel=1e-6)
    assert np.abs(exact.residuals).max() < 1e-9
    rng, inside = np.random.default_rng(3), 0
    for _ in range(40):
        seen = rng.binomial(400, truth) / 400
        fit = fit_hazards(dict(zip(k.tolist(), seen)), n=400, draws=100).exponential
        inside += fit.c.lower <= 6 <= fit.c.upper
    assert inside >= 28  # of 40 at 95 %: fewer with probability 1e-8 if it holds; seed fixed


def test_rollouts_are_resampled_by_prompt():
    # All of the variance is between prompts: the interval is that of 40 prompts, not of 800 rollouts.
    harms = [20] * 12 + [0] * 28
    parts = [make_rollouts(harms, [20] * 40, 5), make_rollouts([20] * 20 + [0] * 20, [20] * 40, 9)]
    fit = fit_hazards(ms.Rollouts.concat(parts))
    assert fit.harm.value.tolist() == [0.3, 0.5]
    assert fit.refusal.value[0] == pytest.approx(0.4)
    # Nested prompts: the share refused of the 20 that harm at 9 is 8/20, with binomial error sqrt(.4 * .6 / 20) = .11.
    half = (fit.refusal.upper[0] - fit.refusal.lower[0]) / 2
    assert 0.17 < half < 0.27


def test_where_harm_falls_or_is_not_seen():
    fit = fit_hazards({0: 0.0, 5: 0.5, 10: 0.4, 20: 0.0}, n=50)
    assert fit.refusal.value.tolist() == [1, 0, 0]
    assert 0.7 < fit.refusal.lower[0] < 1  # no event in 50 is no proof
    assert fit.refusal.upper[2] == 0  # harm that falls that far is no matter of chance
    unknown = fit_hazards({5: 0.0, 10: 0.0}, n=50).refusal[0]
    assert (unknown.value, unknown.lower, unknown.upper) == (0, 0, 1)
    assert any("falls from k = 5 to 10, 10 to 20" in c for c in fit.caveats)
    assert any("no harm was seen at k = 20" in c for c in fit.caveats)
    assert np.isfinite(fit.per_token.value).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: fit_hazards({0: 0.5}, n=10),
        lambda: fit_hazards({0: 0.5, 5: 0.6}),
        lambda: fit_hazards({0: 0.5, 5: 1.6}, n=10),
        lambda: fit_hazards(PUBLISHED["prefill"], noise="weather"),
        lambda: Rates((0, 5), (0.1,)),
        lambda: Rates((5, 0), (0.1, 0.2)),
        lambda: Rates((), ()),
        lambda: Rates((0, 5), (0.1, 0.2), n=0),
    ],
)
def test_fit_refuses(make):
    with pytest.raises(ms.InputError):
        make()


# --- recovery ---

DEPTHS = (0, 1, 2, 3, 4, 6, 8, 10)


def laws(t, j, hard):
    """Refusal, harm and end per token: recovery fades with the time since the prefix; `hard` prompts refuse less."""
    refuse = expit(0.5 - 0.6 * np.minimum(j, 6) - 0.08 * np.minimum(t, 12) - 0.7 * hard)
    return np.stack([refuse, np.full(np.shape(refuse), 0.12), np.full(np.shape(refuse), 0.15)])


def truth(k, hard=0.0):
    h = 0.0
    for j in range(200, -1, -1):
        r, a, b = laws(k + j, j, hard)
        h = (1 - r) * (a + (1 - a) * (1 - b) * h)
    return float(h)


def speak(rng, prompts, n, depths=DEPTHS, spread=0.0, spoken=0):
    """Rollouts of a world with recovery: token 1 begins a refusal, which takes `spoken` further tokens."""
    hard = np.repeat(spread * rng.choice([-1.0, 1.0], prompts), n)
    parts = []
    for k in depths:
        m = prompts * n
        end, outcome, begun = np.zeros(m, int), np.zeros(m, int), np.full(m, -1)
        alive, j = np.arange(m), 0
        while len(alive):
            u = rng.random((3, len(alive)))
            r, a, b = laws(k + j, j, hard[alive])
            what = np.where(u[0] < r, 1, np.where(u[1] < a, 0, np.where(u[2] < b, 2, -1)))
            done = what >= 0
            end[alive[done]], outcome[alive[done]] = k + j, what[done]
            begun[alive[what == 1]] = k + j
            alive, j = alive[~done], j + 1
        last = np.where(begun >= 0, end + spoken, end)
        answers = [np.where(np.arange(e + 1) == b, 1, 7) for e, b in zip(last, begun)]
        parts.append(
            ms.Rollouts.of(
                answers,
                prompt_id=np.repeat(np.arange(prompts), n),
                category=np.repeat(np.array(["x", "y"], dtype=object)[np.arange(prompts) % 2], n),
                prefill=k,
                outcome=outcome,
                hit=last,
            )
        )
    return ms.Rollouts.concat(parts)


@pytest.fixture(scope="module")
def world():
    return speak(np.random.default_rng(7), 100, 20)


def test_held_out_depths_are_predicted_with_time_since_the_prefix(world):
    good, poor = held_out_profile(world), held_out_profile(world, since=False)
    assert [row["k"] for row in good.rows] == list(DEPTHS[1:])
    assert good.passed, str(good)
    assert not poor.passed
    assert np.abs(poor.z).max() > 6
    for row in good.rows:
        assert abs(row["predicted"] - truth(row["k"])) < 4.5 * row["error_predicted"]
        assert row["k"] not in row["fitted"]
        assert 0 in row["fitted"]
    assert [row["outside"] for row in good.rows] == [False] * 6 + [True]
    assert "beyond 2" in str(good)


def test_a_refusal_that_takes_time_is_known_by_its_first_token():
    rolls = speak(np.random.default_rng(8), 80, 20, spoken=5)
    begun = held_out_profile(rolls, onset=[1])
    assert begun.passed, str(begun)
    finished = held_out_profile(rolls, since=False)
    assert np.abs(finished.z).max() > 2 * np.abs(begun.z).max()


def test_hazards_are_those_of_the_world(world):
    model = fit_recovery(world)
    for j in (0, 2, 5):
        found, expected = model.hazards(4 + j, j), laws(4 + j, j, 0.0)
        for name, value in zip(("refusal", "harm", "end"), expected):
            assert found[name] == pytest.approx(value, abs=0.06)
    assert model.hazards([4, 5], [0, 1], "x")["leak"] == pytest.approx(0, abs=1e-3)
    assert "time since" in repr(model)
    assert "position only" in repr(fit_recovery(world, since=False))


def test_one_depth_repeats_its_rate_and_its_error():
    # One hazard per position is saturated: the plug-in identity, for the rate and for the clustered error.
    rolls = speak(np.random.default_rng(9), 60, 15, depths=(2,), spread=1.0)
    model = fit_recovery(rolls, since=False, by_category=False, prior=1e4, pool=1)
    bound = model.harm(2)
    measured = profile(rolls)
    assert bound.value == pytest.approx(measured.value[0], abs=1e-5)
    x = np.bincount(rolls.prompt_id, rolls.outcome == 0) / 15
    expected = x.std(ddof=1) / np.sqrt(60)
    assert bound.info["standard_error"] == pytest.approx(expected, rel=2e-3)
    (row,) = model.against(rolls, [2])
    assert abs(row["difference"]) < 1e-5
    assert row["error"] < 1e-3 * row["error_measured"]  # both err together
    others = rolls.replace(prompt_id=rolls.prompt_id + 1000)
    (apart,) = model.against(others, [2])
    assert apart["error"] == pytest.approx(np.sqrt(2) * expected, rel=6e-3)  # other prompts: they err apart


def test_errors_are_those_of_the_cluster_bootstrap():
    # Depths of both parities, so that nothing is left to the prior, of which a bootstrap knows nothing.
    rolls = speak(np.random.default_rng(10), 40, 10, depths=(0, 1, 2, 4, 5, 7), spread=1.0)
    model = fit_recovery(rolls)
    draws, rng = [], np.random.default_rng(11)
    for _ in range(60):
        weight = np.bincount(rng.integers(0, 40, 40), minlength=40)[rolls.prompt_id].astype(float)
        again = rolls[weight > 0].replace(columns={"weight": weight[weight > 0]})
        draws.append(fit_recovery(again).harm([3, 6]).value)
    # 60 draws know a standard deviation to 9 %; the rest is what is not linear.
    assert model.harm([3, 6]).info["standard_error"] == pytest.approx(np.std(draws, axis=0), rel=0.35)


def test_what_the_prior_settles_is_in_the_error():
    # Even depths alone: odd positions are met an odd number of tokens after a prefix, and k = 3 needs what was not met.
    rolls = speak(np.random.default_rng(14), 60, 10, depths=(0, 2, 4, 8))
    tight, loose = (fit_recovery(rolls, memory=12, prior=s).harm(3).info["standard_error"] for s in (0.5, 2.5))
    assert loose > 1.5 * tight
    odd = speak(np.random.default_rng(14), 60, 10, depths=(0, 2, 3, 4, 8))
    assert fit_recovery(odd, memory=12).harm(3).info["standard_error"] < loose / 1.5


def test_weights_are_copies():
    rolls = speak(np.random.default_rng(12), 20, 6, depths=(0, 2, 4))
    double = ms.Rollouts.concat([rolls, rolls])
    weighted = rolls.replace(columns={"weight": np.full(len(rolls), 2.0)})
    for make in (double, weighted):
        assert fit_recovery(make).harm([0, 3]).value == pytest.approx(fit_recovery(double).harm([0, 3]).value, abs=1e-9)
    assert fit_recovery(weighted).harm(3).info["standard_error"] == pytest.approx(
        fit_recovery(double).harm(3).info["standard_error"], rel=1e-6
    )


def test_answers_that_are_cut_off_are_at_risk_until_then(world):
    longest = 6
    length = np.minimum(world.lengths, world.prefill + longest)
    cut = length < world.lengths
    keep = (np.arange(len(world.tokens)) - np.repeat(world.offsets[:-1], world.lengths)) < np.repeat(
        length, world.lengths
    )
    short = ms.Rollouts(
        world.tokens[keep],
        np.concatenate([[0], np.cumsum(length)]),
        world.prompt_id,
        world.category,
        world.prefill,
        np.where(cut, 3, world.outcome),
        np.where(cut, -1, world.hit),
    )
    row = fit_recovery(short, depths=(0, 2, 4, 6, 8, 10)).against(short, [3])[0]
    assert row["truncated"] > 0
    assert abs(row["z"]) < 4.5
    h = 0.0
    for j in range(longest - 1, -1, -1):
        r, a, b = laws(3 + j, j, 0.0)
        h = (1 - r) * (a + (1 - a) * (1 - b) * h)
    assert abs(row["predicted"] - h) < 4.5 * row["error_predicted"]


def test_few_events_do_not_make_a_prediction_look_wrong():
    rolls = speak(np.random.default_rng(13), 30, 10, depths=(0, 2, 4))
    none = rolls[(rolls.prefill != 3) & ((rolls.prefill != 2) | (rolls.outcome != 0))]
    row = fit_recovery(rolls, depths=(0, 4)).against(none, [2])[0]
    assert row["measured"] == 0
    assert row["error_measured"] > 0
    assert np.isfinite(row["z"])


def test_verdict_counts():
    def rows(z):
        return HeldOut([{"k": i, "predicted": 0.5, "measured": 0.5, "z": x} for i, x in enumerate(z)])

    assert rows([0.0] * 30).allowed == 5
    assert rows([2.1] * 5 + [0.0] * 25).passed
    assert not rows([2.1] * 6 + [0.0] * 24).passed
    assert not rows([4.1] + [0.0] * 29).passed


@pytest.mark.parametrize(
    "options",
    [{"depths": [5]}, {"depths": []}, {"memory": 0}, {"prior": 0.0}],
)
def test_recovery_refuses(world, options):
    with pytest.raises(ms.InputError):
        fit_recovery(world, **options)


def test_recovery_refuses_other_things(world):
    with pytest.raises(ms.InputError, match="tokens"):
        fit_recovery({0: 0.5})
    with pytest.raises(ms.InputError, match="not judged"):
        fit_recovery(world.replace(outcome=np.full(len(world), -1), hit=np.full(len(world), -1)))
    model = fit_recovery(world)
    with pytest.raises(ms.InputError, match="not fitted"):
        model.against(world.replace(category=np.full(len(world), "z", dtype=object)))
    with pytest.raises(ms.InputError, match="No rollout"):
        model.against(world, [99])
    with pytest.raises(ms.InputError):
        model.hazards(1, 0, "z")
    with pytest.raises(ms.InputError):
        held_out_profile(world, folds=1)


# --- the measurement ---


def test_committed_measurement():
    found = json.loads((ROOT / "papers/measurements/profiles.json").read_text(encoding="utf-8"))
    assert {m["model"] for m in found["models"]} >= {"shallow", "deep20", "cyclic", "deep4"}
    full, poor = found["count"]["position, since prefix, begun"], found["count"]["position"]
    z = np.array([r["z"] for m in found["models"] for r in m["held_out"]["position, since prefix, begun"]])
    assert len(z) == full["cells"] == 13 * len(found["models"])
    assert int((abs(z) > 2).sum()) == full["beyond"] <= full["allowed"]
    assert (abs(z) <= 4).all()
    assert not poor["passed"]


def test_bench_measures_and_writes(tmp_path, monkeypatch):
    from markovsafety.bench import profiles

    monkeypatch.setattr(profiles, "MODELS", ("shallow",))
    monkeypatch.setattr(profiles, "DEPTHS", (0, 2, 4, 20))
    done = profiles.run(tmp_path / "p.json", ask=6, n=3)
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    kept = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert "held-out depths" in done["line"]
    assert kept["count"].keys() == done["count"].keys()
    assert text.count("| 20* |") == 1
    with pytest.raises(ms.InputError, match="No model"):
        profiles.run(ask=6, n=1, models=tmp_path)
