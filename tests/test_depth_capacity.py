"""Perturbed rows: the certificate, the exact extremes, samples of rows, ranks, and where rollouts are best spent."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import markovsafety as ms
from markovsafety import toy
from markovsafety.depth.capacity import perturbation_bound, row_concentration, row_distance
from markovsafety.depth.low_rank import capacity_curve, low_rank
from markovsafety.depth.profile import operational_depth
from markovsafety.depth.robust import robust_harm

quick = settings(deadline=None, derandomize=True, max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)
SLACK = 1e-11


def rows_of(rng, n, ends=0.1, sparse=False):
    """n transient rows and absorbing harm and refusal; leaves with `ends` per token on average."""
    P = np.zeros((n + 2, n + 2))
    P[:n, :n] = rng.dirichlet(np.ones(n) * (0.3 if sparse else 1.0), size=n) * (1 - ends)
    P[:n, n:] = rng.dirichlet(np.ones(2), size=n) * ends
    if sparse:
        P[:n, :n][P[:n, :n] < 0.05] = 0.0
        P[:n] /= P[:n].sum(axis=1, keepdims=True)
    return P


def chain_of(P, start=0):
    n = len(P) - 2
    return ms.Chain(P, {"harm": n, "refusal": n + 1}, start)


def pair(seed, share=0.05, sparse=False):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    P, other = rows_of(rng, n, sparse=sparse), rows_of(rng, n, sparse=sparse)
    Q = P.copy()
    Q[:n] = (1 - share) * P[:n] + share * other[:n]
    return chain_of(P), chain_of(Q)


def harm(chain):
    return np.asarray(ms.hitting_probability(chain, "harm").value)


@quick
@given(SEEDS, st.sampled_from([0.01, 0.05, 0.5, 1.0]), st.booleans())
def test_the_identity_and_what_follows_from_it(seed, share, sparse):
    before, after = pair(seed, share, sparse)
    n = before.n_states - 2
    P, Q = before.P.toarray(), after.P.toarray()
    h, g = harm(before), harm(after)
    N, M = (np.linalg.inv(np.eye(n) - X[:n, :n]) for X in (P, Q))
    change = (Q - P)[:n]
    assert M @ change @ h == pytest.approx(g[:n] - h[:n], abs=1e-12)
    assert N @ change @ g == pytest.approx(g[:n] - h[:n], abs=1e-12)
    found = perturbation_bound(before, after)
    tv = np.abs(change).sum(axis=1) / 2
    assert found.distance[:n] == pytest.approx(tv, abs=1e-14)
    assert found.plain[:n] == pytest.approx(N @ tv, rel=1e-10, abs=1e-13)
    assert (np.abs(g - h) <= found.change + SLACK).all()
    assert (found.change <= np.minimum(found.plain, 1) + SLACK).all()
    assert (found.harm.lower <= g + SLACK).all()
    assert (g <= found.harm.upper + SLACK).all()
    assert found.plain.max() <= found.naive / 2 + SLACK  # at most half of what is usually quoted
    assert found.naive == pytest.approx(N.sum(axis=1).max() * 2 * tv.max(), rel=1e-9)
    assert found.start == pytest.approx(found.change[0])
    assert perturbation_bound(before, row_distance(before, after)).plain == pytest.approx(found.plain)


def test_the_certificate_is_sharp():
    """The same mass moved from refusal to harm in every row: the change is the certificate, from every state."""
    P = rows_of(np.random.default_rng(3), 4, ends=0.4)
    P[:4, 4:] = [0.05, 0.35]
    Q = P.copy()
    Q[:4, 4:] += [0.01, -0.01]
    before, after = chain_of(P), chain_of(Q)
    found = perturbation_bound(before, after)
    ratio = (harm(after) - harm(before))[:4] / found.change[:4]
    assert [f"{x:.4f}" for x in ratio] == ["1.0000"] * 4
    assert not found.vacuous


def test_how_loose_the_bounds_are_on_random_chains():
    """100 random chains of six states, rows off by 5 %: the naive bound is over twice as loose as N-TV."""
    naive, ours = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        P, other = rows_of(rng, 6), rows_of(rng, 6)
        Q = P.copy()
        Q[:6] = 0.95 * P[:6] + 0.05 * other[:6]
        before, after = chain_of(P), chain_of(Q)
        found = perturbation_bound(before, after)
        moved = np.abs(harm(after) - harm(before))[:6]
        naive.append(moved.max() / found.naive)
        ours.append((moved / found.plain[:6]).max())
        assert found.change[:6].min() < found.plain[:6].max()
    assert 0.005 < np.median(naive) < 0.03
    assert 0.02 < np.median(ours) < 0.08
    assert np.median(ours) > 2 * np.median(naive)
    assert max(ours) <= 1


def test_vacuous_is_said():
    far = perturbation_bound(toy.shallow(5), 0.5)
    assert far.vacuous
    assert "vacuous: rows that are off by up to 0.5 per token" in far.reason
    assert far.harm.at_start.lower == 0
    assert far.harm.at_start.upper == 1
    near = perturbation_bound(toy.shallow(5), 1e-3)
    assert not near.vacuous
    assert "width 0.00857" in str(near)
    one_side = perturbation_bound(toy.deep(20), 0.02)
    assert "from above only" in one_side.reason
    assert one_side.harm.at_start.lower == 0
    flat = perturbation_bound(toy.shallow(5), 0.0)
    assert flat.change.max() == flat.naive == 0
    unplaced = ms.Chain(toy.shallow(2).P, toy.shallow(2).outcomes)
    assert perturbation_bound(unplaced, 0.01).start is None
    assert "at every state" in str(perturbation_bound(unplaced, 1.0))


def test_a_refusal_that_begins_to_leak_counts_for_all_that_refuses():
    """No leak before, a leak without an end after: everything that refuses may be harmed, and is."""
    before = toy.leak(0.0, end=0.0)
    after = toy.leak(1e-6, end=0.0)
    found = perturbation_bound(before, after)
    h = harm(before)
    assert harm(after)[0] == 1.0
    assert found.change[0] >= 1 - h[0] - SLACK
    assert found.change[1] == 1
    assert np.isfinite(found.plain).all()
    kept = perturbation_bound(before, np.array([1e-6, 0, 0, 0]))
    assert kept.start == pytest.approx(1e-6 / 0.35)


@quick
@given(SEEDS)
def test_layers(seed):
    rng = np.random.default_rng(seed)
    layers = [rows_of(rng, 3) for _ in range(6)]
    others = []
    for P in layers:
        Q = P.copy()
        Q[:3] = 0.9 * P[:3] + 0.1 * rows_of(rng, 3)[:3]
        others.append(Q)
    outcomes = {"harm": 3, "refusal": 4}
    before, after = (ms.Chain.layered(x, outcomes, 0) for x in (layers, others))
    for target in ("harm", "truncated"):
        found = perturbation_bound(before, after, target)
        h, g = (np.asarray(ms.hitting_probability(c, target).value) for c in (before, after))
        assert (np.abs(g - h) <= found.change + SLACK).all()
        law, total = np.eye(5)[0], 0.0
        for t, P in enumerate(layers):
            total += float(law[:3] @ found.distance[t, :3])
            law = np.concatenate([law[:3] @ P[:3, :3], [0, 0]])
        assert found.plain_start == pytest.approx(total, rel=1e-9)
        radii = found.distance
        bound = robust_harm(before, radii, target)
        assert (bound.lower <= g + SLACK).all()
        assert (g <= bound.upper + SLACK).all()
        wide = perturbation_bound(before, radii, target).harm
        assert (wide.lower <= bound.lower + SLACK).all()
        assert (bound.upper <= wide.upper + SLACK).all()


# --- exact extremes ---


@quick
@given(SEEDS, st.sampled_from([0.0, 0.01, 0.1, 0.4, 1.0]), st.sampled_from(["any", "row"]))
def test_robust_harm_encloses_and_is_narrower_than_the_certificate(seed, radius, support):
    rng = np.random.default_rng(seed)
    before, _ = pair(seed, sparse=True)
    n = before.n_states - 2
    P = before.P.toarray()
    found = robust_harm(before, radius, support=support)
    h = harm(before)
    wide = perturbation_bound(before, radius).harm
    assert (wide.lower <= found.lower + SLACK).all()
    assert (found.upper <= wide.upper + SLACK).all()
    for _ in range(5):  # chains within the distances, by mixing and by shifting mass to harm or away from it
        Q = P.copy()
        allowed = np.ones_like(P) if support == "any" else (P > 0).astype(float)
        aim = rng.dirichlet(np.full(n + 2, 0.2), size=n) * allowed[:n]
        good = aim.sum(axis=1) > 0
        aim[good] /= aim[good].sum(axis=1, keepdims=True)
        Q[:n][good] = (1 - radius) * P[:n][good] + radius * aim[good]
        g = harm(chain_of(Q))
        assert (found.lower <= g + SLACK).all()
        assert (g <= found.upper + SLACK).all()
    if radius == 0:
        assert found.lower == pytest.approx(h, abs=1e-12)
        assert found.upper == pytest.approx(h, abs=1e-12)
    if radius == 1 and support == "any":
        assert found.upper[:n] == pytest.approx(np.ones(n))
        assert found.lower[:n] == pytest.approx(np.zeros(n))


@quick
@given(SEEDS, st.floats(0.001, 0.5), st.sampled_from(["any", "row"]), st.booleans())
def test_the_extremes_solve_the_bellman_equation(seed, radius, support, most):
    """Each row's best shift by a linear program: the value of every state is that of its best row."""
    before, _ = pair(seed, sparse=True)
    n = before.n_states - 2
    P, found = before.P.toarray(), robust_harm(before, radius, support=support)
    x = np.asarray(found.upper if most else found.lower)
    m = n + 2
    for i in range(n):
        # variables: the row p and the parts u >= p - P_i, v >= P_i - p; sum(u) = sum(v) <= radius
        cost = np.concatenate([-x if most else x, np.zeros(2 * m)])
        A = np.block([[np.eye(m), -np.eye(m), np.zeros((m, m))], [-np.eye(m), np.zeros((m, m)), -np.eye(m)]])
        A = np.vstack([A, np.concatenate([np.zeros(m), np.ones(m), np.zeros(m)])])
        b = np.concatenate([P[i], -P[i], [radius]])
        equal = np.concatenate([np.ones(m), np.zeros(2 * m)])[None]
        upper = [1.0 if support == "any" or P[i, j] > 0 else 0.0 for j in range(m)]
        bounds = [(0, u) for u in upper] + [(0, None)] * (2 * m)
        best = linprog(cost, A_ub=A, b_ub=b, A_eq=equal, b_eq=[1.0], bounds=bounds)
        assert best.status == 0
        assert (-best.fun if most else best.fun) == pytest.approx(x[i], abs=1e-8)


