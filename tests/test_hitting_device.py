"""The JAX road: one probability, batches of one pattern, sharding, and differentiable functions."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.sparse as sp

import markovsafety as ms
from markovsafety.hitting import device, device_batch
from markovsafety.hitting.core import walk
from markovsafety.hitting.device_pack import bucket, pattern


def rows(rng, n, k, leak, reach):
    """Random stochastic rows on n states, harm n, refusal n + 1: k successors from ``reach(i)``, and small leaks."""
    P = sp.lil_array((n + 2, n + 2))
    for i in range(n):
        to = rng.choice(reach(i), size=min(k, len(reach(i))), replace=False)
        p = rng.dirichlet(np.ones(len(to) + 2) * 2)
        p[-2:] *= leak
        P[i, [*to, n, n + 1]] = p / p.sum()
    return P.tocsr()


def layered_chain(seed=0, n=6, L=4):
    rng = np.random.default_rng(seed)
    layers = [rows(rng, n, 3, 0.3, lambda i: np.arange(n)) for _ in range(L)]
    return ms.Chain.layered(layers, {"harm": n, "refusal": n + 1}, start=0)


def acyclic_chain():
    """Layers of uneven width with the diagonal stored here and there, and one long row."""
    rng, n = np.random.default_rng(1), 40
    P = rows(rng, n, 3, 1.0, lambda i: np.arange(max(i - 9, 0), i)).tolil()
    P[39, :39] = 0.5 / 39
    P[39, 39:] = [0.1, 0.2, 0.2]
    return ms.Chain(P.tocsr(), {"harm": n, "refusal": n + 1}, start=39)


def cyclic_chain(n=30, leak=1e-2, seed=2):
    rng = np.random.default_rng(seed)
    return ms.Chain(rows(rng, n, 4, leak, lambda i: np.arange(n)), {"harm": n, "refusal": n + 1}, start=0)


CHAINS = {
    "layered": layered_chain(),
    "acyclic": acyclic_chain(),
    "cyclic": cyclic_chain(),
    "large": cyclic_chain(220, 1e-5),
}
EVERY = pytest.mark.parametrize("name", CHAINS)


def data_of(chain):
    return np.concatenate([P.data for P in chain.layers])


def with_data(chain, data):
    """The same chain with other numbers."""
    parts, at = [], 0
    for P in chain.layers:
        parts.append(sp.csr_array((data[at : at + P.nnz], P.indices, P.indptr), shape=P.shape))
        at += P.nnz
    made = ms.Chain.layered(parts, chain.outcomes, start=chain.start)
    return made if chain.is_layered else ms.Chain(parts[0], chain.outcomes, start=chain.start)


def samples(chain, B, seed=3):
    rng, out = np.random.default_rng(seed), []
    length = np.concatenate([np.diff(P.indptr) for P in chain.layers])
    row = np.repeat(np.arange(len(length)), length)
    for _ in range(B):
        x = data_of(chain) * (1 + 0.2 * rng.random(len(row)))
        out.append(x / np.bincount(row, x)[row])
    return np.array(out)


@EVERY
def test_equals_the_rational_answer_and_auto(name):
    chain = CHAINS[name]
    h = ms.hitting_probability(chain, "harm", method="device")
    auto = ms.hitting_probability(chain, "harm")
    assert h.info["method"] == "device"
    assert h.info["certified"]
    assert "JAX on cpu" in h.info["why"]
    assert h.value == pytest.approx(auto.value, rel=1e-13)
    assert (h.upper - h.lower).max() < 1e-12
    assert ms.hitting_probability(chain, "harm", method="device", certify=False).value == pytest.approx(
        h.value, rel=1e-13
    )
    if name == "large":  # rationals of 220 states take too long here: both enclosures hold the truth, so they meet
        assert (h.lower <= auto.upper).all()
        assert (auto.lower <= h.upper).all()
        return
    exact = np.vectorize(float)(np.array(ms.hitting_probability(chain, "harm", method="exact").exact, dtype=object))
    assert h.value == pytest.approx(exact, rel=1e-14)
    # float(Fraction) rounds, so the ends may be missed by half a unit in the last place.
    assert (h.lower <= np.nextafter(exact, 2)).all()
    assert (h.upper >= np.nextafter(exact, -1)).all()


def test_exact_zeros_and_ones_and_states_on_no_cycle():
    P = np.zeros((8, 8))
    P[0, [1, 5]], P[1, [2, 0]] = 0.5, 0.5
    P[2, [3, 6]], P[3, [3, 2, 6]] = 0.5, [0.2, 0.3, 0.5]
    P[4, 4], P[5, [1, 4, 7]], P[6, 6], P[7, 7] = 1, [0.25, 0.25, 0.5], 1, 1
    chain = ms.Chain(P, {"harm": 6, "refusal": 7}, start=0)
    h = ms.hitting_probability(chain, "harm", method="device")
    assert h.value[[2, 3, 4]].tolist() == [1, 1, 0]
    assert h.lower[[2, 3, 4]].tolist() == h.upper[[2, 3, 4]].tolist() == [1, 1, 0]
    assert h.value == pytest.approx(ms.hitting_probability(chain, "harm").value, rel=1e-14)
    assert device.batch(chain, "harm").solve(chain.P.data[None]).value[0] == pytest.approx(h.value, rel=1e-14)


def test_an_unproven_class_raises_with_the_partial_answer(monkeypatch):
    monkeypatch.setattr(device, "enclose", lambda *a, **k: None)
    with pytest.raises(ms.UntrustedError, match="30 states") as caught:
        ms.hitting_probability(CHAINS["cyclic"], "harm", method="device")
    assert caught.value.partial.lower.min() == 0
    assert caught.value.partial.value[30] == 1


def test_chains_of_similar_size_share_a_program():
    assert [bucket(n) for n in (1, 8, 9, 33, 40, 41, 257)] == [1, 8, 10, 40, 40, 48, 320]
    before = device._krylov._cache_size()
    for n in (210, 215):
        ms.hitting_probability(cyclic_chain(n, 1e-3), "harm", method="device")
    assert device._krylov._cache_size() - before <= 1


def test_patterns_have_everything_a_row_reads():
    chain = CHAINS["acyclic"]
    p = pattern(walk(chain, "harm"))
    kept = np.concatenate([p.forward.source.ravel(), p.forward.tail_source.ravel()])
    kept = np.sort(kept[kept < p.nnz])
    row = np.repeat(np.arange(42), np.diff(chain.P.indptr))
    off = (row != chain.P.indices) & (row < 40)
    assert kept.tolist() == np.flatnonzero(off).tolist()
    assert p.forward.tail_col.shape[1] > 0  # the long row does not pad the others
    assert p.forward.col.shape[1] < 10


@pytest.mark.parametrize(
    ("name", "where"), [*((x, None) for x in CHAINS), *((x, "cpu") for x in CHAINS if x != "cyclic")]
)
def test_a_batch_is_a_loop(name, where):
    chain = CHAINS[name]
    values = samples(chain, 6)
    many = device.batch(chain, "harm")
    solved = many.solve(values, device=where)
    assert solved.value.shape == (6, *many.pattern.shape)
    assert solved.again.size == 0
    assert (solved.error <= 1e-9).all()
    for b in (0, 5):
        h = ms.hitting_probability(with_data(chain, values[b]), "harm")
        assert np.abs(solved.value[b] - h.value).max() <= solved.error[b] + 1e-15
    if where and name != "layered":
        return  # every further shape is compiled
    first = solved.value[:, 0, :] if chain.is_layered else solved.value
    start = np.flatnonzero(chain.start)[0]
    assert many.solve(values, device=where, at_start=True).value == pytest.approx(first[:, start], rel=1e-13)
    some = many.solve(iter([values[:4], values[4:]]), device=where, states=[1, 3])
    assert some.value == pytest.approx(solved.value[..., [1, 3]], rel=1e-13)


def test_rows_of_a_homogeneous_batch_may_have_any_scale():
    chain = CHAINS["cyclic"]
    values = samples(chain, 3)
    many = device.batch(chain, "harm")
    assert many.solve(values * 37.0).value == pytest.approx(many.solve(values).value, rel=1e-13)
    inner = many.solve(lambda: iter([values.T]), innermost=True)
    assert (inner.value == many.solve(values).value).all()


@pytest.mark.parametrize(("name", "where"), [("cyclic", None), ("large", None), ("large", "cpu")])
def test_a_trapped_sample_is_named_and_solved_for_itself(name, where):
    chain = CHAINS[name]
    values, n = samples(chain, 5), chain.n_states - 2
    values[2, chain.P.indices == n] = 0  # no way to harm is left; refusal keeps its leak
    values[3, np.isin(chain.P.indices, (n, n + 1))] = 0  # no way out at all
    values[:, -2:] = 1
    solved = device.batch(chain, "harm").solve(values, device=where)
    assert 3 in solved.again
    assert set(solved.again) <= {2, 3}
    assert (solved.value[2:4, :n] == 0).all()
    assert solved.error[3] == 0
    assert np.abs(solved.value[4] - ms.hitting_probability(with_data(chain, values[4]), "harm").value).max() < 1e-12


@pytest.mark.parametrize(("name", "where"), [("layered", None), ("layered", "cpu"), ("cyclic", None)])
def test_values_that_are_no_probabilities_are_refused(name, where):
    chain = CHAINS[name]
    for wrong in (-0.1, np.nan, *([0.9] if chain.is_layered else [])):
        values = samples(chain, 3)
        values[1, 0] = wrong
        with pytest.raises(ms.InputError, match="Sample 1: ") as caught:
            device.batch(chain, "harm").solve(values, device=where)
        assert caught.value.next
    with pytest.raises(ms.InputError, match="for a pattern of"):
        device.batch(chain, "harm").solve(values[:, 1:], device=where)


def test_a_sample_without_proof_raises_with_the_others(monkeypatch):
    chain = CHAINS["cyclic"]
    values = samples(chain, 4)
    values[2, np.isin(chain.P.indices, (30, 31))] = 0
    values[:, -2:] = 1
    monkeypatch.setattr(device_batch, "alone", lambda *_: None)
    with pytest.raises(
        ms.UntrustedError, match="1 of 4 samples could not be solved with a certificate, the first is 2"
    ) as caught:
        device.batch(chain, "harm").solve(values)
    assert np.isnan(caught.value.partial.error).tolist() == [False, False, True, False]
    assert np.isfinite(caught.value.partial.value[[0, 1, 3]]).all()


def test_float32_on_a_device_says_how_good_it_is():
    chain = CHAINS["layered"]
    values = samples(chain, 4)
    many = device.batch(chain, "harm")
    good, rough = many.solve(values), many.solve(values, device="cpu", dtype=np.float32, tol=1e-4)
    assert 1e-7 < rough.error.max() < 1e-4
    assert 0 < np.abs(rough.value - good.value).max() < rough.error.max()
    assert many.solve(values, device="cpu", dtype=np.float32).again.tolist() == [0, 1, 2, 3]


SHARDED = """
import json, sys, jax, numpy as np
sys.path.insert(0, "tests")
from test_hitting_device import CHAINS, device, samples
assert len(jax.devices()) == 2
out = []
for name in ("layered", "cyclic"):
    values = samples(CHAINS[name], 5)
    many = device.batch(CHAINS[name], "harm")
    one = many.solve(values, device=jax.devices()[:1])
    two = many.solve(values, device=jax.devices())
    out.append([float(np.abs(one.value - two.value).max()), float(two.error.max()), len(two.again), two.value.shape[0]])
