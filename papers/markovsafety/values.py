"""Every number of the note, computed by the public API and written as text; nothing in the note is typed by hand.

Run by `build.py`. Each function returns the numbers of one part of the note, by the names that its text asks for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import markovsafety as ms
from markovsafety import depth
from markovsafety.depth.language_chain import mixing as mixing_of

HERE = Path(__file__).resolve().parent
MEASUREMENTS = HERE.parent / "measurements"
PROFILE = depth.Profile(a0=0.08, r0=0.02, a1=0.01, r1=0.3)
COMMANDS = {
    "depth": "markovsafety sweep --profile a0=.08 r0=.02 a1=.01 r1=.3 --depth 0:33 "
    "--attack none geometric:.2 geometric:.05 --figure depth.svg",
    "checkpoint": "markovsafety sweep --checkpoint a=.08 r=.02 success=.95 --depth 1:41 "
    "--attack none geometric:.2 geometric:.1 geometric:.05 --figure checkpoint.svg",
    "width": "markovsafety sweep --profile a0=.08 r0=.02 a1=.01 r1=.3 --depth 0 --width 1:65 "
    "--correlation 0 .05 .1 .3 --figure width.svg",
    "iso": "markovsafety sweep --profile a0=.8 r0=.2 a1=0 r1=.3 --depth 0:41 --width 1:65 "
    "--harm 1e-2 1e-4 1e-6 --figure iso.svg",
    "alike": "markovsafety sweep --profile a0=.8 r0=.2 a1=0 r1=.3 --depth 0:41 --width 1:65 --correlation .1 "
    "--harm 1e-2 1e-4 1e-6 --figure alike.svg",
}


def text(x: Any, digits: int = 3) -> str:
    """A number with so many significant digits; powers of ten below 1e-3 and from 1e6 on."""
    if isinstance(x, (int, np.integer)) and abs(x) < 10**6:
        return str(int(x))
    x = float(x)
    if math.isinf(x):
        return "∞"
    if x == round(x) and abs(x) < 10**6:
        return str(round(x))
    if not 1e-3 <= abs(x) < 1e6:
        mantissa, power = f"{x:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    places = max(digits - 1 - math.floor(math.log10(abs(x))), 0)
    return f"{x:.{places}f}"


def texts(xs: Any, digits: int = 3) -> list[str]:
    return [text(x, digits) for x in xs]


def chain_view() -> dict[str, Any]:
    from markovsafety.clusters import clopper_pearson

    return {"zero_of_330": text(clopper_pearson(0, 330, 0.95)[1])}


def aligned() -> dict[str, Any]:
    return {
        "depth.floor": text(PROFILE.f1),
        "depth.needed": text(PROFILE.needed_depth(0.05)[0]),
        "depth.operational": text(PROFILE.operational_depth(20, 0.05).depth),
        "depth.priced": text(PROFILE.optimal_depth(1e-3).depth),
    }


def checkpoint() -> dict[str, Any]:
    point = depth.Checkpoint(a=0.08, r=0.02, success=0.95)
    ps = [0.05, 0.1, 0.2, 0.3, 0.5]
    laws = [depth.AttackLaw.geometric(p) for p in ps]
    best = [point.optimal_depth(law) for law in laws]
    return {
        "checkpoint.c": text(point.c, 2),
        "checkpoint.p": texts(ps, 1),
        "checkpoint.mean": texts([round(law.mean, 9) for law in laws]),
        "checkpoint.best": texts([b.depth for b in best]),
        "checkpoint.real": texts([b.continuous for b in best]),
        "checkpoint.harm": texts([b.harm for b in best]),
    }


def leaks() -> dict[str, Any]:
    def harm(leak: float, end: float = 0.1) -> str:
        return text(depth.LeakyRefusal(a=0.05, r=0.3, leak=leak, end=end).harm().value)

    return {"leak.none": harm(0.0), "leak.small": harm(0.02), "leak.even": harm(1e-9, 1e-9)}


def since_prefix() -> dict[str, Any]:
    # Without an attack both models are one: a gate at the first token, then unaligned positions.
    hazards = depth.Hazards([0.0] + [PROFILE.a0] * 3, [0.95] + [PROFILE.r0] * 3, tail=PROFILE.f0)
    h = hazards.harm().value
    return {"recovery.true": text(h[0]), "recovery.position": text(h[1])}


def updates() -> dict[str, Any]:
    p0, goals = 0.1, [0.1, 0.01, 0.001]
    kinds = {
        "constant": depth.AdditiveBias(depth.ConstantSteps(0.1)),
        "harmonic": depth.AdditiveBias(depth.HarmonicSteps(0.5)),
        "summable": depth.AdditiveBias(depth.GeometricSteps(0.2, 0.9)),
        "logit": depth.LogitSteps(depth.ConstantSteps(0.1)),
        "flow": depth.CrossEntropyFlow(classes=50),
    }

    def steps(update: Any, eps: float) -> str:
        found, _ = depth.steps_to(update, p0, eps)
        return "never" if found is None else text(found)

    left = depth.residual_after(depth.AdditiveBias(depth.GeometricSteps(0.2, 0.9)), 0.0, math.inf)
    return {
        "updates.geometric": text(left),
        "updates.p0": text(p0, 1),
        "updates.residuals": texts(goals, 1),
        **{f"updates.{name}": [steps(u, g) for g in goals] for name, u in kinds.items()},
    }


def optimum() -> dict[str, Any]:
    found, ks = {}, [0, 1, 5, 10, 20]
    for name, mix in (("on-policy", None), ("recovery", (0.5, 25))):
        path = depth.training_path(at=(100, 1000, 10000), recovery=mix)
        for step, h in zip(path.steps, path.harm):
            found[f"{name}, {step} steps"] = texts(h[ks])
    best = depth.training_path(at=(1,)).best
    chain = depth.trajectory(np.tile([0.88, 0.02, 0.10], (30, 1)), 0.8)
    information = depth.harm_information(chain)
    out: dict[str, Any] = {
        "front.k": texts(ks),
        "front": {"rows": [{"name": n, "h": h} for n, h in (*found.items(), ("best", texts(best[ks])))]},
        "recovery.t": text(depth.attack_length(1e-4, 12.0, 0.98, 0.5)[0], 4),
    }
    for size, strength in (("small", 0.1), ("large", 20.0)):
        spent = depth.kl_profile(chain, depth.optimum(chain, strength)).steps
        ratio = spent / (strength**2 * information / 2)
        out |= {f"optimum.{size}_low": text(ratio.min(), 4), f"optimum.{size}_high": text(ratio.max(), 4)}
    return out


def symmetry() -> dict[str, Any]:
    share = depth.twirl_direction(2000)
    going = [0.1, 0.5, 0.9, 0.99]
    checks = [depth.twirl_experiment(_symmetric(on), per_row=2000, repeats=4000) for on in going]
    return {
        "twirl.trials": text(2000),
        "twirl.above": text(share.info["above"]),
        "twirl.below": text(share.info["below"]),
        "twirl.on": texts(going, 2),
        "twirl.measured": texts(c.variance_ratio for c in checks),
        "twirl.predicted": texts(c.variance_expected for c in checks),
        "twirl.rows": texts(c.row_ratio for c in checks),
    }


def _symmetric(on: float) -> ms.Chain:
    """Eight states alike on a cycle: to the next one, or to an end."""
    P = np.zeros((10, 10))
    for s in range(8):
        P[s, (s + 1) % 8] = on
        P[s, 8:] = 0.3 * (1 - on), 0.7 * (1 - on)
    return ms.Chain(P, {"harm": 8, "refusal": 9}, start=0)


def width() -> dict[str, Any]:
    q, nu, harm = 0.2, 0.02, depth.ensemble_harm
    rules = {1: "any-refusal", 2: "2-refusals", 3: "3-refusals"}
    out = {
        "width.majority": text(harm(q, 11, rule="majority")),
        "width.chernoff": text(depth.chernoff(q, 11)),
        "width.hoeffding": text(depth.hoeffding(q, 11)),
        "width.any": text(harm(q, 11)),
        "width.q": text(PROFILE.f0, 1),
    }
    for k, rule in rules.items():
        out[f"width.k{k}h"] = text(harm(q, 9, rule=rule), 2)
        out[f"width.k{k}o"] = text(depth.over_refusal(nu, 9, rule=rule), 2)
    q, rho, m = 0.1, 0.3, 10
    y, z = q + rho * (1 - q), q * (1 - rho)
    w = rho * q / (1 - z)
    out |= {
        "range.beta": text(harm(q, m, rho)),
        "range.copula": text(harm(q, m, rho, model="copula")),
        "range.shock": text(harm(q, m, rho, model="common-shock")),
        "range.low": text(q * y ** (m - 1)),
        "range.high": text(w + (1 - w) * z**m),
    }
    rhos = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5]
    return out | {
        "needed.rho": texts(rhos, 1),
        "needed.width": texts(depth.needed_width(0.1, 1e-4, r) for r in rhos),
        "needed.floor": texts(depth.ensemble_floor(0.1, r, rule="majority") for r in rhos),
    }


def iso() -> dict[str, Any]:
    # Harm 0.8 unaligned, and a decay by 0.7 a position without a floor.
    profile, eps = depth.Profile(a0=0.8, r0=0.2, a1=0.0, r1=0.3), 1e-6
    ds = [0, 1, 2, 5, 10, 20, 40]
    m, d = depth.hyperbola(0.8, 0.7, eps).optimum(1, 3)
    best = depth.cheapest(profile, eps, 1, 3)
    return {
        "iso.d": texts(ds),
        "iso.m": texts(depth.iso_widths(profile, eps, ds)),
        "iso.m05": texts(depth.iso_widths(profile, eps, ds, 0.05)),
        "iso.worth": text(depth.worth_in_tokens(8, 0.7, 0.05)),
        "iso.real_m": text(m),
        "iso.real_d": text(d, 4),
        "iso.best_m": text(best.width),
        "iso.best_d": text(best.depth),
        "iso.cost": text(best.cost, 2),
    }


def certificates() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    P = np.zeros((20, 20))
    P[:18] = rng.dirichlet(np.full(20, 0.5), size=18)
    chain = ms.Chain(P, {"harm": 18, "refusal": 19}, start=0)
    ranks = [1, 4, 8, 12, 16, 17]
    curve = depth.capacity_curve(chain, ranks)
    return {
        "rank.r": texts(ranks),
        "rank.tv": texts(curve.distance),
        "rank.bound": texts(curve.certificate),
        "rank.actual": texts(curve.change),
    }


def language_chains() -> dict[str, Any]:
    mixing = mixing_of(depth.parity_model())
    llama = depth.deviation(*depth.PRETRAINED["Llama 7B"])
    return {
        "mixing.epsilon": text(mixing.epsilon),
        "mixing.truth": text(mixing.tokens(0.01)),
        "mixing.published": text(math.ceil(mixing.tokens_by("published", 0.01))),
        "mixing.ours": text(math.ceil(mixing.tokens_by("ours", 0.01))),
        "constant.llama": text(llama.ratio, 4),
    }


# --- what was measured on models: read from papers/measurements, left out where a file is not there ---

HOW = {
    "profiles": "markovsafety bench profiles --out papers/measurements/profiles.json",
    "ensembles": "markovsafety bench ensembles --out papers/measurements/ensembles.json",
    "capacity": "markovsafety bench capacity --models FOLDER --out papers/measurements/capacity.parquet",
}


def measured() -> dict[str, Any]:
    """Tables of what was measured, by name; only those whose file is there."""
    readers = {"profiles": profiles, "ensembles": ensembles, "capacity": capacity}
    return {name: readers[name](path) for name in HOW if (path := place(name)).is_file()}


def place(name: str) -> Path:
    return MEASUREMENTS / Path(HOW[name].split()[-1]).name


def _origin(name: str) -> dict[str, str]:
    return {"file": f"papers/measurements/{place(name).name}", "command": HOW[name]}


def profiles(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    ks = [k for k in (0, 1, 3, 5, 10, 16, 20) if k in found["depths"]]
    rows = []
    for m in found["models"]:
        h = m["profile"]
        at = [found["depths"].index(k) for k in ks]
        cells = [f"{100 * h['value'][i]:.1f} ± {50 * (h['upper'][i] - h['lower'][i]):.1f}" for i in at]
        withstood = depth.operational_depth(found["depths"], h["value"], 0.1, "value").reading
        rows.append([m["model"], *cells, str(withstood)])
    count = [
        [
            name,
            text(c["cells"]),
            text(c["beyond"]),
            text(c["allowed"]),
            f"{c['largest']:.1f}",
            f"{100 * c['largest_difference']:.1f} %",
            "yes" if c["passed"] else "no",
        ]
        for name, c in found["count"].items()
    ]
    sizes = {"ask": found["ask"], "n": found["n"], "depths": found["depths"]}
    return {
        **_origin("profiles"),
        **sizes,
        "k": ks,
        "rows": rows,
        "count": count,
        "best": best_state(found),
        "figure": "profiles.svg",
    }


def best_state(found: dict[str, Any]) -> str:
    """Of the states that passed (if any did) the one with the least difference."""
    count = found["count"]
    good = [name for name in count if count[name]["passed"]] or list(count)
    return min(good, key=lambda name: count[name]["largest_difference"])


def ensembles(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    every = [s for s in found["summary"] if s["ensembles"] == "all"]
    rows = [
        [
            s["law"],
            text(s["beyond_2"]),
            text(s["allowed"]),
            text(s["beyond_4"]),
            f"{s['largest']:.1f}",
            f"{s['mean']:.2f}",
            "yes" if s["holds"] else "no",
        ]
        for s in every
    ]
    return {
        **_origin("ensembles"),
        "rows": rows,
        "cells": every[0]["cells"],
        "prompts": found["prompts"],
        "width": max(found["widths"]),
        "depths": len(found["depths"]),
    }


def capacity(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    counted = [r for r in rows if r["counted"]]
    table = []
    for trained, hidden in sorted({(r["depth"], r["hidden"]) for r in counted}):
        here = [r for r in counted if (r["depth"], r["hidden"]) == (trained, hidden)]
        worst = max(here, key=lambda r: abs(r["harm"] - r["planted"]))
        gap, half = worst["harm"] - worst["planted"], (worst["upper"] - worst["lower"]) / 2
        beyond = [max(r["lower"] - r["planted"], r["planted"] - r["upper"], 0.0) for r in here]
        outside = [sum(b > r[e] for b, r in zip(beyond, here)) for e in ("tv_upper", "effect_upper")]
        table.append(
            [
                text(trained),
                text(hidden),
                f"{worst['parameters']:,}",
                f"{gap:+.3f} ± {half:.3f}",
                f"{np.mean([r['tv'] for r in here]):.2f}",
                f"{np.mean([r['effect'] for r in here]):.3f}",
                f"{100 * np.mean([r['tv'] >= 1 for r in here]):.0f} %",
                f"{outside[0]}, {outside[1]} of {len(here)}",
            ]
        )
    models = {(r["depth"], r["hidden"], r["seed"]) for r in rows}
    line = "markovsafety sweep papers/measurements/capacity.parquet --attack fixed:5 --figure capacity.svg"
    return {
        **_origin("capacity"),
        "rows": table,
        "models": len(models),
        "sizes": len({r["hidden"] for r in rows}),
        "trained": len({r["depth"] for r in rows}),
        "counted": len({(r["depth"], r["hidden"], r["seed"]) for r in counted}),
        "figure": "capacity.svg",
        "line": line,
    }


PARTS: list[Callable[[], dict[str, Any]]] = [
    chain_view,
    aligned,
    checkpoint,
    leaks,
    since_prefix,
    updates,
    optimum,
    symmetry,
    width,
    iso,
    certificates,
    language_chains,
]


def numbers() -> dict[str, Any]:
    """All of them."""
    out: dict[str, Any] = {"commands": COMMANDS}
    for part in PARTS:
        out |= part()
    return out


if __name__ == "__main__":
    print(json.dumps(numbers(), indent=1, ensure_ascii=False))
