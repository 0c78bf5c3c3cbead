"""Why alignment is shallow: gradient descent on a trajectory, the optimum it does not reach, and recovery data."""

from markovsafety import depth

ks = [0, 1, 5, 10, 20]


def row(h):
    return ", ".join(f"{x:.3g}" for x in h[ks])


print("harm after k = 0, 1, 5, 10, 20 forced tokens; 30 positions, unaligned harm .10 and refusal .02 per token")
path = depth.training_path()
for i, step in enumerate(path.steps):
    print(f"  step {step}: {row(path.harm[i])}")
print(f"  optimum of the same objective: {row(path.best)}")

base = path.chain()
for name, after in (("step 1000", path.chain(1000)), ("optimum", depth.optimum(base, 10.0))):
    spent, shift = depth.alignment_inefficiency(base, after), depth.odds_shift(base, after)
    print(f"  {name}: odds shift at k = 0 {shift.shift[0]:.2f}, at k = 20 {shift.shift[20]:.2f};", end=" ")
    print(f"KL spent / least {spent.ratio:.2f}")

print("with recovery data: half of the training answers begin after 1 .. C forced tokens, step 1000")
for reach in (10, 25):
    mixed = depth.training_path(at=[1000], recovery=(0.5, reach))
    print(f"  C = {reach}: {row(mixed.harm[0])}")

marks = [100, 300, 1000, 3000, 10_000, 30_000, 100_000]
front = depth.training_path(depths=60, at=marks).front()
print("first k with harm >= .4 at steps 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5:", ", ".join(map(str, front)))
