"""The prefill table (Table 3) as refusal hazards: where Llama-2-7B-Chat refuses, and what the fit cannot say."""

from markovsafety import depth

for name in ("prefill", "prefill, augmented"):
    rates = depth.PUBLISHED[name]
    fit = depth.fit_hazards(rates)
    print(f"{name}: {rates.source}")
    print("  harm:", ", ".join(f"k = {k}: {100 * x:.1f} %" for k, x in zip(rates.at, rates.rate)))
    for i, (k, m) in enumerate(zip(fit.depths, fit.depths[1:])):
        per = fit.per_token.value[i]
        print(f"  tokens {k} to {m}: refused {100 * fit.refusal.value[i]:.1f} %, per token {per:.4f}")
    if (curve := fit.exponential) is not None:
        print(f"  k >= 5: h(k) = {curve.a.value:.3f} - {curve.b.value:.3f} exp(-k / {curve.c.value:.2f})")
        print(f"  extrapolated to k = 0: {100 * curve.at_zero.value:.1f} %")
    for caveat in fit.caveats:
        print("  caveat:", caveat)

# The initial model is safe at k = 0 and lost at k = 5: which depth withstands a budget of 5 % ?
table = depth.PUBLISHED["prefill"]
print("operational depth of the initial model within 5 %:", depth.operational_depth(table.at, table.rate, 0.05))
table = depth.PUBLISHED["prefill, augmented"]
print("operational depth of the augmented model within 5 %:", depth.operational_depth(table.at, table.rate, 0.05))
