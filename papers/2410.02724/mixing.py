"""How fast a finite context forgets: the published rate, Dobrushin's, the truth, and the temperature."""

import numpy as np

from markovsafety.depth.language_chain import language_chain, mixing, parity_model

print("parity toy, logits +-1.5: eps, second eigenvalue, tokens to total variation .01: truth, Dobrushin, published")
for tau in (1.0, 2.0):
    found = mixing(parity_model(tau))
    pi = found.stationary[found.stationary > 1e-12]
    bounds = [found.tokens_by(rate) for rate in ("ours", "published")]
    print(f"  temperature {tau}: {found.epsilon:.3e}, {found.second:.6f}; {found.tokens()},", end=" ")
    print(f"{bounds[0]:.0f}, {bounds[1]:.3g}; stationary law uniform: {bool(np.ptp(pi) < 1e-12)} on {len(pi)} strings")
    bases = 1 - 2 * found.epsilon, 1 - found.strings * found.epsilon, found.dobrushin
    print("    base per three tokens: published, 1 - |R| eps, Dobrushin:", ", ".join(f"{b:.4f}" for b in bases))
cold = mixing(parity_model(0.2))
print(f"  temperature 0.2: eps {cold.epsilon:.1e}, more than a million tokens: {cold.tokens(most=10**6) is None}")

rng, wrong, worse, checked = np.random.default_rng(5), 0, 0, 0
for _ in range(200):
    spread = rng.choice([0.3, 1.0, 5.0])
    chain = language_chain(lambda s, spread=spread: rng.dirichlet(np.full(2, spread)), 2, 3)
    found = mixing(chain)
    power = np.linalg.matrix_power(chain.P.toarray(), 3)
    for n in range(3, 42):
        gap = abs(power - found.stationary)
        wrong += gap.max() > found.published(n) + 1e-12
        worse += gap.sum(axis=1).max() / 2 > found.ours(n) + 1e-12
        checked += 1
        power = power @ chain.P.toarray()
print(f"200 random chains, {checked} horizons: published bound violated {wrong} times, Dobrushin's {worse} times")
for T, K in ((2, 3), (10, 4), (32_000, 4)):
    need = K * (np.log(100) / (2 * float(T) ** -K) + 1)
    print(f"  T = {T}, K = {K}: eps <= T^-K, so the published bound needs at least {need:.1e} tokens for .01")
