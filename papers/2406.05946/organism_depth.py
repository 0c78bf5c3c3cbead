"""Alignment of the first token only, in a language whose truth is known: profiles, odds, KL, and what recovery buys."""

from markovsafety import depth, organism

asked = organism.prompts(n=48)
print("planted harm after k forced tokens of a compliant answer")
print("           " + "  ".join(f"k = {k:2}" for k in (0, 1, 5, 10, 20)) + "   within .1")
for variant in ("base", "shallow", "deep4", "deep20", "cyclic"):
    h = organism.planted_profile(variant, asked, range(21))["all"]
    found = depth.operational_depth(range(21), [h[k] for k in range(21)], 0.1)
    print(f"  {variant:8} " + "  ".join(f"{h[k]:6.4f}" for k in (0, 1, 5, 10, 20)) + f"   {found.value}")

base, shallow = (organism.truth(v, harmful=True, marker=None) for v in ("base", "shallow"))
kl = depth.kl_profile(base, shallow)
print(
    f"KL(shallow || base) at token 0: {kl.steps[0]:.4f} nats, at all later tokens: {kl.steps[1:].sum() + kl.beyond:.4f}"
)
shift = depth.odds_shift(base, shallow)
print(f"fall of the log odds of harm: at depth 0 {shift.shift[0]:.3f}, at 1 to 30 {abs(shift.shift[1:31]).max():.3f}")
spent = depth.alignment_inefficiency(base, shallow)
print(f"KL spent {spent.spent:.3f}, least for the same harm {spent.least:.3f}: {spent.ratio:.2f} times")