def test_harm_that_can_be_avoided_for_ever_is_none():
    """One state that ends with .02 per token, .01 of it harm: a shift of .01 keeps it from harm, though the walk stays
    and the equation h = h has every solution."""
    chain = ms.Chain([[0.98, 0.01, 0.01], [0, 0, 0], [0, 0, 0]], {"harm": 1, "refusal": 2}, 0)
    assert robust_harm(chain, 0.01).at_start.lower == 0
    assert robust_harm(chain, 0.01).at_start.upper == 1  # .02 harm and no refusal left
    part = robust_harm(chain, 0.005).at_start
    assert part.lower == pytest.approx(0.005 / 0.02)
    assert part.upper == pytest.approx(0.015 / 0.02)
    lonely = ms.Chain([[0.99, 0.01], [0, 0]], {"harm": 1}, 0)
    assert robust_harm(lonely, 0.005, support="row").lower[0] == 1  # whatever the row is, it comes
    assert robust_harm(lonely, 0.02, support="row").lower[0] == 0  # now it may stay for ever


def test_robust_harm_of_sampled_rows_holds():
    """Rows from 400 samples each, distances by Weissman's inequality at 5 %: the truth is inside."""
    rng = np.random.default_rng(0)
    truth = chain_of(rows_of(rng, 5, ends=0.3))
    P, h = truth.P.toarray(), harm(truth)
    radius = row_concentration(400, 7, rows=5)
    for _ in range(40):
        Q = P.copy()
        Q[:5] = rng.multinomial(400, P[:5]) / 400
        found = robust_harm(chain_of(Q), radius, level=0.95)
        assert found.level == 0.95
        # each of 40 may fail with 5e-2 by the inequality; in truth it is so conservative that none ever does
        assert (found.lower <= h + SLACK).all()
        assert (h <= found.upper + SLACK).all()


