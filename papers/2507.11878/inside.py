"""What the organism believes and what it does: both directions, both steerings, the reply inversion, the guard.

Read off forward passes: 96 prompts of each of four cells make the directions, 96 others measure.
"""

from markovsafety import organism
from markovsafety.interventions import (
    assess,
    choose_level,
    difference,
    inversion_task,
    invert,
    label,
    latent_guard,
    open_host,
    separate,
    token_mass,
)

host = open_host(organism.model_path("shallow"))
cells = ((True, None), (True, "jailbreak"), (False, "trigger"), (False, None))


def buckets(split):
    asked = [
        {**p, "harmful": harmful}
        for harmful, marker in cells
        for p in organism.prompts(split, n=96, harmful=harmful, marker=marker, reach=1)
    ]
    return label(host, asked, tokens=organism.REFUSAL_IDS)


fitted, held = buckets("train"), buckets("held")
apart = separate(host, fitted, held)
print(
    f"apart: mismatch AUC {apart.best('t_inst')['mismatch'].value:.2f} at t_inst, "
    f"{apart.best('t_post')['mismatch'].value:.2f} at t_post"
)
sides = fitted.refused_harmful, fitted.accepted_harmless
harm = difference(host, *sides)
refusal = difference(host, *sides, position="t_post", names=("refused", "accepted"))


def refuses(edit):
    return token_mass(host, held.accepted_harmless, organism.REFUSAL_IDS, edit=edit)


task = inversion_task(host, " <judge>", certainly=["certainly"], no=["no"])
for name, direction in (("refusal", refusal), ("harmfulness", harm)):
    swept = choose_level(host, direction, refuses, name="P(refuse)", scales=(1.0,))
    e = swept.best.effect
    print(f"{name}: P(refuse) {e.base.value:.2f} -> {e.edited.value:.2f}, random {e.control.value:.2f}")
    t = invert(host, task, held.accepted_harmless, task.edit(swept.direction)).share
    print(f"{name}: says certainly {t.base.value:.2f} -> {t.edited.value:.2f}, random {t.control.value:.2f}")
guard = assess(host, latent_guard(host, fitted), held)
right = {k: f"{b.value:.2f} ({guard.refusal[k].value:.2f})" for k, b in guard.accuracy.items()}
print(f"guard: AUC {guard.auc.value:.2f}; right, and in brackets 'did it refuse?':", right)
