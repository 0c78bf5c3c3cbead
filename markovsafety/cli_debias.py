"""The words of the commands for over-refusal and for weak categories: ``debias``, ``vulnerabilities``."""

from __future__ import annotations

import argparse

from .cli_words import Words, engine_words, judge_words, of_answers

__all__ = ["VERBS"]


def _debias(v: argparse.ArgumentParser) -> None:
    v.add_argument("model", help="safety-tuned model: folder, hub id, or organism:NAME for a shipped one")
    v.add_argument("--reference", required=True, help="the model before its safety step, likewise")
    v.add_argument(
        "--prompts", required=True, help="harmful prompts: CSV or JSONL with prompt, category, or organism[:N]"
    )
    v.add_argument("--benign", required=True, help="harmless prompts, likewise")
    v.add_argument("--pool", metavar="FILE", help="text whose tokens random prompts are made of (default: all words)")
    v.add_argument("--strength", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="shares of the bias")
    v.add_argument("--length", type=int, default=4, help="answer tokens that are debiased (default: 4)")
    v.add_argument("--random", type=int, default=512, help="random prompts (default: 512)")
    v.add_argument(
        "--response", choices=["random", "ref", "safe"], default="random", help="partial answers behind them"
    )
    v.add_argument("--limit", type=float, default=0.1, help="tolerated harm in every category (default: 0.1)")
    v.add_argument("--no-verify", action="store_true", help="predict only; sample nothing of the debiased model")
    judge_words(v)
    of_answers(v, 8)
    engine_words(v)
    v.add_argument("--out", required=True, help="folder: debias.json and .md, bias.safetensors, edits for `steer`")


def _vulnerabilities(v: argparse.ArgumentParser) -> None:
    v.add_argument("rollouts", nargs="+", help="judged rollouts, [NAME=]PATH: the model, then its defences")
    outcomes = ["harm", "refusal", "benign", "truncated"]
    v.add_argument("--outcome", default="harm", choices=outcomes, help="that makes a category weak (default: harm)")
    v.add_argument("--margin", type=float, default=0.1, help="excess over the others that counts (default: 0.1)")
    v.add_argument("--limit", type=float, help="tolerated overall: a weak category below it is hidden")
    v.add_argument("--rate", type=float, default=0.05, help="false discovery rate (default: 0.05)")
    v.add_argument(
        "--control", choices=["yekutieli", "hochberg"], default="yekutieli", help="under any dependence, or not"
    )
    v.add_argument("--out", help="also write the page (.md) or the numbers (.json) here")


VERBS = {
    "debias": Words(
        "a refusal bias that no prompt causes: measured on random prompts, taken off, predicted, verified by category",
        (
            (
                "a shipped kind of model that refuses too much: train it, then take its bias off",
                "debias over --reference organism:base --prompts organism:96 --benign organism:96 \\\n"
                "        --judge organism --out results/debias",
            ),
            (
                "predict only: which strength would keep harm below .05 in every category?",
                "debias tuned --reference sft --prompts harmful.csv --benign harmless.csv --harm phrases.txt \\\n"
                "        --limit 0.05 --no-verify --out results/predicted",
            ),
        ),
        _debias,
        "`over` of the first example: markovsafety organism train over --out over",
    ),
    "vulnerabilities": Words(
        "categories that the overall score hides, and which defence mends which",
        (
            (
                "a model and a defence: weak categories, at a false discovery rate of .05",
                "vulnerabilities plain=runs/plain debiased=runs/debiased --limit 0.1 --out weak.md",
            ),
        ),
        _vulnerabilities,
    ),
}
