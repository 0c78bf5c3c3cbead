"""P(harm) = (I - Q)^-1 Q_harm 1: golden chains in rationals, and a chain on which the formula is singular."""

from fractions import Fraction as F

import numpy as np

import markovsafety as ms
from markovsafety import toy


def exact(counts, outcomes):
    chain = ms.Chain.from_counts(counts, outcomes, start=0)
    return [str(x) for x in ms.hitting_probability(chain, "harm", method="exact").exact]


two = [[20, 50, 10, 20], [10, 30, 40, 20], [0] * 4, [0] * 4]  # S, M, harm, refusal
print("two states: h =", ", ".join(exact(two, {"harm": 2, "refusal": 3})[:2]))
chain = ms.Chain.from_counts(two, {"harm": 2, "refusal": 3}, start=0)
N = np.array([ms.visits(chain, s).value[:2] for s in (0, 1)])
print("two states: 51 N =", (51 * N).round(9).astype(int).tolist())
print("two states: length =", F(ms.hitting_time(chain).at_start.value).limit_denominator(100), "tokens")

ladder = np.diag([0] + [3] * 5, 1) + np.diag([7] * 5 + [0], -1)
print("ladder at levels 1, 3, 5: h =", ", ".join(exact(ladder, {"harm": 6, "refusal": 0})[1:6:2]))
f1, f0, c1 = F(1, 31), F(8, 10), F(69, 100)
print(f"first 5 positions aligned: h = {f1 + c1**5 * (f0 - f1)} = {toy.prefilled_harm(5):.10f}")
print(f"leaky refusal: h = {ms.hitting_probability(toy.leak(), 'harm').at_start.value:.12f}")

# Two states that refuse for ever are a closed class inside "all states that are not harm".
loop = np.array([[2, 3, 4, 1, 0], [5, 2, 0, 2, 1], [0, 0, 3, 7, 0], [0, 0, 6, 4, 0], [0] * 5])
print("closed class: rank of I - Q =", np.linalg.matrix_rank(np.eye(4) - loop[:4, :4] / 10), "of 4")
print("closed class: h =", ", ".join(exact(loop, {"harm": 4})[:4]))

# Occupancy at step n is not P(hit by step n) where harm can be left again.
P = np.array([[0.6, 0.3, 0.1], [0.5, 0.5, 0], [0, 0, 1]])
hit = ms.hitting_distribution(ms.Chain(P, {"harm": 1, "refusal": 2}, start=0), "harm", horizon=10)
inside = np.linalg.matrix_power(P, 10)[0, 1]
print(f"harm that is left again: in it at step 10 {inside:.6f}, hit by step 10 {hit.cumulative.value[10]:.6f}")