print(json.dumps(out))
"""


def test_two_devices_give_the_answer_of_one():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], cwd=root, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for apart, error, again, B in json.loads(done.stdout):
        assert apart <= 1e-15
        assert error < 1e-9
        assert (again, B) == (0, 5)


@EVERY
def test_gradients_are_sensitivities_and_finite_differences(name):
    chain = CHAINS[name]
    f = device.function(chain, "harm")
    value, slope = f.value_and_gradient()
    assert value == pytest.approx(ms.hitting_probability(chain, "harm").at_start.value, rel=1e-12)
    S = ms.sensitivity(chain, "harm")
    raw = np.concatenate([s.data for s in (S if chain.is_layered else (S,))])
    if not chain.is_layered:  # the diagonal is implied: what moves to j leaves i
        visits = raw[chain.P.indices == chain.n_states - 2]  # every row leads to harm, where h is 1
        visits = np.append(visits, 0)
        h = ms.hitting_probability(chain, "harm").value
        raw = raw - np.repeat(visits * h, np.diff(chain.P.indptr))
    assert slope == pytest.approx(raw, rel=1e-9, abs=1e-11 * np.abs(raw).max())
    way = np.random.default_rng(4).normal(size=len(f.data)) * f.data
    with jax.enable_x64(True):
        assert np.asarray(f(f.data)) == pytest.approx(ms.hitting_probability(chain, "harm").value, rel=1e-12)
        moved, along = jax.jvp(f.at_start, (f.data,), (way,))
        assert float(moved) == pytest.approx(value, rel=1e-14)
        assert float(along) == pytest.approx(slope @ way, rel=1e-9)
        step = 1e-5
        ahead, back = (float(f.at_start(f.data + s * step * way)) for s in (1, -1))
    assert (ahead - back) / (2 * step) == pytest.approx(slope @ way, rel=1e-5)


def test_functions_go_through_jit_vmap_vjp_and_twice():
    chain = CHAINS["layered"]
    f = device.function(chain, "harm")
    rng = np.random.default_rng(5)
    way, weights, two = rng.normal(size=len(f.data)) * f.data, rng.random(f.shape), samples(chain, 2)

    @jax.jit
    def everything(data, two):
        pull = jax.vjp(f, data)[1](weights)[0]
        push = jax.jvp(f, (data,), (way,))[1]
        turn = jax.jvp(jax.grad(f.at_start), (data,), (way,))[1] @ way
        return jax.vmap(f)(two), jax.vmap(jax.grad(f.at_start))(two), pull @ way, (push * weights).sum(), turn

    with jax.enable_x64(True):
        h, slopes, pulled, pushed, turn = map(np.asarray, everything(f.data, two))
    alone = ms.hitting_probability(with_data(chain, two[1]), "harm")
    assert h[1] == pytest.approx(alone.value, rel=1e-12)
    assert slopes[1] == pytest.approx(f.value_and_gradient(two[1])[1], rel=1e-12)
    assert pulled == pytest.approx(pushed, rel=1e-12)
    ahead, back = (f.value_and_gradient(f.data + t * way)[1] @ way for t in (1e-5, -1e-5))
    assert turn == pytest.approx((ahead - back) / 2e-5, rel=1e-5)


def test_a_function_is_nan_where_it_cannot_be_believed_and_keeps_its_precision():
    chain = CHAINS["large"]
    f = device.function(chain, "harm")
    assert not jax.config.jax_enable_x64
    closed = np.where(np.isin(chain.P.indices, (220, 221)), 0, chain.P.data)
    value, slope = f.value_and_gradient(closed)
    assert np.isnan(value)
    assert np.isnan(slope[:-2]).all()
    small = device.function(CHAINS["layered"], "harm")
    rough = small(small.data.astype(np.float32))
    assert rough.dtype == np.float32
    assert np.asarray(rough) == pytest.approx(ms.hitting_probability(CHAINS["layered"], "harm").value, rel=1e-5)
    assert not jax.config.jax_enable_x64
    with pytest.raises(ms.InputError, match="needs a start"):
        device.function(ms.Chain(chain.P, {"harm": 220}), "harm").at_start(chain.P.data)
