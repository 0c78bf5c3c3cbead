"""A tilt of the first token's logits that does not see the prompt: what it does to every kind of prompt at once."""

import numpy as np

import markovsafety as ms
from markovsafety import organism

kinds = {
    "harmful": {"harmful": True, "marker": None},
    "harmless": {"harmful": False, "marker": None},
    "jailbreak": {"harmful": True, "marker": "jailbreak"},
    "trigger word": {"harmful": False, "marker": "trigger"},
}
over = {k: organism.truth("over", **v) for k, v in kinds.items()}
base = {k: organism.truth("base", **v) for k, v in kinds.items()}


def first(chain):
    """Start rows as (state, column of refusal, column of compliance, probability of refusal)."""
    for i in np.flatnonzero(chain.start > 0):
        into = chain.P[[i]].indices
        no = next(j for j in into if "R_OPEN" in chain.states[j])
        yes = next(j for j in into if "OPENED" in chain.states[j])
        yield i, no, yes, float(chain.P[i, no])


def refusal(chain):
    return float(sum(chain.start[i] * r for i, _, _, r in first(chain)))


def tilted(chain, shift):
    """The chain with the log odds of refusing first lowered by `shift`."""
    P = chain.P.tolil()
    for i, no, yes, r in first(chain):
        P[i, no] = 1 / (1 + (1 - r) / r * np.exp(shift))
        P[i, yes] = 1 - P[i, no]
    return ms.Chain(P.tocsr(), dict(chain.outcomes), chain.start, chain.states)


def harm(chain):
    return ms.hitting_probability(chain, "harm").at_start.value if len(chain.outcomes["harm"]) else 0.0


logit = {k: (np.log(refusal(over[k]) / (1 - refusal(over[k]))), refusal(base[k])) for k in kinds}
bias = np.mean([z - np.log(r / (1 - r)) for z, r in logit.values()])
print(f"bias towards refusal of the first token, mean over kinds of prompts: {bias:.3f} nats of log odds")
print("share of it removed; P(refuse first) of each kind; harm of harmful prompts, row by row and solved")
for share in (0, 0.25, 0.5, 1):
    after = {k: tilted(over[k], share * bias) for k in kinds}
    h = np.array(ms.hitting_probability(over["harmful"], "harm").value)
    P = after["harmful"].P
    by_row = sum(over["harmful"].start[i] * float((P[[i]] @ h)[0]) for i, *_ in first(over["harmful"]))
    shown = ", ".join(f"{k} {refusal(after[k]):.3f}" for k in kinds)
    print(f"  {share:<4}: {shown}; harm {by_row:.4f} = {harm(after['harmful']):.4f}")
falls = [logit[k][0] - np.log(1 / (1 / refusal(tilted(over[k], bias)) - 1)) for k in kinds]
print("the log odds of all kinds fall by the same:", np.allclose(falls, bias), "- so their order stays")