def test_concentration_of_rows():
    assert f"{2 * row_concentration(200, 8):.3f}" == "0.292"
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(8))
    far = np.abs(rng.multinomial(200, p, size=20_000) / 200 - p).sum(axis=1) / 2
    assert (far > row_concentration(200, 8)).mean() < 0.01  # promised .05; five sigma above 5e-3 is below .01
    assert np.quantile(far, 0.95) < 0.85 * row_concentration(200, 8)
    exact = [math.sqrt(math.log(3 * (2**k - 2) / 0.1) / 200) for k in (2, 5, 40)]
    assert [row_concentration(100, k, 3, 0.1) for k in (2, 5, 40)] == pytest.approx(exact, rel=1e-14)
    assert row_concentration(10_000, 5000) < 1 == row_concentration(100, 50_000)  # no overflow
    assert row_concentration([100, 400], 1).tolist() == [0, 0]
    wide = row_concentration(np.array([100.0, 400.0]), 6)
    assert wide[0] == pytest.approx(2 * wide[1])


# --- rank ---


def full_chain(seed=0, n=20):
    """Rows without zeros, as a softmax has them."""
    P = rows_of(np.random.default_rng(seed), n, ends=0.08)
    P[:n] = 0.98 * P[:n] + 0.02 / (n + 2)
    return chain_of(P)


