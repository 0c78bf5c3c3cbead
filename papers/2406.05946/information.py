"""Young's reading (2603.04851) of shallow alignment: harm information, the optimum's KL, and the recovery penalty."""

import numpy as np

import markovsafety as ms
from markovsafety import depth
from markovsafety.evidence import branch_exact

L, n, rng = 12, 4, np.random.default_rng(9)
layers = []
for _ in range(L):
    end = 0.08 + 0.2 * rng.random()
    P = np.eye(n + 2)
    P[:n, :n] = rng.dirichlet(np.full(n, 0.7), n) * (1 - end)
    P[:n, n:] = rng.dirichlet(np.ones(2), n) * end
    layers.append(P)
base = ms.Chain.layered(layers, {"harm": n, "refusal": n + 1}, start=0)
h = ms.hitting_probability(base, "harm").at_start.value
I = depth.harm_information(base)
print(f"random chain of 12 positions: sum of I_t = {I.sum():.7f} = h (1 - h) = {h * (1 - h):.7f}")
found = branch_exact(base, 4, [5])
print(f"  any-refusal ensemble of 5 branching after 4 tokens: F(5, 4) = {found.surface.value[0, 0]:.6f}")
share = np.cumsum(I)[3] / (h * (1 - h))
print(f"  branch correlation rho_4 = {found.rho.value[0]:.6f} = cumulative share of I = {share:.6f}")

g = depth.harm_gradient(base)
print("  squared gradient by the logits of a depth is at most I_t:", bool((g.norm**2 <= I).all()), end=", ")
decided = np.flatnonzero(abs(g.layers[6]).sum(axis=1) == 0)
print("zero only in states that are decided or never visited:", {base.states[i] for i in decided} == {4, 5})

print("the optimum of P(harm) + KL / lambda: odds of harm, KL in total, KL_t against lambda^2 I_t / 2")
for strength in (0.1, 1.0, 20.0):
    best = depth.optimum(base, strength)
    after = ms.hitting_probability(best, "harm").at_start.value
    kl = depth.kl_profile(base, best)
    odds = (after / (1 - after)) / (h / (1 - h)) * np.exp(strength)
    coin = after * np.log(after / h) + (1 - after) * np.log((1 - after) / (1 - h))
    ratio, like = kl.steps / (strength**2 * I / 2), np.corrcoef(kl.steps, I)[0, 1]
    print(f"  lambda {strength:4}: odds fall by e^-lambda times {odds:.6f}; KL {kl.total:.5f} = {coin:.5f};", end=" ")
    print(f"ratio {ratio.min():.3f} to {ratio.max():.3f}, correlation {like:.4f}")
shift = depth.odds_shift(base, depth.optimum(base, 1.0)).shift
print("  the odds shift of the optimum is flat over depth:", bool(np.ptp(shift) < 1e-9))

length, _ = depth.attack_length(1e-4, 12.0, 0.98, 0.5)
print(f"recovery penalty mu = 12, gamma = .98, p_min = 1e-4: recovery falls to .5 at position {length:.2f}")
eps = depth.recovery_law(1e-4, 12.0, 0.98, 10)
print(f"  guaranteed recovery at position 10: {eps:.4f} per token; over 5 such tokens {(1 - eps) ** 5:.4f} get through")
