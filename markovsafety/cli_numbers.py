"""The words of the commands that answer: ``report``, ``check``, ``compare``, ``solve``, ``sweep``."""

from __future__ import annotations

import argparse

from . import cli_sweep
from .cli_words import Words, skipping

__all__ = ["VERBS"]


def _level(v: argparse.ArgumentParser) -> None:
    v.add_argument("--level", type=float, default=0.95, help="confidence level of the intervals (default: .95)")


def _report(v: argparse.ArgumentParser) -> None:
    v.add_argument("rollouts", nargs="+", help="judged rollouts, [NAME=]FOLDER, one model each")
    v.add_argument("--held-out", nargs="*", default=[], help="rollouts the chain was not made from, [NAME=]FOLDER")
    v.add_argument("--labels", nargs="*", default=[], help="true outcomes as for judge --labels, [NAME=]FILE")
    v.add_argument("--out", default="report", help="folder to write (default: report)")
    v.add_argument("--states", default="kgram:2", help="of the chains: kgram:K or position (default: kgram:2)")
    v.add_argument("--budget", type=float, default=0.1, help="tolerated probability of harm (default: 0.1)")
    v.add_argument("--title", help="of the page")
    skipping(v)


def _check(v: argparse.ArgumentParser) -> None:
    v.add_argument("chain", help="chain of `estimate` (.npz)")
    v.add_argument("held_out", help="judged rollouts with prefill, of other prompts than the chain's")
    v.add_argument("--states", help="the chain's state map, if the file does not say (kgram:K or position)")
    v.add_argument("--margin", type=float, default=0.05, help="difference of probabilities that matters (default: .05)")
    _level(v)
    skipping(v)


def _compare(v: argparse.ArgumentParser) -> None:
    v.add_argument("before", help="judged rollouts")
    v.add_argument("after", help="judged rollouts of the same prompts")
    _level(v)
    skipping(v)


def _solve(v: argparse.ArgumentParser) -> None:
    v.add_argument("chain", help="chain of `estimate` or write_chain (.npz)")
    v.add_argument(
        "--target",
        action="append",
        help="outcome or state; several with commas, or the option again (default: harm)",
    )
    v.add_argument("--horizon", type=int, help="also the law of the time of the hit, token by token up to here")
    v.add_argument(
        "--method",
        default="auto",
        help="auto, layered, elimination, sparse, device, exact (default: auto: what suits the graph)",
    )
    _level(v)
    v.add_argument("--device", help="solve the target there: gpu, cpu, gpu:1 (method device)")
    v.add_argument("--out", help="also write every state's numbers here (CSV)")


VERBS = {
    "report": Words(
        "one readable page from judged rollouts",
        (
            ("one model, named qwen", "report qwen=qwen.parquet --budget 0.05 --out report"),
            (
                "before and after a change, each chain put to the test on rollouts of other prompts",
                "report before=before.parquet after=after.parquet --held-out before=held.parquet --out report",
            ),
        ),
        _report,
        "next: open report/index.html; all its numbers stand in summary.json",
    ),
    "check": Words(
        "does the chain predict rollouts it has not seen?",
        (
            (
                "rollouts of other prompts, forced k tokens deep: exit code 0 it does, 1 it does not or cannot be told",
                "check chain.npz held.parquet",
            ),
            ("misfit below .02 does not matter here", "check chain.npz held.parquet --margin 0.02"),
        ),
        _check,
        "At its start a chain always gives the raw harm fraction back; that is never counted as a success.",
    ),
    "compare": Words(
        "the difference between two sets of rollouts",
        (
            (
                "harm before and after a change, prompt by prompt and per category",
                "compare before.parquet after.parquet",
            ),
        ),
        _compare,
    ),
    "solve": Words(
        "probability of harm, expected length, visits",
        (
            ("P(harm) from the start, certified, with its interval", "solve chain.npz"),
            (
                "harm or refusal, and at which token it comes; numbers of every state into a table",
                "solve chain.npz --target harm,refusal --horizon 64 --out states.csv",
            ),
            ("in rationals, without any rounding", "solve chain.npz --method exact"),
        ),
        _solve,
    ),
    "sweep": Words(
        "harm over depth, width, capacity and attack", cli_sweep.EXAMPLES, cli_sweep.arguments, cli_sweep.AFTER
    ),
}