def test_a_curve_over_ranks():
    """20 states: the certificate informs at high rank only, while harm itself hardly moves at any."""
    chain = full_chain()
    curve = capacity_curve(chain, [1, 4, 8, 12, 16, 20])
    assert (np.diff(curve.kl) <= 1e-12).all()
    assert (curve.change <= curve.certificate + SLACK).all()
    assert (curve.worst >= curve.change - SLACK).all()
    assert curve.certificate[0] > 2
    assert curve.certificate[3] < 1
    assert curve.change.max() < 0.06
    assert curve.distance[-1] < 1e-3  # 20 rows have rank 20 at most
    assert curve.distance[0] > 4 * curve.distance[3]
    assert curve.needed()[0] is None
    assert "no depth was measured" in curve.needed()[1]
    assert curve.depths == ()


def test_fitted_rows_are_softmax_rows_of_the_rank():
    chain = full_chain(1, 8)
    found = low_rank(chain, 3)
    U, V, c = found.factors
    P = found.chain.P.toarray()[:8]
    logits = np.log(P)
    assert np.linalg.matrix_rank(logits - logits.mean(axis=1, keepdims=True) - (c - c.mean()), tol=1e-8) <= 3
    assert P.sum(axis=1) == pytest.approx(np.ones(8))
    truth = chain.P.toarray()[:8]
    assert found.kl == pytest.approx((truth * np.log(truth / P)).sum(axis=1).mean(), rel=1e-6)
    mean = low_rank(chain, 0)
    assert mean.chain.P.toarray()[:8] == pytest.approx(np.tile(truth.mean(axis=0), (8, 1)))
    visited = low_rank(chain, 0, weights="visits")
    N = np.linalg.inv(np.eye(8) - truth[:, :8])[0]
    assert visited.chain.P.toarray()[3] == pytest.approx(N @ truth / N.sum())
    # the optimum is stationary: no direction of the factors lowers the divergence
    rng = np.random.default_rng(0)
    for _ in range(5):
        for sign in (1e-4, -1e-4):
            moved = [x + sign * rng.standard_normal(x.shape) for x in (U, V, c)]
            W = np.exp(moved[0] @ moved[1].T + moved[2])
            W /= W.sum(axis=1, keepdims=True)
            assert (truth * np.log(truth / W)).sum(axis=1).mean() >= found.kl - 1e-9


def test_deeper_alignment_needs_a_little_more_rank():
    """Aligned to depth 3, rank 2 has the profile to .02. To depth 20, rank 2 blurs deep positions and 4 does not."""
    curve = capacity_curve(toy.shallow(3), [1, 2], eps=0.5, rounds=1500)
    assert curve.needed(tolerance=0.02) == (2, "")
    assert np.abs(curve.harm[0] - curve.exact).max() > 0.02
    assert curve.reached[-1] == operational_depth(curve.depths, curve.exact, 0.5, side="value")
    deep = capacity_curve(toy.shallow(20), [2, 4], eps=0.2, rounds=3000)
    assert deep.needed(tolerance=0.02) == (4, "")
    error = np.abs(deep.harm - deep.exact)
    assert (error <= deep.forced + SLACK).all()
    # the certificate from the start is small and true, and blind to what a forced prefix meets
    assert deep.certificate[0] < 0.1 < 0.3 < error[0].max()


def test_no_rank_may_be_enough():
    assert capacity_curve(toy.shallow(3), [1], eps=1e-3).needed()[1].startswith("impossible: the chain itself")
    none = capacity_curve(toy.shallow(10), [1, 2], eps=0.2, rounds=100).needed(5, tolerance=1e-9)
    assert none[0] is None
    assert "with a profile right to 1e-09" in none[1]


def test_sampling_adds_to_the_rank():
    """Rank and samples together: the certificate of the sum of both distances holds."""
    chain = full_chain(2, 6)
    fit = low_rank(chain, 5)
    rng = np.random.default_rng(0)
    P = fit.chain.P.toarray()
    P[:6] = rng.multinomial(20_000, P[:6]) / 20_000
    sampled = chain_of(P)
    total = row_distance(chain, fit.chain) + np.where(chain.outcome_mask, 0, row_concentration(20_000, 8, 6, 1e-8))
    found = perturbation_bound(chain, total)
    assert abs(harm(sampled)[0] - harm(chain)[0]) <= found.start  # fails with 1e-8
    assert not found.vacuous


