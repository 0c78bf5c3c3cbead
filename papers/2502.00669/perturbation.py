"""How far harm can move when rows move: the usual norm bound, the N-TV certificate, and when both say nothing."""

import numpy as np

import markovsafety as ms
from markovsafety import depth

n, rng = 6, np.random.default_rng(11)
OUT = {"harm": n, "refusal": n + 1}


def random_rows():
    P = np.zeros((n + 2, n + 2))
    P[:n, :n] = 0.9 * rng.dirichlet(np.ones(n), n)
    P[:n, n:] = 0.1 * rng.dirichlet(np.ones(2), n)
    return P


def h(chain):
    return np.array(ms.hitting_probability(chain, "harm", certify=False).value[:n])


naive, ours = [], []
for _ in range(300):
    P = random_rows()
    before, after = ms.Chain(P, OUT, start=0), ms.Chain(0.95 * P + 0.05 * random_rows(), OUT, start=0)
    change, found = abs(h(after) - h(before)), depth.perturbation_bound(before, after)
    naive.append(change.max() / found.naive)
    ours.append(np.max(change / found.plain[:n]))
    assert (change <= found.change[:n] + 1e-12).all()
print("300 random chains of 6 states, 5 % of every row replaced: |change of h| over the bound")
print(f"  norm bound ||N|| ||dP||: median {np.median(naive):.3f}, largest {max(naive):.3f}")
print(f"  sum of N TV: median {np.median(ours):.3f}, largest {max(ours):.3f}")

P = random_rows()
P[:n, n], P[:n, n + 1] = 0.02, 0.08
Q = P.copy()
Q[:n, n], Q[:n, n + 1] = 0.03, 0.07
before, after = ms.Chain(P, OUT, start=0), ms.Chain(Q, OUT, start=0)
found = depth.perturbation_bound(before, after)
ratio = (h(after) - h(before))[0] / found.plain[0]
print(f"mass moved from refusal to harm in every row: change / sum of N TV = {ratio:.4f}")

print("rows known up to TV only; the expected length is", f"{ms.hitting_time(before).at_start.value:.1f} tokens")
for tv in (0.001, 0.01, 0.1):
    found = depth.perturbation_bound(before, tv)
    print(f"  TV {tv}: |change of h| <= {found.plain_start:.3f}, vacuous: {found.vacuous}")
worst = depth.robust_harm(before, 0.01).at_start
print(f"exact range of h if every row is off by TV .01: [{worst.lower:.4f}, {worst.upper:.4f}] about {worst.value:.4f}")
print(f"200 samples of a row with 8 entries: within L1 {2 * depth.row_concentration(200, 8):.3f} with probability .95")
