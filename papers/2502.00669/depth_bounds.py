"""How deep must alignment reach: needed depth, operational depth, floor; and when less depth is better."""

import markovsafety as ms
from markovsafety import depth, toy

a0, r0, a1, r1 = 0.08, 0.02, 0.01, 0.3  # harm and refusal per token, unaligned and aligned
model = depth.Profile(a0, r0, a1, r1)

print("first d positions aligned, no token forced")
for d in (0, 1, 3, 5, 10, 20):
    print(f"  d = {d:2}: h = {model.harm(d).value:.5f}")
print(f"  floor {model.floor().value:.5f}")
h = model.harm(range(200)).value
print("  falls with every further position:", bool((h[1:] <= h[:-1]).all()))
solved = [ms.hitting_probability(toy.deep(d), "harm").at_start.value for d in range(21)]
print("  same as the solved chains, to 1e-14:", bool((abs(h[:21] - solved) < 1e-14).all()))

print("needed depth")
for eps in (0.05, 0.035, 0.03):
    found, why = model.needed_depth(eps)
    print(f"  harm within {eps}: {found if found is not None else why}")

print("operational depth: forced tokens that a trained depth withstands within 0.05")
for d in (5, 11, 20, 40):
    print(f"  trained {d}: withstands {model.operational_depth(d, 0.05)}")

print("a price of 0.001 per position")
best = model.optimal_depth(0.001)
print(f"  optimal depth {best.depth}, stationary point {best.continuous:.2f}")
print("without a price:", model.optimal_depth().reason)

print("a single checkpoint at position d, success 0.95, no token forced")
check = depth.Checkpoint(a0, r0, 0.95)
print("  h at d = 1, 5, 10, 20:", ", ".join(f"{x:.4f}" for x in check.harm([1, 5, 10, 20]).value))
sure = depth.Checkpoint(a0, r0, 1.0).harm(10).value
print(f"  refusal truly absorbing at d = 10 still leaves {sure:.4f}")
