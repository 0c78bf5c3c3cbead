"""The words of the commands from a model to a chain: ``sample``, ``judge``, ``count``, ``estimate``."""

from __future__ import annotations

import argparse

from .cli_words import Words, judge_words, of_answers, skipping, spreading

__all__ = ["VERBS"]


def _sample(v: argparse.ArgumentParser) -> None:
    v.add_argument("model", help="model folder, hub id, URL of a server, or organism:NAME for a shipped one")
    v.add_argument("prompts", nargs="?", help="CSV or JSONL with prompt, category[, prefix], or organism[:N]")
    v.add_argument("--out", required=True, help="folder of Parquet shards")
    v.add_argument("--n", type=int, default=16, help="rollouts per prompt and prefill (default: 16)")
    of_answers(v)
    v.add_argument("--prefill", type=int, nargs="+", default=[0], help="numbers of forced tokens (default: 0)")
    v.add_argument("--prefix", metavar="ROLLOUTS", help="rollouts whose answers are the prefixes to force")
    engines = ["auto", "jax", "transformers", "server", "ray", "replay"]
    v.add_argument(
        "--engine",
        default="auto",
        choices=engines,
        help="who runs the model (default: auto: jax for Llama-family folders, server for a URL, else transformers)",
    )
    v.add_argument("--inner", help="ray: the engine in each worker (default: auto)")
    spreading(v, "ray: models side by side (default: one per GPU, or per core)")
    v.add_argument("--device", help="cpu, gpu, or some of the GPUs: gpu:0,2 (default: what there is)")
    v.add_argument(
        "--shard",
        choices=["auto", "data", "tensor"],
        help="several GPUs (jax): a copy of the model on each, one over all, or as memory demands (default)",
    )
    v.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    v.add_argument("--batch-size", type=int, help="rollouts at a time (default: what suits the model and the memory)")
    v.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model, on this machine, with your rights (default: never)",
    )
    v.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    v.add_argument("--top-p", type=float, default=1.0, help="nucleus to sample from (default: 1, all tokens)")
    v.add_argument(
        "--classes", nargs="+", metavar="NAME=WORDS", help="token classes whose probability mass is recorded"
    )
    v.add_argument("--system", help="system prompt for the chat template")
    served = v.add_argument_group("servers", "vLLM, SGLang, transformers serve; the API key: MARKOVSAFETY_API_KEY")
    served.add_argument("--served", metavar="NAME", help="the model's name there (default: the only one listed)")
    served.add_argument("--tokenizer", metavar="FOLDER", help="its tokenizer: folder or hub id (default: as served)")
    served.add_argument("--concurrency", type=int, help="requests under way at a time (default: 16)")
    served.add_argument("--timeout", type=float, help="seconds for one answer (default: 120)")
    served.add_argument("--retries", type=int, help="further tries of a request that failed (default: 5)")
    served.add_argument("--retokenize", action="store_true", default=None, help="accept text without token ids")


def _judge(v: argparse.ArgumentParser) -> None:
    v.add_argument("rollouts", help="folder of `sample`, or a Parquet or JSONL file of answers")
    judge_words(v, "lexicon, organism, classifier or guard", refusal_at="first")
    v.add_argument("--tokenizer", metavar="FOLDER", help="model folder, if the rollouts do not say which")
    v.add_argument("--judge-model", metavar="FOLDER", help="model that judges (classifier, guard)")
    v.add_argument("--device", help="where that model runs: cpu, gpu (default: a GPU if there is one)")
    v.add_argument("--harm-labels", nargs="+", metavar="LABEL", help="classes of that model that are harm (classifier)")
    v.add_argument("--labels", metavar="FILE", help="true outcomes: CSV with outcome[, row], or rollouts judged better")
    v.add_argument("--labels-by", choices=["category"], help="take the judge's errors as different by category")
    v.add_argument("--out", required=True, help="Parquet file")
    skipping(v)


def _counted(v: argparse.ArgumentParser) -> None:
    v.add_argument("--states", help="kgram:K (the last K tokens are the state) or position (default: kgram:2)")
    v.add_argument("--category", nargs="+", help="only these categories")
    v.add_argument("--prefill", type=int, nargs="+", help="only rollouts with so many forced tokens")


def _count(v: argparse.ArgumentParser) -> None:
    v.add_argument("rollouts", help="judged rollouts")
    _counted(v)
    v.add_argument("--out", required=True, help="file of counts to write (.npz)")
    skipping(v)
    spreading(v)


def _estimate(v: argparse.ArgumentParser) -> None:
    v.add_argument("rollouts", help="judged rollouts, or counts (.npz)")
    _counted(v)
    v.add_argument(
        "--method",
        default="mle",
        choices=["mle", "dirichlet", "mass"],
        help="rows as counted, as the mean under a Dirichlet prior, or from recorded class masses (default: mle)",
    )
    v.add_argument("--prior", type=float, help="dirichlet: pseudo-counts of every transition that was seen in its row")
    v.add_argument("--out", required=True, help="chain to write (.npz)")
    skipping(v)
    spreading(v)


VERBS = {
    "sample": Words(
        "sample rollouts from a model; a killed run goes on where it stopped",
        (
            (
                "a shipped model, 0, 1 and 5 compliant tokens put into its mouth; takes seconds",
                "sample organism:shallow organism:24 --n 8 --prefill 0 1 5 --out runs/shallow",
            ),
            (
                "any model of the hub; prompts.csv has the columns prompt, category and, to force tokens, prefix",
                "sample Qwen/Qwen3-0.6B prompts.csv --engine transformers --prefill 0 5 10 --out runs/qwen",
            ),
            (
                "a model that vLLM serves",
                "sample http://127.0.0.1:8000/v1 prompts.csv --tokenizer Qwen/Qwen3-0.6B --out runs/served",
            ),
            ("answers that somebody logged", "sample answers.jsonl --engine replay --out runs/logged"),
        ),
        _sample,
        "next: markovsafety judge",
    ),
    "judge": Words(
        "label rollouts: harm, refusal, benign, truncated",
        (
            (
                "phrases that count as harm, in a file, one a line; a refusal is one that stands at the end",
                "judge runs/qwen --harm harmful-phrases.txt --refusal-at end --out qwen.parquet",
            ),
            (
                "a guard model instead of phrases, and true labels of some rows: how often does it err?",
                "judge runs/qwen --judge guard --judge-model Qwen/Qwen3Guard-Gen-0.6B --labels some.csv "
                "--out qwen.parquet",
            ),
            ("the shipped models", "judge runs/shallow --judge organism --out shallow.parquet"),
        ),
        _judge,
        "next: markovsafety report, estimate or sweep",
    ),
    "count": Words(
        "count transitions of judged rollouts",
        (
            ("states are the last two tokens", "count shallow.parquet --states kgram:2 --out counts.npz"),
            ("a folder of any size, shard by shard", "count runs/judged --states kgram:1 --out counts.npz"),
        ),
        _count,
        "next: markovsafety estimate",
    ),
    "estimate": Words(
        "estimate a chain",
        (
            (
                "from free rollouts, states are the last three tokens",
                "estimate shallow.parquet --states kgram:3 --prefill 0 --out chain.npz",
            ),
            ("from counts, under a prior", "estimate counts.npz --method dirichlet --prior 0.5 --out chain.npz"),
        ),
        _estimate,
        "next: markovsafety check (is the chain a fair model?), then solve",
    ),
}
