"""Width on the attacker's side: N tries, one harmful answer is enough; a power law, and what extrapolation is worth."""

import numpy as np

from markovsafety import depth

alpha, beta = 0.3, 4.0
print(f"harm of a prompt drawn from Beta({alpha}, {beta}): 1 - ASR(N)")
for n in (5, 20, 100, 10_000):
    left = [1 - depth.best_of_n(alpha, beta, n, form) for form in ("exact", "asymptotic", "corrected")]
    print(f"  N = {n:5}: exact {left[0]:.6f}, asymptotic {left[1]:.6f}, corrected {left[2]:.6f}")
mean = alpha / (alpha + beta)
print(f"independent tries with the same mean {mean:.4f} would leave, at N = 100: {(1 - mean) ** 100:.6f}")

rng = np.random.default_rng(0)
events = rng.binomial(20, rng.beta(alpha, beta, 330))
fit = depth.fit_best_of_n(events, np.full(330, 20))
print(f"fitted to 20 tries of each of 330 prompts: alpha {fit.alpha.value:.3f}, beta {fit.beta.value:.2f}")
found, true = fit.asr(1000), depth.best_of_n(alpha, beta, 1000)
print(f"  ASR(1000): {found.value:.4f}, 95 % [{found.lower:.4f}, {found.upper:.4f}]; in truth {true:.4f}")
