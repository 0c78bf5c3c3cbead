"""The words of the commands that look inside a model: ``directions``, ``heads``, ``steer``."""

from __future__ import annotations

import argparse

from .cli_words import Words, engine_words, judge_words, model_word, of_answers

__all__ = ["VERBS"]

WHY = (
    "Edits of a model's activations exist to measure it and to defend it: how far a model is from harm, which "
    "transitions\nan attack moves, what a defence costs. Report P(harm) with the random control and the cost beside it."
)


def _directions(v: argparse.ArgumentParser) -> None:
    model_word(v)
    v.add_argument(
        "--prompts",
        required=True,
        help="harmful prompts, some of them answered (jailbroken, say): CSV, JSONL, or organism[:N]",
    )
    v.add_argument(
        "--benign", required=True, help="harmless prompts, some of them refused (innocent ones with frightening words)"
    )
    judge_words(v)
    of_answers(v, 8)
    v.add_argument(
        "--question", help="ask this after the instruction: does steering turn the model's own judgement of harm?"
    )
    v.add_argument("--certainly", nargs="+", default=["Certainly", "certainly"], help="its reply for harm")
    v.add_argument("--no", nargs="+", default=["No", "no"], help="its reply for no harm")
    v.add_argument("--cost-harm", type=float, default=1.0, help="of one harmful answer (default: 1)")
    v.add_argument("--cost-refusal", type=float, default=0.1, help="of one harmless prompt blocked (default: 0.1)")
    v.add_argument("--prior", type=float, default=0.5, help="share of harmful prompts to come (default: 0.5)")
    engine_words(v)
    v.add_argument("--out", required=True, help="folder: inspection.json and .md, directions, edits for `steer`")


def _heads(v: argparse.ArgumentParser) -> None:
    model_word(v)
    v.add_argument(
        "--desired", required=True, help="prompts on which the model behaves as steering should make it; organism[:N]"
    )
    v.add_argument("--prompts", required=True, help="prompts on which it does not: they are steered; organism[:N]")
    v.add_argument("--benign", help="harmless prompts: what steering costs; organism[:N]")
    v.add_argument(
        "--audit", action="store_true", help="only: the smallest alpha that moves P(harm), and how few examples do it"
    )
    v.add_argument("--move", type=float, default=0.5, help="audit: by how much (default: 0.5)")
    v.add_argument("--size", type=int, default=4, help="audit: heads together (default: 4)")
    v.add_argument("--wanted", nargs="+", help="outcomes that steering is for (default: harm benign; audit: harm)")
    v.add_argument(
        "--examples",
        type=int,
        default=32,
        help="per group, for the directions (default: 32; audit: all desired, half of --prompts)",
    )
    v.add_argument("--alphas", type=float, nargs="+", default=[1, 2, 5, 10], help="in sigma (default: 1 2 5 10)")
    v.add_argument(
        "--when", choices=["prompt", "every", "answer"], default="prompt", help="positions (default: prompt)"
    )
    judge_words(v)
    of_answers(v, 4)
    engine_words(v)
    v.add_argument("--out", required=True, help="folder: heads.json and .md (audit.json and .md), directions, edit")


def _steer(v: argparse.ArgumentParser) -> None:
    model_word(v)
    v.add_argument("--edit", required=True, metavar="FILE", help="edit (.safetensors), as write_edit writes it")
    v.add_argument("--scale", type=float, default=1.0, help="multiplies the edit (default: 1)")
    v.add_argument("--transferred", action="store_true", help="use the edit though it was made for another model")
    v.add_argument("--prompts", required=True, help="CSV or JSONL with prompt, category[, prefix], or organism[:N]")
    v.add_argument("--benign", help="harmless prompts, to see how many are refused; likewise")
    judge_words(v)
    of_answers(v, 8)
    v.add_argument("--states", default="kgram:2", help="of the chains: kgram:K or position (default: kgram:2)")
    v.add_argument("--depth", type=int, default=6, help="of the depth signature, where prompts have a prefix")
    v.add_argument("--no-control", action="store_true", help="leave the random edit of the same size out")
    v.add_argument("--no-prediction", action="store_true", help="do not predict harm from the start row")
    engine_words(v)
    v.add_argument("--out", required=True, help="folder: rollouts, effect.json, effect.md; goes on where it stopped")


VERBS = {
    "directions": Words(
        "what a model believes and what it does: directions, which of them steer, and a guard on the belief",
        (
            (
                "a shipped model, asked also whether it would do harm",
                "directions organism:shallow --prompts organism:192 --benign organism:192 --judge organism \\\n"
                "        --question ' <judge>' --out results/directions",
            ),
            (
                "a chat model on a GPU, prompts of yours",
                "directions Qwen/Qwen3-8B --prompts harmful.csv --benign harmless.csv --harm harmful-phrases.txt \\\n"
                "        --device gpu --dtype bfloat16 --out results/qwen",
            ),
        ),
        _directions,
        WHY,
    ),
    "heads": Words(
        "attention heads that steer a model, beside random vectors and other choices; --audit: how little it takes",
        (
            (
                "which heads turn refusals of a shipped model",
                "heads organism:shallow --desired organism:96 --prompts organism:96 --benign organism:48 \\\n"
                "        --judge organism --out results/heads",
            ),
            (
                "how small an edit moves P(harm) by a half, from how few examples",
                "heads organism:shallow --audit --desired organism:96 --prompts organism:96 --judge organism "
                "--out results/audit",
            ),
        ),
        _heads,
        WHY,
    ),
    "steer": Words(
        "what an edit of activations does: harm, transitions, depth and cost, beside a random edit of its size",
        (
            (
                "an edit that `heads` wrote",
                "steer organism:shallow --edit results/heads/edit_heads.safetensors --prompts organism:48 \\\n"
                "        --benign organism:48 --judge organism --out results/steer",
            ),
            (
                "the same, the other way round and twice as strong",
                "steer organism:shallow --edit results/heads/edit_heads.safetensors --scale -2 --prompts organism:48 "
                "\\\n        --judge organism --out results/reversed",
            ),
        ),
        _steer,
        WHY,
    ),
}
