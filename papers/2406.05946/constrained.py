"""The token-wise constrained objective (2 / beta) S(beta Delta): limits, gradient weight, and the code's floor."""

import sympy as sp

beta, delta = sp.symbols("beta", positive=True), sp.Symbol("Delta", real=True)
x = sp.Symbol("x", positive=True)


def loss(d):
    """Delta = ln pi_aligned - ln pi, S the softplus."""
    return 2 / beta * sp.log(1 + sp.exp(beta * d))


weight = sp.simplify(sp.diff(loss(delta), delta))
sigmoid = 1 / (1 + sp.exp(-beta * delta))
print("gradient weight is 2 sigma(beta Delta):", sp.simplify(weight - 2 * sigmoid) == 0)
print("weight at the start (Delta = 0):", weight.subs(delta, 0))
print("beta -> 0: loss - 2 ln 2 / beta ->", sp.limit(loss(delta) - 2 * sp.log(2) / beta, beta, 0), "(cross-entropy)")
up = sp.limit(2 / beta * (beta * x + sp.log(1 + sp.exp(-beta * x))), beta, sp.oo)
print("beta -> infinity: Delta = x > 0 ->", up, "; Delta = -x < 0 ->", sp.limit(loss(-x), beta, sp.oo))

# One token with probability 0.001 under the aligned model: gradient steps of size .05 on its logit.
start = sp.log(sp.Rational(1, 999)).evalf()


def trained(b, floor, steps=20_000):
    from math import exp, log

    z, p0 = float(start), 1e-3
    for _ in range(steps):
        p = 1 / (1 + exp(-z))
        z += 0.05 * max(2 / (1 + (p / p0) ** b), floor) * (1 - p)
    assert abs(log(p / (1 - p)) - z) < 1
    return p


for b in (0.1, 0.5, 2.0):
    print(f"beta {b}: p after 20000 steps {trained(b, 0):.4f}; with the code's floor 1e-3 {trained(b, 1e-3):.4f}")
share = 16 * 60 / (16 * 60 + 64 * 200)
print(f"16 refusals of 60 tokens and 64 anchors of 200: share of the loss {share:.3f}, not 16 / 80 = {16 / 80}")
