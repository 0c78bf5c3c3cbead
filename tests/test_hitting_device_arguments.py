"""Edges of the JAX road: arguments that are refused, patterns without unknowns, numbers near underflow."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest

import markovsafety as ms
from markovsafety.hitting import device

CHAIN = ms.Chain([[0, 0.5, 0.25, 0.25], [0.5, 0, 0.25, 0.25], [0] * 4, [0] * 4], {"harm": 2, "refusal": 3}, start=0)
VALUES = CHAIN.P.data[None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": "x"},
        {"values": {}},
        {"values": [["a"]]},
        {"states": "nobody"},
        {"states": 1.5},
        {"states": [4]},
        {"states": [True]},
        {"device": "abacus"},
        {"device": []},
        {"device": 3},
        {"dtype": "x"},
        {"dtype": np.int64},
        {"dtype": None},
        {"tol": None},
        {"tol": -1.0},
        {"tol": np.nan},
        {"tol": "fine"},
    ],
    ids=str,
)
def test_what_a_batch_cannot_use_is_refused(wrong):
    with pytest.raises(ms.InputError) as caught:
        device.batch(CHAIN, "harm").solve(**{"values": VALUES, **wrong})
    assert caught.value.cause
    assert caught.value.next


def test_states_of_a_batch_keep_their_order():
    many = device.batch(CHAIN, "harm")
    everything = many.solve(VALUES).value[0]
    assert many.solve(VALUES, states=[2, 0, 0]).value[0].tolist() == everything[[2, 0, 0]].tolist()
    assert many.solve(VALUES, states=1).value[0].tolist() == everything[[1]].tolist()
    assert many.solve(VALUES, states=np.array([1, 0, 0, 1], bool)).value[0].tolist() == everything[[0, 3]].tolist()


@pytest.mark.parametrize("data", ["x", 1.0, [0.1], np.zeros((2, 2))], ids=str)
def test_a_function_takes_every_entry(data):
    with pytest.raises(ms.InputError, match="no array of 8 numbers"):
        device.function(CHAIN, "harm").value_and_gradient(data)


@pytest.mark.parametrize("where", [None, "cpu"])
def test_a_batch_may_have_nothing_unknown(where):
    chain = ms.Chain([[0, 1], [0, 0]], {"harm": 0, "refusal": 1}, start=1)
    solved = device.batch(chain, "harm").solve(np.tile(chain.P.data, (3, 1)), device=where)
    assert solved.value.tolist() == [[1.0, 0.0]] * 3
    assert solved.error.tolist() == [0.0] * 3


def test_samples_near_underflow_are_solved_for_themselves():
    # Rates out of the class are subnormal next to those within: products in between lose their digits, h need not.
    values = np.tile(CHAIN.P.data, (2, 1))
    values[1, :6] = [1e-300, 1.3e-322, 7e-323, 1e-300, 2.1e-322, 9e-323]
    solved = device.batch(CHAIN, "harm").solve(values)
    a, b, c, d = (F(float(x)) for x in values[1, [1, 2, 4, 5]])
    p, q = (F(float(values[1, k])) for k in (0, 3))
    # h0 (p + a + b) = p h1 + a;   h1 (q + c + d) = q h0 + c
    h0 = (a * (q + c + d) + p * c) / ((p + a + b) * (q + c + d) - p * q)
    assert solved.again.tolist() == [1]
    assert abs(F(float(solved.value[1, 0])) - h0) <= F(float(solved.error[1])) < F(1, 10**9)


def test_a_batch_does_not_round_what_it_solves_again():
    # Rows on a scale where their sums have no exact quotients; tol = 1e-300 sends every sample to its own solve.
    values = CHAIN.P.data[None] * np.repeat([3.0, 7.0, 1.0, 1.0], np.diff(CHAIN.P.indptr))
    solved = device.batch(CHAIN, "harm").solve(values, tol=1e-300)
    assert solved.again.tolist() == [0]
    assert abs(F(float(solved.value[0, 0])) - F(1, 2)) <= F(float(solved.error[0]))


def test_a_value_is_cut_at_one_in_every_layer():
    # The second layer leads from 1 to harm with 1 + 9e-10, which Chain allows; the first halves what stands there.
    first, second = np.eye(4), np.eye(4)
    first[0] = [0, 0.5, 0, 0.5]
    second[1] = [0, 0, 1 + 9e-10, 0]
    chain = ms.Chain.layered([first, second], {"harm": 2, "refusal": 3}, start=0)
    assert ms.hitting_probability(chain, "harm", method="exact").exact[0][0] == F(1, 2)
    found = ms.hitting_probability(chain, "harm", method="device")
    assert found.lower[0, 0] <= 0.5 <= found.upper[0, 0]
