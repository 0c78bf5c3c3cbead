"""The words of the commands that repair a model: ``align``."""

from __future__ import annotations

import argparse

from .cli_words import Words, engine_words, model_word, seed

__all__ = ["VERBS"]


def _align(v: argparse.ArgumentParser) -> None:
    model_word(v)
    v.add_argument(
        "--data",
        required=True,
        help="JSONL with prompt, answer, refusal[, category]; or judged rollouts of harmful prompts, some of them with "
        "forced tokens; or organism[:N]: rollouts of the model itself",
    )
    v.add_argument("--benign", help="harmless prompts, to keep the model as it is: CSV, JSONL, or organism[:N]")
    v.add_argument(
        "--method",
        default="recovery",
        choices=["recovery", "cyclic", "permutation"],
        help="refuse after a random number of tokens; after every number; behind critical phrases that changed places "
        "(default: recovery)",
    )
    v.add_argument("--depth", type=int, default=20, help="most compliant tokens before a refusal (default: 20)")
    v.add_argument("--alpha", type=float, default=0.2, help="share of the loss for refusals (default: 0.2)")
    v.add_argument("--plain", type=float, default=0.5, help="share of refusals at once (default: 0.5)")
    v.add_argument("--budget", type=int, help="tokens with loss in all refusals (default: that of the harmless)")
    v.add_argument("--hold-out", nargs="+", default=[], metavar="CATEGORY", help="categories only measured")
    v.add_argument("--log", metavar="ROLLOUTS", help="permutation: judged rollouts of the phrases (default: the data)")
    v.add_argument("--phrases", type=int, default=8, help="permutation: how many (default: 8)")
    v.add_argument(
        "--constrained", type=float, nargs="*", metavar="BETA", help="hold every token near the model, by these betas"
    )
    v.add_argument("--answers", type=int, default=4, help="of the model to every harmless prompt (default: 4)")
    v.add_argument("--max-tokens", type=int, default=64, help="of these (default: 64)")
    v.add_argument("--steps", type=int, default=500, help="updates (default: 500)")
    v.add_argument("--batch-size", type=int, default=32, help="rows per update (default: 32)")
    v.add_argument(
        "--accumulate", type=int, default=1, metavar="PARTS", help="of a batch, one after the other, to save memory"
    )
    v.add_argument("--learning-rate", type=float, default=1e-3, help="the largest (default: 1e-3)")
    v.add_argument("--warmup", type=int, default=20, help="updates until that rate is reached (default: 20)")
    v.add_argument("--lora", type=int, metavar="RANK", help="train adapters on all linear maps, and merge them")
    v.add_argument("--save-every", type=int, default=250, help="updates between checkpoints (default: 250)")
    engine_words(v, batch=False)
    seed(v)
    v.add_argument("--out", required=True, help="model folder to write; a run that was stopped goes on")


VERBS = {
    "align": Words(
        "fine-tune a model to refuse also in the middle of an answer, and measure what that costs",
        (
            (
                "a shipped model: rows that turn back after every number of tokens",
                "align organism:shallow --data organism:240 --benign organism:240 --method cyclic --out deep",
            ),
            (
                "a chat model on a GPU; data.jsonl has prompt, answer (what it should turn back from) and refusal",
                "align Qwen/Qwen3-0.6B --data data.jsonl --benign harmless.csv --lora 16 --device gpu --dtype bfloat16 "
                "\\\n        --batch-size 32 --accumulate 4 --out deep",
            ),
        ),
        _align,
        "next: markovsafety sample with --prefill, of both models, and compare",
    ),
}
