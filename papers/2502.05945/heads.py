"""Heads of the organism that undo a refusal: found by behaviour, beside probes, a whole layer and random vectors.

Jailbroken prompts are contrasted with plain harmful ones at the end of the prompt; numbers are probabilities that an
answer begins with a refusal, on prompts that the directions were not made from, and nothing is sampled.
"""

from markovsafety import organism
from markovsafety.interventions import head_directions, open_host, probe_heads, sweep_heads, token_mass, whole_layer
from markovsafety.organism.language import COMPLIANCE_IDS

host = open_host(organism.model_path("shallow"))


def asked(split, n, marker=None, harmful=True):
    return organism.prompts(split, n=n, marker=marker, harmful=harmful, reach=1)


jailbroken, plain = asked("train", 96, "jailbreak"), asked("train", 96)
held, benign = asked("held", 96), asked("held", 96, harmful=False)


def refuses(edit, prompts=held):
    return token_mass(host, prompts, organism.REFUSAL_IDS, edit=edit).mean()


found = head_directions(host, jailbroken, plain)
sweep = sweep_heads(host, found, asked("train", 24), COMPLIANCE_IDS, alphas=(1.0, 2.0, 4.0, 8.0))
probes = probe_heads(host, jailbroken, plain)
print(f"no edit: {refuses(None):.2f}; probes right beyond .98: {int((probes.accuracy > 0.98).sum())} of 16 heads")
for size in (1, 2, 4):
    edit = found.edit(sweep.ranked[:size], 4.0, when="prompt")
    by_probe = found.edit(probes.ranked[:size], 4.0, when="prompt")
    print(
        f"{size} heads at 4 sigma: by behaviour {refuses(edit):.2f}, by probe {refuses(by_probe):.2f}, "
        f"random vectors {refuses(edit.control()):.2f}"
    )
for level in (1, 2, 3):
    print(f"whole stream at level {level}: {refuses(whole_layer(host, jailbroken, plain, level)):.2f}")
for few in (1, 4, 32):
    edit = head_directions(host, jailbroken[:few], plain[:few]).edit(sweep.ranked[:4], 4.0, when="prompt")
    print(f"{few} + {few} examples: {refuses(edit):.2f}")
back = found.edit(sweep.ranked[:4], -4.0, when="prompt")
jail = asked("held", 96, "jailbreak")
print(
    f"backwards: jailbroken prompts {refuses(None, jail):.2f} -> {refuses(back, jail):.2f}, "
    f"benign ones {refuses(None, benign):.2f} -> {refuses(back, benign):.2f}"
)
