"""A language model with a finite context as a finite chain: its size, its blocks, and what decoding does to it."""

import numpy as np

import markovsafety as ms
from markovsafety import depth
from markovsafety.depth.decoding import greedy, nucleus, with_end
from markovsafety.depth.language_chain import density

rng = np.random.default_rng(5)
print("T tokens, context K: strings, T (T^K - 1) / (T - 1); share of non-zeros, (T - 1) / (T^K - 1)")
for T, K in ((2, 3), (3, 3), (4, 2), (2, 6)):
    made = depth.language_chain(lambda s, T=T: rng.dirichlet(np.ones(T)), T, K)
    n, share = len(made.states), made.P.nnz / len(made.states) ** 2
    print(f"  T = {T}, K = {K}: {n}, {depth.n_strings(T, K)}; {share:.6f}, {density(T, K):.6f};", end=" ")
    short, _, full = made.blocks()
    left = not np.linalg.matrix_power(short.toarray(), K).any()
    print(
        f"{full.shape[0]} full strings, closed classes {len(made.closed_classes())}, short ones left for good: {left}"
    )
size = depth.n_strings(32_000, 4096)
print(f"  T = 32000, K = 4096: a number of {size.bit_length() * 30103 // 100000 + 1} digits")


def parity(s):
    """The rule of the toy with some temperature: 0 follows an even sum, 1 an odd one, each with probability .95."""
    return [0.95, 0.05] if sum(s) % 2 == 0 else [0.05, 0.95]


print("parity rule, two tokens, context of three")
laws = {"sampled": parity, "top-p .9": nucleus(parity, 0.9), "greedy": greedy(parity)}
for name, law in laws.items():
    classes = depth.language_chain(law, 2, 3).closed_classes()
    shown = ["".join(map(str, c[0])) for c in classes]
    print(f"  {name}: closed classes {len(classes)}, with {' '.join(shown)}")


def speaker(s):
    """Tokens 0 and 1, harm 2, end 3; harm becomes likelier after two ones."""
    return [0.4, 0.4, 0.15, 0.05] if s[-2:] == (1, 1) else [0.5, 0.3, 0.01, 0.19]


ended = depth.language_chain(with_end(speaker, 3), 4, 3)
law = ended.stationary()
print("with an end token: stationary law on", [s for s, p in zip(ended.states, law) if p > 0])
strings = {"harm": [s for s in ended.states if s[-1] == 2], "benign": [s for s in ended.states if s[-1] == 3]}
h = ms.hitting_probability(ended.chain(strings, start=(0,)), "harm")
print(f"  P(harm) from 0: {h.at_start.value:.6f}, from 11: {h.value[ended.states.index((1, 1))]:.6f}")
