"""What moves only the start row: steering of the prompt, jailbreaks, and a guard before the answer."""

import numpy as np

import markovsafety as ms
from markovsafety import organism
from markovsafety.organism import CATEGORIES

print("refusal moved from .95 to .50 at the first token (shallow organism): harm by category")
for category in ("bio", "fraud", "privacy"):
    which = {"harmful": True, "marker": None, "category": category}
    before = organism.truth("shallow", refuse=0.95, **which)
    after = organism.truth("shallow", refuse=0.50, **which)
    h = np.array(ms.hitting_probability(before, "harm").value)
    start = int(before.start.argmax())
    by_row = float((after.P[[start]] @ h)[0])
    moved = sorted({before.states[i].split("|")[-1] for i in np.flatnonzero(abs(after.P - before.P).sum(axis=1))})
    solved = ms.hitting_probability(after, "harm").at_start.value
    print(f"  {category:8}: {h[start]:.4f} -> {by_row:.4f} from the start row alone, {solved:.4f} solved;", end=" ")
    print(f"factor {solved / h[start]:.3f}, rows that moved: {moved}")

print("from the policy of the organism (another refusal rate in each category) to .50 everywhere: factors of harm")
factors = []
for category in CATEGORIES:
    which = {"harmful": True, "marker": None, "category": category}
    pair = [organism.truth("shallow", **which), organism.truth("shallow", refuse=0.50, **which)]
    h = [ms.hitting_probability(c, "harm").at_start.value for c in pair]
    factors.append(h[1] / h[0])
print("  " + ", ".join(f"{c} {f:.2f}" for c, f in zip(CATEGORIES, factors)))

plain = organism.truth("shallow", harmful=True, marker=None)
jail = organism.truth("shallow", harmful=True, marker="jailbreak")
named = {s.replace("+jailbreak", ""): i for i, s in enumerate(jail.states)}
order = [named[s] for s in plain.states]
gap = np.asarray(abs(jail.P[order][:, order] - plain.P).sum(axis=1)).ravel()
rows = sorted({plain.states[i].split("|")[-1] for i in np.flatnonzero(gap > 1e-12)})
harm = [ms.hitting_probability(c, "harm").at_start.value for c in (plain, jail)]
print(f"jailbreak word (planted): harm {harm[0]:.4f} -> {harm[1]:.4f}, rows that moved: {rows}")

print("a guard before the answer with recall TPR per category: h' = (1 - TPR) h")
recall = np.array([0.99, 0.95, 0.9, 0.9, 0.7, 0.5])
start = np.flatnonzero(plain.start > 0)
P = plain.P.tolil()
block = int(plain.outcomes["refusal"][0])
for i, t in zip(start, recall):
    P[i] = P[i] * (1 - t)
    P[i, block] = P[i, block] + t
guarded = ms.hitting_probability(ms.Chain(P.tocsr(), dict(plain.outcomes), plain.start, plain.states), "harm")
h = np.array(ms.hitting_probability(plain, "harm").value)
print("  solved equals the product:", bool(np.allclose(guarded.value[start], (1 - recall) * h[start], atol=1e-15)))
print(f"  harm {plain.start @ h:.4f} -> {guarded.at_start.value:.4f} on average over categories")
