"""The pre-training bound: its constant for five models, and the same bound without the architecture."""

from markovsafety import depth

print("model          N        T       r     B       rows within (L1)   published   TV <= 1 alone   ratio")
for name, (tokens, vocabulary, width) in depth.PRETRAINED.items():
    d = depth.deviation(tokens, vocabulary, width)
    print(f"{name:11}  {tokens:.1e}  {vocabulary:6}  {width}  {d.constant:7.1f}  {d.row:.5f}", end="            ")
    print(f"{d.published:.2e}    {d.ours:.2e}        {d.ratio:.0f}")
small, large = (depth.deviation(1e12, 32_000, r).ours for r in (64, 65_536))
print("the second bound depends on the architecture:", small != large)
hot = [depth.deviation(1e12, 32_000, 4096, temperature=t) for t in (0.5, 2.0)]
print(f"the published constant at temperature .5 and 2: {hot[0].constant:.1f}, {hot[1].constant:.1f}", end="; ")
print("the second bound moves:", hot[0].ours != hot[1].ours)
