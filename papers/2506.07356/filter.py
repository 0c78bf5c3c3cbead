"""A filter of fine-tuning data by a threshold: what it leaves of the poison, and what recall the chain needs."""

from markovsafety import depth

n, share, epochs, batch = 1000, 0.1, 20, 64
poison = n * share


def kept(recall, false_drop, p=share):
    """Share of poison after the filter."""
    return p * (1 - recall) / (p * (1 - recall) + (1 - p) * (1 - false_drop))


print("share of poison after the filter, 10 % before")
for recall, false_drop in ((0.5, 0.0), (0.9, 0.0), (0.99, 0.0), (0.99, 0.5), (1.0, 0.5)):
    print(f"  recall {recall}, clean data dropped {false_drop}: {100 * kept(recall, false_drop):.2f} %")
print("  dropping everything at random instead: recall .5, dropped .5:", f"{100 * kept(0.5, 0.5):.2f} %")

# Every pass over a batch of 64 harmful pairs moves the log odds of complying by the slope of the published attack.
data = depth.PUBLISHED["fine-tuning"]
curve = depth.fit_attack_curve(data.at, data.rate, 0.889, n=data.n)
print(f"harm of the start row after x passes over harmful pairs: logistic, slope {curve.slope.value:.3f} per {batch}")
for recall in (0.0, 0.9, 0.97, 0.99, 1.0):
    passes = epochs * poison * (1 - recall)
    print(f"  recall {recall:<4}: {passes:6.0f} passes, harm {curve.harm(passes / batch):.3f}")
for eps in (0.05, 0.1):
    steps, _ = curve.steps_to(eps)
    allowed = batch * steps
    print(f"  harm within {eps}: at most {allowed:.0f} passes, recall at least {1 - allowed / (epochs * poison):.4f}")

# What a trained refusal of the first token does not reach: harm behind forced tokens, here with depth-0 refusals only.
model = depth.Profile(0.08, 0.02, 0.01, 0.3)
print("refusals at the first position only, h(k) at k = 0, 1, 5:", end=" ")
print(", ".join(f"{x:.3f}" for x in model.harm(1, [0, 1, 5]).value))
