"""What all commands say alike: how a command is described, how its help shows examples, options that several share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Literal, NamedTuple

__all__ = [
    "Words",
    "engine_words",
    "epilog",
    "judge_words",
    "model_word",
    "of_answers",
    "seed",
    "skipping",
    "spreading",
]

Examples = tuple[tuple[str, str], ...]


class Words(NamedTuple):
    """What a command is for, examples that teach it (a sentence, a command without the program's name), its options."""

    what: str
    examples: Examples
    arguments: Callable[[argparse.ArgumentParser], None]
    after: str = ""


def epilog(words: Words) -> str:
    """The end of a command's help: its examples, in the order in which they teach, and what else there is to say."""
    shown = [f"  {why}\n    markovsafety {command}" for why, command in words.examples]
    return "\n".join(["examples:", *shown]) + ("\n\n" + words.after if words.after else "")


def model_word(v: argparse.ArgumentParser, more: str = "") -> None:
    v.add_argument("model", help=f"model folder, hub id,{more} or organism:NAME for a shipped one")


def of_answers(v: argparse.ArgumentParser, n: int | None = None) -> None:
    """How many answers of which length, from which seed."""
    if n is not None:
        v.add_argument("--n", type=int, default=n, help=f"answers per prompt (default: {n})")
    v.add_argument("--max-tokens", type=int, default=64, help="tokens of an answer at most (default: 64)")
    seed(v)


def seed(v: argparse.ArgumentParser) -> None:
    v.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")


def judge_words(
    v: argparse.ArgumentParser, who: str = "lexicon or organism", refusal_at: Literal["first", "end"] = "end"
) -> None:
    """Who judges answers."""
    v.add_argument("--judge", default="lexicon", help=f"{who} (default: lexicon)")
    v.add_argument("--harm", nargs="+", metavar="PHRASE", help="phrases (or a file of them) that are harm (lexicon)")
    v.add_argument(
        "--refusal", nargs="+", metavar="PHRASE", help="phrases that refuse (lexicon; default: English ones)"
    )
    hits = f"where a refusal hits (lexicon; default: {refusal_at})"
    v.add_argument("--refusal-at", choices=["first", "end"], default=refusal_at, help=hits)


def engine_words(
    v: argparse.ArgumentParser, batch: bool = True, system: str = "system prompt for the chat template"
) -> None:
    """How a model is opened."""
    v.add_argument("--system", help=system)
    v.add_argument("--device", help="where it runs: cpu, gpu, gpu:1 (default: a GPU if there is one)")
    kinds = ["float32", "bfloat16", "float16"]
    v.add_argument("--dtype", default="float32", choices=kinds, help="of its weights (default: float32)")
    if batch:
        v.add_argument("--batch-size", type=int, help="sequences at a time (default: what suits the model)")


def skipping(v: argparse.ArgumentParser) -> None:
    """The option of commands that read folders of shards."""
    v.add_argument("--skip-corrupt", action="store_true", help="leave damaged or lost shards of a folder out")


def spreading(v: argparse.ArgumentParser, what: str = "") -> None:
    """The options of commands whose work can be spread over a Ray cluster."""
    if not what:
        v.add_argument("--engine", choices=["ray"], help="spread over the workers of a Ray cluster")
    v.add_argument("--workers", type=int, help=what or "ray: workers side by side (default: one per core)")
    v.add_argument("--address", help="ray: local, auto or HOST:PORT (default: $RAY_ADDRESS, else local)")
