"""What an estimated chain knows: the start state repeats the raw fraction, wrong states show elsewhere, priors bias."""

import numpy as np

import markovsafety as ms

rng = np.random.default_rng(2)
RISKY = np.array([[0.3, 0.5, 0.15, 0.05], [0.3, 0.4, 0.25, 0.05]])  # from start and mid to start, mid, harm, refusal
SAFE = np.array([[0.1, 0.1, 0.01, 0.79], [0.2, 0.1, 0.02, 0.68]])
RARE = np.array([[0.5, 0.4, 0.001, 0.099], [0.3, 0.5, 0.002, 0.198]])


def answers(P, n, prompt):
    rows = []
    for _ in range(n):
        s, said = 0, []
        while s < 2:
            s = int(rng.choice(4, p=P[s]))
            said.append(s)
        rows.append((said, ms.OUTCOMES.index("harm" if s == 2 else "refusal"), prompt))
    return rows


def rollouts(rows):
    said, outcome, prompt = zip(*rows)
    hit = [len(s) - 1 for s in said]
    return ms.Rollouts.of(said, prompt_id=prompt, outcome=list(outcome), hit=hit)


rolls = rollouts([row for i in range(40) for row in answers(RISKY if i < 20 else SAFE, 100, i)])
raw = float(np.mean(np.asarray(rolls.outcome) == ms.OUTCOMES.index("harm")))
for states in (ms.KGram(0), ms.KGram(1), ms.KGram(3), ms.Position()):
    chain = ms.estimate(ms.count(rolls, states=states))
    start = ms.hitting_probability(chain, "harm").at_start.value
    print(f"{states!r}: P(harm) at the start {start:.6f}, raw fraction {raw:.6f}, equal: {abs(start - raw) < 1e-12}")

chain = ms.estimate(ms.count(rolls, states=ms.KGram(1)))
kinds = [ms.Chain(np.vstack([P, np.zeros((2, 4))]), {"harm": 2, "refusal": 3}, start=0) for P in (RISKY, SAFE, RARE)]
two = [ms.hitting_distribution(c, "harm", horizon=2).cumulative.value[2] for c in (chain, *kinds[:2])]
print(f"two kinds of prompts in one chain: harm within 2 tokens {two[0]:.3f}, in truth {np.mean(two[1:]):.3f}")
h = [ms.hitting_probability(c, "harm").at_start.value for c in kinds]
print(f"  through 5 answers {raw**5:.4f} by the chain, in truth {np.mean(np.power(h[:2], 5)):.4f}")

print(f"100 answers of a chain with P(harm) {h[2]:.4f}: mean estimate over 100 experiments")
for prior in (None, 0.5, 4.0):
    found = []
    for _ in range(100):
        counts = ms.count(rollouts(answers(RARE, 100, 0)), states=ms.KGram(1))
        made = ms.estimate(counts) if prior is None else ms.estimate(counts, "dirichlet", prior)
        found.append(ms.hitting_probability(made, "harm", certify=False).at_start.value)
    print(f"  {'no prior' if prior is None else f'{prior} pseudo-transitions a row'}: {np.mean(found):.4f}")

p, levels, n = 0.54, 30, 1000
print(f"{levels} levels passed with {p}: {p**levels:.2e}; {n} transitions a level leave a relative error of", end=" ")
error = np.sqrt((1 + (1 - p) / (p * n)) ** levels - 1)
print(f"{100 * error:.1f} %, for which plain sampling takes {1 / (p**levels * error**2):.1e} answers")
