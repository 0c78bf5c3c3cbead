"""Can iterated biased updates make refusal absorbing, how fast, and what is it worth for harm?"""

import numpy as np

import markovsafety as ms
from markovsafety import depth, toy

inf, p0 = np.inf, 0.2
print(f"one row, refusal {p0}: add bias 1 with step sizes alpha_t and normalise")
schedules = {
    "constant 0.2": depth.ConstantSteps(0.2),
    "0.2 / (t + 1)": depth.HarmonicSteps(0.2),
    "0.2 * 0.9^t": depth.GeometricSteps(0.2, 0.9),
}
for name, steps in schedules.items():
    update = depth.AdditiveBias(steps)
    left = [depth.residual_after(update, p0, n) for n in (10, 100, 1000, inf)]
    print(f"  {name:13}: 1 - p after 10, 100, 1000, inf steps: " + ", ".join(f"{x:.3g}" for x in left))
    print(f"    {depth.verdict_of(update, p0)}")
gap = depth.residual_after(depth.AdditiveBias(depth.GeometricSteps(0.2, 0.9)), 0.0, inf)
print(f"  limit factor of 0.2 * 0.9^t: {gap:.7f}, never below exp(-2) = {np.exp(-2):.7f}")
mixed = depth.verdict_of(depth.AdditiveBias(depth.ConstantSteps(0.2), 0.7, 0.3), p0)
print(f"  share 0.7 of the bias on refusal: {mixed}")

print("cross-entropy flow on 50 tokens: 1 - p falls like 1 / t")
flow = depth.CrossEntropyFlow(50)
print(f"  t = 2000: 1 - p = {depth.residual_after(flow, 0.02, 2000):.4g}, (K - 1) / (K t) = {49 / 50 / 2000:.4g}")
for name, update in (("bias", depth.AdditiveBias(depth.ConstantSteps(0.2))), ("flow", flow)):
    print(f"  steps to 1 - p <= 1e-6 by {name}: {depth.steps_to(update, 0.02, 1e-6)[0]}")

print("a refusal that leaks (0.02) or ends (0.1) per token")
leaky = toy.leak(0.02)
bias = depth.ConstantSteps(0.2)
B = np.zeros((4, 4))
for rows in ("trajectory", "refusal"):
    B[:] = 0
    B[leaky.mask(rows), 1] = 1
    limit = depth.absorbing_when(leaky, depth.BiasMatrix(bias, B))
    before, after = limit.harm_before, limit.harm_limit
    print(f"  bias on the row {rows!r}: harm {before[0]:.4f} -> {after[0]:.4f},", end=" ")
    print(f"from a refusal {before[1]:.4f} -> {after[1]:.4f}")
for leak in (1e-3, 1e-6, 1e-9):
    endless = ms.hitting_probability(toy.leak(leak, end=0.0), "harm").at_start.value
    ending = depth.LeakyRefusal(0.05, 0.3, leak, 0.1).harm().value
    print(f"  leak {leak:g}: harm {endless:.6f} if no refusal ends, {ending:.6f} if it ends with 0.1 per token")
