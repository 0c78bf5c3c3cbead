"""The words of the command ``sweep``: its options, and examples that teach them."""

from __future__ import annotations

import argparse

from .cli_words import skipping

__all__ = ["AFTER", "EXAMPLES", "FORMS", "arguments"]

FORM = "--profile a0=.08 r0=.02 a1=.01 r1=.3"
EXAMPLES = (
    (
        "judged rollouts, or a chain: which depth withstands a prefill, how many answers are enough",
        "sweep x.parquet --width 1 2 4 8 --harm 0.01 --figure map.png",
    ),
    (
        "harm over trained depth, under attacks that force a random number of tokens (a figure of our note)",
        f"sweep {FORM} --depth 0:33 \\\n        --attack none geometric:.2 geometric:.05 --figure depth.svg",
    ),
    (
        "what k forced tokens do to models of several trained depths",
        f"sweep {FORM} --depth 0 1 3 5 10 20 --attack fixed:0:33 --figure k.svg",
    ),
    (
        "the best place for a single refusal checkpoint (ringed), by attack",
        "sweep --checkpoint a=.08 r=.02 success=.95 --depth 1:41 \\\n"
        "        --attack none geometric:.2 geometric:.1 geometric:.05 --figure checkpoint.svg",
    ),
    (
        "width by correlation: alike answers bend the line",
        f"sweep {FORM} --depth 0 --width 1:65 \\\n        --correlation 0 .05 .1 .3 --figure width.svg",
    ),
    (
        "iso-safety: budgets as lines over depth and width, hyperbolas without a floor and without correlation",
        "sweep --profile a0=.8 r0=.2 a1=0 r1=.3 --depth 0:41 --width 1:65 --harm 1e-2 1e-4 1e-6 --figure iso.svg",
    ),
    (
        "the cheapest depth and width, and what less harm costs; harmless prompts that are refused as a second price",
        "sweep --profile a0=.8 r0=.2 a1=0 r1=.3 --depth 0:41 --width 1:65 --harm 1e-6 \\\n"
        "        --cost depth=1 width=3 --benign .02 --over-refusal .1 --plot pareto --figure cost.svg",
    ),
    (
        "models of several sizes: rollouts by capacity",
        "sweep 8=h8.parquet 16=h16.parquet 32=-diverged --depth 0 5 20 --figure capacity.svg",
    ),
    (
        "CAPACITY@DEPTH for models of several trained depths",
        "sweep 8@0=a.parquet 8@20=b.parquet 16@0=c.parquet 16@20=d.parquet --attack fixed:5",
    ),
    (
        "the measured grid of organisms over size and trained depth, with the perturbation bound drawn over it",
        "sweep papers/measurements/capacity.parquet --attack fixed:5 --figure capacity.svg",
    ),
)
AFTER = "Ranges are half open, START:STOP[:STEP]: 0:33 is 0 to 32. --json: dims, coords, harm, needed, perhaps pareto."
PLOTS = ("auto", "contour", "width", "lines", "capacity", "pareto")
FORMS = ("profile", "checkpoint", "hazards", "leaky")


def arguments(v: argparse.ArgumentParser) -> None:
    """The options of the command."""
    v.add_argument(
        "source",
        nargs="*",
        help="judged rollouts or a chain (.npz); by capacity CAPACITY[@TRAINED DEPTH]=FILE, with -REASON for a file "
        "where a model was not trained; or a table with the columns hidden or capacity, depth, k, harm, lower, upper",
    )
    v.add_argument("--profile", nargs="+", metavar="X=P", help="closed form: a0= r0= a1= r1=, each P or P:LOWER:UPPER")
    v.add_argument("--checkpoint", nargs="+", metavar="X=P", help="closed form: a= r= [success=]")
    v.add_argument("--hazards", nargs="+", metavar="X=P,P", help="closed form: harm= refusal= by position, [tail=]")
    v.add_argument("--leaky", nargs="+", metavar="X=P", help="closed form: a= r= leak= end= [stop=]")
    v.add_argument("--depth", nargs="+", metavar="D", help="forced tokens k, or trained depths (default: the measured)")
    v.add_argument("--width", nargs="+", metavar="M", help="answers (default: 1 2 4 8; of a closed form 1)")
    v.add_argument("--capacity", nargs="+", metavar="C", help="only these capacities, and those that are missing")
    v.add_argument("--correlation", nargs="+", metavar="R", help="intra-class correlations (default: measured)")
    v.add_argument("--rule", default="any-refusal", help="any-refusal, majority, 2-refusals, ...")
    v.add_argument("--model", default="beta-binomial", help="beta-binomial, copula, common-shock, independent")
    v.add_argument(
        "--attack",
        nargs="+",
        metavar="LAW",
        help="law of the number of forced tokens: none, fixed:5, fixed:0:33 (each of them), geometric:.1, 0=.5,5=.5",
    )
    v.add_argument("--level", type=float, default=0.95, help="confidence level (default: 0.95)")
    v.add_argument("--harm", type=float, nargs="+", help="harm budgets, the first decides (default: 0.1)")
    v.add_argument("--side", default="upper", choices=["upper", "value", "lower"], help="end of harm that counts")
    v.add_argument(
        "--cost", nargs="+", metavar="AXIS=PRICE", help="prices of depth, width, capacity: the cheapest cell"
    )
    v.add_argument("--benign", type=float, metavar="NU", help="rate at which one answer refuses a harmless prompt")
    v.add_argument("--over-refusal", type=float, metavar="P", help="budget of refusals of harmless prompts")
    v.add_argument("--figure", metavar="FILE", help="draw the grid: .png, .pdf or .svg")
    v.add_argument("--plot", default="auto", choices=PLOTS, help="which figure (default: what fits the grid)")
    v.add_argument("--along", metavar="AXIS", help="lines: the axis to the right")
    v.add_argument("--by", metavar="AXIS", help="lines: the axis of the lines")
    v.add_argument("--out", help="also write the grid here (CSV)")
    skipping(v)
