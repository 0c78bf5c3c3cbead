"""Derivations of the capacity room: every step stands, and the formula is what the numeric code computes."""

from __future__ import annotations

import numpy as np
import pytest

import markovsafety as ms
from markovsafety.depth.capacity import perturbation_bound
from markovsafety.depth.generalisation import deviation
from markovsafety.depth.language_chain import density, n_strings
from markovsafety.depth.symbolic import derivation, derivations

NAMES = ["shifted mass", "strings of a context", "density of a language chain", "loose factor"]
FOUND = {name: derivation(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_derivations_stand(name):
    assert name in derivations()
    assert FOUND[name].check() == []
    assert FOUND[name].steps
    assert "boxed" in FOUND[name].latex()


def test_shifted_mass_is_the_certificate_and_the_change():
    rng = np.random.default_rng(4)
    for _ in range(20):
        P = np.zeros((4, 4))
        P[:2] = rng.dirichlet([1, 1, 1, 4], size=2)
        eps = float(P[:2, 3].min() / 2)
        Q = P.copy()
        Q[:2, 2] += eps
        Q[:2, 3] -= eps
        before, after = (ms.Chain(X, {"harm": 2, "refusal": 3}, 0) for X in (P, Q))
        entries = dict(zip(("q11", "q12", "q21", "q22"), P[:2, :2].ravel().tolist()))
        known = FOUND["shifted mass"].evaluate(eps=eps, **entries)
        h, g = (ms.hitting_probability(c, "harm").at_start.value for c in (before, after))
        assert g - h == pytest.approx(known, abs=1e-14)
        assert perturbation_bound(before, after).plain_start == pytest.approx(known, rel=1e-12)


@pytest.mark.parametrize(("T", "K"), [(2, 3), (3, 3), (4, 2), (2, 6), (50, 11)])
def test_sizes(T, K):
    assert FOUND["strings of a context"].evaluate(T=T, K=K) == pytest.approx(n_strings(T, K), rel=1e-12)
    assert FOUND["density of a language chain"].evaluate(T=T, K=K) == pytest.approx(density(T, K), rel=1e-12)


def test_loose_factor():
    for T, r, tau in ((32_000, 4096, 1.0), (500, 16, 0.3), (2, 2, 2.5)):
        found = FOUND["loose factor"].evaluate(T=T, r=r, tau=tau)
        assert found == pytest.approx(deviation(1e9, T, r, temperature=tau, gamma=2.0).ratio, rel=1e-12)
