"""The fine-tuning attack as a logistic curve in the number of gradient steps, and how little four points say."""

from markovsafety import depth

data = depth.PUBLISHED["fine-tuning"]
print("source:", data.source)
fit = depth.fit_attack_curve(data.at, data.rate, 0.889, n=data.n, ceilings=[0.885, 0.95])
sign = "-" if fit.intercept.value < 0 else "+"
print(f"ASR(n) = {fit.ceiling} / (1 + exp(-({fit.slope.value:.3f} n {sign} {abs(fit.intercept.value):.3f})))")
print("steps   ", "  ".join(f"{n:5}" for n in data.at))
print("measured", "  ".join(f"{100 * x:5.1f}" for x in data.rate))
print("fitted  ", "  ".join(f"{100 * x:5.1f}" for x in fit.fitted))
print(f"largest error {100 * fit.error:.1f} points")
for ceiling, _, _, error in fit.sensitivity:
    print(f"ceiling {ceiling}: largest error {100 * error:.1f} points")
print(
    f"slope, 95 %: [{fit.slope.lower:.2f}, {fit.slope.upper:.2f}]; degrees of freedom {fit.info['degrees of freedom']}"
)
print(f"steps until half of the answers are harmful: {fit.steps_to(0.5)[0]:.2f}")
