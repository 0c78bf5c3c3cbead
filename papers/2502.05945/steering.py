"""Interventions on the prompt or on every token: what follows from the start row, and what loops do to P(harm)."""

import numpy as np

import markovsafety as ms
from markovsafety import organism

which = {"harmful": True, "marker": None, "category": "bio"}
base = organism.truth("shallow", **which)
start = int(base.start.argmax())
h = np.array(ms.hitting_probability(base, "harm").value)
print("steering while the prompt is read moves one row: harm from that row and the old chain, and solved anew")
for refuse in (0.9, 0.5, 0.1, 0.0):
    after = organism.truth("shallow", refuse=refuse, **which)
    same = [base.states.index(s) for s in after.states]  # states that are no longer reached drop out
    by_row = float((after.P[[int(after.start.argmax())]] @ h[same])[0])
    print(f"  P(refuse first) {refuse}: {by_row:.6f} {ms.hitting_probability(after, 'harm').at_start.value:.6f}")

print("steering of every token moves other rows as well: what the start row explains of the change")
for name, more in (("start row only", {"refuse": 0.5}), ("and refusals that leak", {"refuse": 0.5, "leak": 0.35})):
    after = organism.truth("shallow", **more, **which)
    parts = ms.attribute(base, after, "harm")
    by_row = float((after.P[[start]] @ h)[0])
    harm = ms.hitting_probability(after, "harm").at_start.value
    print(f"  {name}: harm {h[start]:.4f} -> {harm:.4f}, predicted from the start row {by_row:.4f};", end=" ")
    print(f"start row {100 * parts[start] / parts.sum():.1f} % of the change")

print("strength x of a toy: refusal falls as e^-x, a loop without meaning takes 1 - e^(-x / 2) of the rest; 64 tokens")
for x in (0, 1, 2, 4, 8):
    r, loop = 0.9 * np.exp(-x), 1 - np.exp(-x / 2)
    rest = (1 - r) * (1 - loop)
    rows = np.zeros((4, 4))  # answer, loop, harm, refusal
    rows[0] = 0.5 * rest, (1 - r) * loop, 0.5 * rest, r
    rows[1, 1] = rows[2, 2] = rows[3, 3] = 1
    toy = ms.Chain.layered([rows] * 64, {"harm": 2, "refusal": 3}, 0, ["answer", "loop", "harm", "refusal"])
    parts = [ms.hitting_probability(toy, o).at_start.value for o in ("harm", "refusal", "truncated")]
    print(f"  x = {x}: " + ", ".join(f"{n} {p:.3f}" for n, p in zip(("harm", "refusal", "truncated"), parts)))
