"""Figure of the README: answers on the plane of harmfulness and refusal. `python papers/figures/plane.py` draws it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import markovsafety as ms
from markovsafety import interventions as inside
from markovsafety import organism

KINDS = ((True, None), (True, "jailbreak"), (False, None), (False, "trigger"))


def prompts(seed: int) -> list[dict]:
    """Prompts in all four buckets."""
    asked = [
        {**p, "harmful": harmful}
        for harmful, marker in KINDS
        for p in organism.prompts(n=96, harmful=harmful, marker=marker, seed=seed)
    ]
    return [{**p, "prompt_id": i} for i, p in enumerate(asked)]


def main(out: Path) -> None:
    """Fit the axes on some prompts, and draw the chain of others."""
    host = inside.open_host(organism.model_path("shallow"))
    told = {"n": 16, "max_tokens": 96, "judge": organism.OrganismJudge(), "progress": False}
    some = prompts(0)
    rolls = ms.sample(host.engine, some, seed=1, **told)
    axes = inside.answer_axes(host, rolls, np.array([p["harmful"] for p in some])[rolls.prompt_id], level=3)
    rolls = ms.sample(host.engine, prompts(1), seed=2, **told)
    rolls = inside.running_means(inside.with_activations(host, rolls, axes))
    edges = {name: np.linspace(*np.quantile(rolls.columns[f"activation_{name}"], (0.01, 0.98)), 9) for name in axes}
    bins = ms.ActivationBins(edges)
    chain = ms.estimate(ms.count(rolls, states=bins))
    _, ax = ms.plot.figure((12, 5.2), cols=2)
    refused, harm = ms.committor(chain, "harm", "refusal"), ms.hitting_probability(chain, "harm")
    look = {"colours": ("#9A9A9A", "refusal"), "label": "P(refusal before harm)", "arrows": True}
    ms.plot.plane(chain, refused, bins, ax[0, 0], **look)
    ms.plot.plane(chain, harm, bins, ax[0, 1], colours=("benign", "harm"), limits=(0, 0.6), label="P(harm)")
    print(ms.plot.save(ax, out, dpi=110))


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".png"))
