"""Bad numbers in the depth room: a clear error, never nan and never a number that looks like an answer."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from markovsafety import depth
from markovsafety.errors import InputError

NAN = math.nan
RATES = (0.05, 0.3, 0.02, 0.1)
CHAIN = depth.Hazards([0.1, 0.1], [0.2, 0.2], 0.5).chain()


@pytest.mark.parametrize(
    "intervals",
    [{"a": (2, -1)}, {"a": (NAN, NAN)}, {"a": (0.1, 0.2)}, {"zz": (0, 1)}, {"leak": (-0.1, 0.5)}],
    ids=str,
)
def test_intervals_of_a_leaky_refusal_contain_their_rates(intervals):
    with pytest.raises(InputError):
        depth.LeakyRefusal(*RATES, intervals=intervals)
    assert depth.LeakyRefusal(*RATES, intervals={"a": (0.04, 0.06)}).harm().upper > 1 / 6


@pytest.mark.parametrize(("p", "rho"), [(NAN, 0.1), (0.1, NAN), (0.1, -0.2), (0.1, 1.2), (1.4, 0.2)])
def test_a_latent_correlation_needs_what_is_possible(p, rho):
    with pytest.raises(InputError):
        depth.latent_correlation(p, rho)


def test_what_is_no_number_is_said_so():
    for make in (
        lambda: depth.Profile("x", 0.1, 0.1, 0.1),  # pyright: ignore[reportArgumentType]
        lambda: depth.Checkpoint("x", 0.1),  # pyright: ignore[reportArgumentType]
        lambda: depth.needed_width("x", 0.1),
        lambda: depth.Hazards([0.1, 0.1], [0.1, 0.1, 0.1]),
        lambda: depth.Hazards([], [], 0.5).profile(),
        lambda: depth.operational_depth([0], [1.7], 0.1),
        lambda: depth.operational_depth([0, 1], [0.1, -0.1], 0.1),
        lambda: depth.deviation(1e6, 100, 64, gamma=0.5),
    ):
        with pytest.raises(InputError):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in (NAN, math.inf, 1.5):
            with pytest.raises(InputError):
                depth.Profile(0.08, 0.02, 0.01, 0.3).harm(k)


def test_a_gradient_says_what_it_is_the_gradient_of_at_any_depth():
    truth = 0.1 + 0.7 * (0.1 + 0.7 * 0.5)
    assert depth.harm_gradient(CHAIN, 0).harm == pytest.approx(truth, rel=1e-14)
    found = depth.harm_gradient(CHAIN, 3, prefill={0: 0.25, 2: 0.75})
    assert found.harm == pytest.approx(0.25 * truth + 0.75 * 0.5, rel=1e-14)
    with pytest.raises(InputError):
        depth.harm_gradient(CHAIN, 3, prefill={0.5: 1.0})  # pyright: ignore[reportArgumentType]
    assert np.isfinite(found.norm).all()


def test_an_attack_is_a_law():
    for call in (
        lambda: depth.Profile(0.1, 0.1, 0.1, 0.1).harm(3, attack=[0.5, 0.5]),
        lambda: depth.Checkpoint(0.1, 0.1).harm(3, attack={0: 1.0}),
        lambda: depth.Hazards([0.1], [0.1]).harm(attack=3),
    ):
        with pytest.raises(InputError, match=r"Pass AttackLaw\.fixed"):
            call()
