"""Capacity: an aligned chain with softmax rows of rank r, the certificate, and what becomes of depth."""

from markovsafety import depth, toy

eps, chain = 0.1, toy.deep(10)
curve = depth.capacity_curve(chain, (0, 1, 2, 3), eps=eps, rounds=200)
own = depth.operational_depth(curve.depths, curve.exact, eps)
print(f"10 aligned positions, operational depth within {eps}: {own.value}")
print("rank   max TV   sum N TV   change of h   largest change   operational depth")
for i, r in enumerate(curve.ranks):
    row = curve.distance[i], curve.certificate[i], curve.change[i], curve.worst[i]
    print(f"{r:4}   {row[0]:6.4f}   {row[1]:8.4f}   {row[2]:11.4f}   {row[3]:14.4f}   {curve.reached[i].value}")
print("certificates that say something:", [r for r, c in zip(curve.ranks, curve.certificate) if c < 1])
print("rank needed for that depth with the whole profile right to .01:", curve.needed(tolerance=0.01)[0])
