"""An optimal safety depth exists against an attack of random depth: one refusal checkpoint, geometric attack."""

import numpy as np

import markovsafety as ms
from markovsafety import depth, toy

a, r, success = 0.08, 0.02, 0.95
model = depth.Checkpoint(a, r, success)

print("attack: k tokens forced with probability p (1 - p)^k")
print("  p     optimal d   formula   harm there   at d = 1   at d = 40")
for p in (0.05, 0.1, 0.2, 0.3, 0.5):
    attack = depth.AttackLaw.geometric(p)
    best = model.optimal_depth(attack)
    ends = model.harm([1, 40], attack=attack).value
    print(f"  {p:<4}  {best.depth:9}   {best.continuous:7.2f}   {best.harm:10.4f}   {ends[0]:8.4f}   {ends[1]:9.4f}")

tie = model.harm([9, 10], attack=depth.AttackLaw.geometric(0.1)).value
print("p = 0.1: depths 9 and 10 tie:", abs(tie[0] - tie[1]) < 1e-15)

# The same by chains: every position of the checkpoint solved and averaged over the attack.
p = 0.2
law = p * (1 - p) ** np.arange(400)


def harm(d):
    h = np.array(ms.hitting_probability(toy.checkpoint(d, success, (a, r)), "harm").value)
    return float(law @ h[np.minimum(np.arange(400), d)])


costs = [harm(d) for d in range(1, 41)]
print(f"solved as chains, p = {p}: optimal d = {1 + int(np.argmin(costs))} with {min(costs):.4f}")

print("two tokens forced for certain: optimal d =", model.optimal_depth(depth.AttackLaw.fixed(2)).depth)
many = depth.Profile(a, r, 0.01, 0.3)
print("all positions up to d aligned:", many.optimal_depth(attack=depth.AttackLaw.geometric(p)).reason)
priced = many.optimal_depth(0.001, attack=depth.AttackLaw.geometric(p))
print(f"  at a price of 0.001 per position: optimal d = {priced.depth} with harm {priced.harm:.4f}")
