"""Can width buy back depth? Ensembles of m answers: rules, bounds, correlation, and the hyperbola of equal safety."""

import numpy as np

from markovsafety import depth
from markovsafety.depth import ensemble_harm, needed_width, over_refusal

q, m = 0.2, 11
print(f"independent answers, q = {q}, m = {m}")
print(f"  majority {ensemble_harm(q, m, rule='majority'):.5f}, any-refusal {ensemble_harm(q, m):.1e}")
print(f"  bounds of the majority: KL-Chernoff {depth.chernoff(q, m):.4f}, Hoeffding {depth.hoeffding(q, m):.3f}")

print("equal safety 1e-6 with harm 0.8 * 0.7^d per answer: smallest width at each depth")
model = depth.Profile(0.8, 0.2, 0.0, 0.3)
widths = [needed_width(float(model.harm(d).value), 1e-6) for d in (0, 1, 2, 5, 10, 20, 40)]
print("  d = 0, 1, 2, 5, 10, 20, 40: m =", ", ".join(map(str, widths)))
curve = depth.hyperbola(0.8, 0.7, 1e-6)
print(f"  hyperbola m (d + {curve.d0:.3f}) = {curve.C:.3f}")
real, best = curve.optimum(1, 3), depth.cheapest(model, 1e-6, 1, 3)
print(f"  cheapest at cost d + 3 m: {best}; over real numbers m = {real[0]:.2f}, d = {real[1]:.2f}")
print("  floor 0.0323 per answer: m >=", needed_width(1 / 31, 1e-6), "however deep")

print("correlated answers, q = 0.1, budget 1e-4: smallest width at intra-class correlation")
print(
    "  0, .05, .1, .2, .3, .5: m =", ", ".join(str(needed_width(0.1, 1e-4, r)) for r in (0, 0.05, 0.1, 0.2, 0.3, 0.5))
)
print("  common shock 0.3:", depth.why_no_width(0.1, 1e-4, 0.3, model="common-shock"))
print(f"  at correlation .1, 20 answers are worth at most {depth.worth_in_tokens(20, 0.7, 0.1):.1f} tokens of depth")
wide = ensemble_harm(0.2, 20, 0.3), ensemble_harm(0.2, 20)
print(f"  q = 0.2, m = 20: correlation 0.3 leaves {wide[0]:.2e}, independence promises {wide[1]:.1e}")
floors = [depth.ensemble_floor(q, 0.3, "majority") for q in (0.05, 0.2, 0.4)]
print("  floors of the majority at correlation 0.3, q = .05, .2, .4:", ", ".join(f"{x:.4f}" for x in floors))
same = [ensemble_harm(0.1, 10, 0.3, model=x) for x in ("beta-binomial", "copula", "common-shock")]
print("  q = 0.1, correlation 0.3, m = 10 by three laws:", ", ".join(f"{x:.2e}" for x in same))

print("what is known without any assumption, q = 0.1 ten times:")
print("  ", depth.unassumed_harm(np.full(10, 0.1)))

print("over-refusal of harmless prompts, 0.02 per answer")
print(f"  any-refusal of 20: {over_refusal(0.02, 20):.3f}")
for k in (1, 2, 3, 5):
    rule = "any-refusal" if k == 1 else f"{k}-refusals"
    print(f"  {k} refusals of 9: harm {ensemble_harm(0.2, 9, rule=rule):.2g}, over {over_refusal(0.02, 9, rule):.2g}")

a, r = np.array([0.05, 0.05, 0.0]), np.array([0.01, 0.01, 0.5])
alone = a / (a + r)
print(f"averaging tokens of three members: {depth.token_average(a, r):.4f};", end=" ")
print(f"one answer each: any-refusal {alone.prod():.4f}, mean {alone.mean():.4f}")
