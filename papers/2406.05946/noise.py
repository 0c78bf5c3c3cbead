"""What 330 instructions can tell: standard errors of printed rates, zero harms, and a forced refusal that is a leak."""

from math import sqrt

from markovsafety import bound, depth

n = 330
for percent in (1.5, 4.6, 57.0):
    p = percent / 100
    print(f"{percent} % of {n}: standard error {100 * sqrt(p * (1 - p) / n):.2f} points")
print(f"no harm in {n}: one-sided 95 % upper end {100 * bound.clopper_pearson(0, n, 0.9)[1]:.2f} %")
print(f"no harm in {n}: two-sided 95 % interval [0, {100 * bound.clopper_pearson(0, n, 0.95)[1]:.2f} %]")

print("a forced refusal prefix on base models (Table 1): harm after the prefix / harm without = leak / (leak + end)")
table = {"Llama-2-7B": (68.6, [16.4, 5.4, 14.4, 2.1, 8.1]), "Gemma-7B": (85.4, [8.7, 2.7, 14.1, 1.0, 3.9])}
for model, (free, forced) in table.items():
    shares = [x / free for x in forced]
    print(
        f"  {model}: {', '.join(f'{s:.3f}' for s in shares)}; leak / end from {min(shares) / (1 - min(shares)):.3f}",
        end=" ",
    )
    print(f"to {max(shares) / (1 - max(shares)):.3f}")
ratio = 16.4 / 68.6 / (1 - 16.4 / 68.6)
model = depth.LeakyRefusal(a=0.08, r=0.02, leak=0.1 * ratio, end=0.1)
print(f"  as a chain, worst prefix: a refusal is worth {model.kept:.3f} of one that holds for ever")
