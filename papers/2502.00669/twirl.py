"""Does cyclic augmentation tighten the bounds? The twirl of a chain: direction, bias, variance, and the budget."""

import numpy as np

import markovsafety as ms
from markovsafety import depth

coin = depth.twirl_direction(2000, seed=7)
print(
    f"2000 random chains: averaged chain worse than the average in {coin.info['above']}, better in {coin.info['below']}"
)
print(f"  share worse {coin.value:.4f}, 95 % [{coin.lower:.4f}, {coin.upper:.4f}]")

n, rng = 5, np.random.default_rng(1)
rows = rng.dirichlet(np.full(n + 2, 0.4), size=n)
P = np.zeros((n + 2, n + 2))
P[:n] = rows
chain = ms.Chain(P, {"harm": n, "refusal": n + 1}, start=0)
both = depth.twirl(chain)
a, r = rows[:, n].mean(), rows[:, n + 1].mean()
print(f"one of them: h of the averaged chain {both.harm.value[0]:.6f} = a / (a + r) = {a / (a + r):.6f}")
turned = []
for g in range(n):
    to = np.r_[(np.arange(n) + g) % n, n, n + 1]
    Q = np.zeros_like(P)
    Q[np.ix_(to, to)] = P
    turned.append(ms.hitting_probability(ms.Chain(Q, dict(chain.outcomes)), "harm").value[:n])
h = np.array(ms.hitting_probability(chain, "harm").value[:n])
print("  every rotated copy has the same h by other names:", all(np.allclose(np.sort(t), np.sort(h)) for t in turned))
print(f"  mean over the copies {np.mean(turned):.6f} = mean over the orbit {both.mean_harm[0]:.6f}")


def cyclic(stay, slope=0.0):
    """Eight positions, rotated copies of one row if slope is 0; harm .04, refusal .06 per token on average."""
    P = np.zeros((10, 10))
    wave = slope * np.cos(2 * np.pi * np.arange(8) / 8)
    for s in range(8):
        P[s, s], P[s, (s + 1) % 8] = 0.9 * stay, 0.9 * (1 - stay)
        P[s, 8], P[s, 9] = 0.04 * (1 + wave[s]), 0.06 - 0.04 * wave[s]
    return ms.Chain(P, {"harm": 8, "refusal": 9}, start=0)


print("eight symmetric positions: what pooling the rows leaves of the squared error of rows, and of the variance of h")
for stay in (0, 0.5, 0.9, 0.99):
    seen = depth.twirl_experiment(cyclic(stay), per_row=2000, repeats=2000)
    print(f"  self-loop {stay:<4}: rows {seen.row_ratio:.3f} (1/n = {seen.row_expected}), h", end=" ")
    print(f"{seen.variance_ratio:.3f} (participation ratio {seen.variance_expected:.3f})")
seen = depth.twirl_experiment(cyclic(0, 0.8), per_row=5000, repeats=2000)
print(f"not symmetric: bias {seen.bias:+.5f}, squared error of h is {seen.error_ratio:.1f} times that without pooling")

print("refusal probability .96 at one position, spread over n = 10: what gets through")
for k in (0, 1, 5):
    b = depth.hazard_budget(0.96, 10, k)
    print(f"  {k} forced: one position {b.concentrated:.3f}, same sum {b.fixed_sum:.3f}", end=", ")
    print(f"same product {b.fixed_product:.3f}, ten times the data {b.extra_data:.1e}")