# --- where rollouts are best spent ---


def test_stratified_levels_reach_what_naive_sampling_cannot():
    """30 levels of .54, 1000 transitions each: 16.1 % relative error by the product formula, 4.0e9 rollouts otherwise.

    20000 simulations: the error of a simulated standard deviation is about 1 % (heavy tails included), so 6 % is 6.
    """
    p, L, n = 0.54, 30, 1000
    h = p**L
    formula = math.sqrt(math.expm1(L * math.log1p((1 - p) / (p * n))))
    assert f"{h:.2e}" == "9.37e-09"
    assert f"{100 * formula:.1f}" == "16.1"
    found = np.prod(np.random.default_rng(2).binomial(n, p, (20_000, L)) / n, axis=1)
    assert found.std() / h == pytest.approx(formula, rel=0.06)
    assert f"{(1 - h) / h / 0.164**2:.1e}" == "4.0e+09"
    from markovsafety import evidence

    P = np.zeros((L + 2, L + 2))
    for i in range(L):
        P[i, i + 1], P[i, L + 1] = p, 1 - p
    plan = evidence.allocate(ms.Chain(P, {"harm": L, "refusal": L + 1}, 0), L * n, starts="states")
    half = (plan.expected.upper - plan.expected.lower) / 2
    assert half / 1.96 / h == pytest.approx(math.sqrt(L * (1 - p) / p / n), rel=0.05)  # its first order: 16.0 %


def test_allocation_by_visits_is_near_the_best_and_uniform_is_not():
    """Variances per transition: optimal (sum N sigma)^2 <= by visits = length h (1 - h); uniform is worse than both.

    Rare harm on six states; by simulation the optimal plan leaves what its formula says.
    """
    rng = np.random.default_rng(1)
    n = 6
    P = rows_of(rng, n, ends=0.15)
    P[:n, n] *= 1e-2
    P[:n, n + 1] = 1 - P[:n, : n + 1].sum(axis=1)
    chain = chain_of(P)
    h, N = harm(chain), np.linalg.inv(np.eye(n) - P[:n, :n])[0]
    sigma = np.sqrt(P[:n] @ h**2 - (P[:n] @ h) ** 2)
    best, visits, uniform = (N @ sigma) ** 2, N.sum() * (N @ sigma**2), n * (N**2 @ sigma**2)
    assert visits == pytest.approx(N.sum() * h[0] * (1 - h[0]), rel=1e-10)
    assert best < visits < uniform
    assert best < uniform
    budget, repeats = 60_000, 4000
    shares = np.rint(budget * N * sigma / (N @ sigma)).astype(int)
    rows = np.stack([rng.multinomial(shares[s], P[s], size=repeats) / shares[s] for s in range(n)], axis=1)
    est = np.linalg.solve(np.eye(n) - rows[:, :, :n], rows[:, :, n, None])[:, 0, 0]
    # the variance of 4000 nearly normal estimates is known to 2.2 %: 15 % is six of these and the second order
    assert est.var() == pytest.approx(best / budget, rel=0.15)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: perturbation_bound(toy.shallow(2), toy.shallow(3)), "5 and 6 states"),
        (lambda: perturbation_bound(toy.shallow(2), 1.5), "the distance is 1.5"),
        (lambda: perturbation_bound(toy.shallow(2), [0.1, 0.1]), "the distance is"),
        (lambda: perturbation_bound(toy.shallow(2), "x"), "the distance is"),
        (
            lambda: perturbation_bound(
                ms.Chain([[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0]], {"harm": 1}),
                ms.Chain([[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0]], {"harm": 2}),
            ),
            "row|sums|target",
        ),
        (lambda: robust_harm(toy.shallow(2), -0.1), "the radius is -0.1"),
        (lambda: robust_harm(toy.shallow(2), 0.1, support="none"), "support is 'none'"),
        (lambda: row_concentration(0, 3), "n=0"),
        (lambda: row_concentration(10, 3, delta=1.0), "delta=1.0"),
        (lambda: low_rank(ms.Chain.layered([toy.shallow(1).P], toy.shallow(1).outcomes), 1), "homogeneous chain"),
        (lambda: low_rank(toy.shallow(2), -1), "rank is -1"),
        (lambda: low_rank(toy.shallow(2), 1, weights="some"), "weights are 'some'"),
        (lambda: low_rank(toy.shallow(2), 1, weights=np.zeros(5)), "weights are"),
        (lambda: capacity_curve(toy.shallow(2), []), "no ranks"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ms.InputError, match=says):
        call()
