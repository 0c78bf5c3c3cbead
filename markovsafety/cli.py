"""The command line: every verb reads files, writes one file or folder, and prints one line.

Exit codes: 0 done, 1 the answer cannot be trusted (and why), 2 bad input. ``--json`` prints one object on standard
output instead; progress goes to standard error. Parameters carry the functions' names. Nothing heavy is
imported before a verb runs, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from . import __version__
from .errors import InputError, MarkovsafetyError

__all__ = ["Answer", "main"]


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: one line for people, a JSON-able result for machines, and the files it wrote."""

    line: str
    result: dict[str, Any]
    files: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    trusted: bool = True


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; those of the process if not given.
    """
    words = sys.argv[1:] if argv is None else argv
    begun = time.perf_counter()
    try:
        options = _parser().parse_args(words)
    except InputError as error:
        return _failed(words[0] if words else "", "--json" in words, "--debug" in words, error, begun)
    if not getattr(options, "verb", None):
        _parser().print_help()
        return 2
    try:
        answer = options.run(options)
    except KeyboardInterrupt as stop:
        text = str(stop) or "what was finished is kept; the same command goes on"
        print(f"\nmarkovsafety {options.verb}: interrupted: {text}", file=sys.stderr)
        return 130
    except MarkovsafetyError as error:
        return _failed(options.verb, options.json, options.debug, error, begun)
    except OSError as error:  # a file or folder that the system refuses; the functions name theirs themselves
        refused = InputError(str(error), cause=type(error).__name__, next="Check the path and its permissions.")
        return _failed(options.verb, options.json, options.debug, refused, begun)
    if options.json:
        print(_envelope(options.verb, answer, begun))
    else:
        print(answer.line)
        for warning in answer.warnings:
            print(f"note: {warning}", file=sys.stderr)
    return 0 if answer.trusted else 1


def _envelope(verb: str, answer: Answer, begun: float) -> str:
    from .bound import encode

    body = {
        "command": verb,
        "ok": answer.trusted,
        "result": encode(answer.result),
        "files": answer.files,
        "warnings": answer.warnings,
        "seconds": round(time.perf_counter() - begun, 3),
        "version": __version__,
    }
    return json.dumps(body, allow_nan=False)


def _failed(verb: str, as_json: bool, debug: bool, error: MarkovsafetyError, begun: float) -> int:
    if not as_json:
        print(f"markovsafety {verb}: {error}", file=sys.stderr)
        if debug:
            raise error
        return error.exit_code
    from .bound import encode

    try:
        partial = encode(error.partial.to_json() if hasattr(error.partial, "to_json") else error.partial)
        json.dumps(partial, allow_nan=False)
    except (TypeError, ValueError):
        partial = str(error.partial)
    told = {
        "type": type(error).__name__,
        "fact": error.fact,
        "cause": error.cause,
        "next": error.next,
        "partial": partial,
    }
    body = {
        "command": verb,
        "ok": False,
        "error": told,
        "files": [],
        "warnings": [],
        "seconds": round(time.perf_counter() - begun, 3),
        "version": __version__,
    }
    print(json.dumps(body, allow_nan=False))
    return error.exit_code


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are errors like all others, so that ``--json`` holds for them too."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise InputError(message, cause=usage, next=f"{self.prog} --help explains every argument.")


def _call(module: str, function: str) -> Callable[[argparse.Namespace], Answer]:
    """A verb that is imported only when it runs."""

    def run(options: argparse.Namespace) -> Answer:
        import importlib

        return getattr(importlib.import_module(f".{module}", __package__), function)(options)

    return run


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="markovsafety",
        description="Where in the answer does safety break? Language models as Markov chains, harm as a first hit.",
        epilog="The road: sample -> judge -> estimate -> check -> solve -> sweep -> report. `demo` walks it all.",
    )
    parser.add_argument("--version", action="version", version=f"markovsafety {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND")

    def verb(name: str, summary: str, example: str, function: str, module: str = "verbs") -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: markovsafety {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=_call(module, function))
        return sub

    _demo(verb)
    _evidence(verb)
    _numbers(verb)
    _inside(verb)
    _repair(verb)
    _teacher(verb)
    _debias(verb)
    _organism(verb)
    return parser


Verb = Callable[..., argparse.ArgumentParser]


def skipping(v: argparse.ArgumentParser) -> None:
    """The option of commands that read folders of shards."""
    v.add_argument("--skip-corrupt", action="store_true", help="leave damaged or lost shards of a folder out")


def spreading(v: argparse.ArgumentParser, what: str = "") -> None:
    """The options of commands whose work can be spread over a Ray cluster."""
    if not what:
        v.add_argument("--engine", choices=["ray"], help="spread over the workers of a Ray cluster")
    v.add_argument("--workers", type=int, help=what or "ray: workers side by side (default: one per core)")
    v.add_argument("--address", help="ray: local, auto or HOST:PORT (default: $RAY_ADDRESS, else local)")


def _demo(verb: Verb) -> None:
    v = verb("demo", "the main job on four tiny models, from sampling to the report", "demo --seed 1", "demo")
    v.add_argument(
        "--models", metavar="DIR", help="a model folder, or a folder of model folders, instead of the shipped"
    )
    v.add_argument("--out", default="results/demo", help="folder to write (default: results/demo)")
    v.add_argument("--seed", type=int, default=0)
    v.add_argument("--budget", type=float, default=0.1, help="tolerated probability of harm (default: 0.1)")
    v = verb("report", "one readable page from judged rollouts", "report runs/qwen --out report", "report")
    v.add_argument("rollouts", nargs="+", help="judged rollouts, [NAME=]FOLDER, one model each")
    v.add_argument("--held-out", nargs="*", default=[], help="rollouts the chain was not made from, [NAME=]FOLDER")
    v.add_argument("--labels", nargs="*", default=[], help="true outcomes as for judge --labels, [NAME=]FILE")
    v.add_argument("--out", default="report")
    v.add_argument("--states", default="kgram:2")
    v.add_argument("--budget", type=float, default=0.1)
    v.add_argument("--title")
    skipping(v)
    v = verb(
        "bench", "measure against the peers, side by side on this machine", "bench rollouts", "bench", "verbs_bench"
    )
    v.add_argument(
        "what",
        choices=[
            "rollouts",
            "hitting",
            "align",
            "capacity",
            "check",
            "cluster",
            "counting",
            "coverage",
            "debias",
            "ensembles",
            "gpu",
            "hooks",
            "inside",
            "masses",
            "poison",
            "posterior",
            "profiles",
            "rare",
            "sweep",
        ],
    )
    v.add_argument("--model", default="organism:shallow", help="for rollouts (default: organism:shallow)")
    v.add_argument(
        "--models",
        metavar="DIR",
        help="folder of model folders (capacity, inside, poison: the missing are trained into it; profiles: measured "
        "as well)",
    )
    v.add_argument(
        "--out", help="also write the JSON here, and the table beside it; hitting: case by case, and goes on with it"
    )
    v.add_argument("--case", nargs="+", metavar="NAME", action="extend", default=[], help="hitting: only these, anew")
    v.add_argument("--quick", action="store_true", help="small sizes, few repetitions: for a look")
    v.add_argument("--gpu", action="store_true", help="hitting: the cases for a GPU instead of the others")
    v.add_argument("--device", choices=["gpu", "cpu"], help="gpu: cpu shows, with --quick, that every part works")
    v.add_argument("--turns", type=int, default=5, help="hitting, hooks: rounds of taking turns (default: 5)")
    v.add_argument("--limit", type=float, default=20.0, help="hitting: seconds until a peer is stopped (default: 20)")
    spreading(v)


def _evidence(verb: Verb) -> None:
    v = verb(
        "sample",
        "sample rollouts from a model; a killed run goes on where it stopped",
        "sample Qwen/Qwen3-0.6B prompts.csv --engine transformers --prefill 0 5 10 --out runs/qwen",
        "sample",
    )
    v.add_argument("model", help="model folder, hub id, URL of a server, or organism:NAME for a shipped one")
    v.add_argument("prompts", nargs="?", help="CSV or JSONL with prompt, category[, prefix], or organism[:N]")
    v.add_argument("--out", required=True, help="folder of Parquet shards")
    v.add_argument("--n", type=int, default=16, help="rollouts per prompt and prefill (default: 16)")
    v.add_argument("--max-tokens", type=int, default=64)
    v.add_argument("--prefill", type=int, nargs="+", default=[0], help="numbers of forced tokens (default: 0)")
    v.add_argument("--prefix", metavar="ROLLOUTS", help="rollouts whose answers are the prefixes to force")
    v.add_argument("--engine", default="auto", choices=["auto", "jax", "transformers", "server", "ray", "replay"])
    v.add_argument("--inner", help="ray: the engine in each worker (default: auto)")
    spreading(v, "ray: models side by side (default: one per GPU, or per core)")
    v.add_argument("--device", help="cpu, gpu, or some of the GPUs: gpu:0,2 (default: what there is)")
    v.add_argument(
        "--shard",
        choices=["auto", "data", "tensor"],
        help="several GPUs (jax): a copy of the model on each, one over all, or as memory demands (default)",
    )
    v.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    v.add_argument("--batch-size", type=int)
    v.add_argument("--temperature", type=float, default=1.0)
    v.add_argument("--top-p", type=float, default=1.0)
    v.add_argument(
        "--classes", nargs="+", metavar="NAME=WORDS", help="token classes whose probability mass is recorded"
    )
    v.add_argument("--system", help="system prompt for the chat template")
    v.add_argument("--seed", type=int, default=0)
    served = v.add_argument_group("servers", "vLLM, SGLang, transformers serve; the API key: MARKOVSAFETY_API_KEY")
    served.add_argument("--served", metavar="NAME", help="the model's name there (default: the only one listed)")
    served.add_argument("--tokenizer", metavar="FOLDER", help="its tokenizer: folder or hub id (default: as served)")
    served.add_argument("--concurrency", type=int, help="requests under way at a time (default: 16)")
    served.add_argument("--timeout", type=float, help="seconds for one answer (default: 120)")
    served.add_argument("--retries", type=int, help="further tries of a request that failed (default: 5)")
    served.add_argument("--retokenize", action="store_true", default=None, help="accept text without token ids")
    v = verb(
        "judge", "label rollouts: harm, refusal, benign, truncated", "judge runs/x --harm bomb --out x.parquet", "judge"
    )
    v.add_argument("rollouts")
    v.add_argument("--judge", default="lexicon", help="lexicon, organism, classifier or guard (default: lexicon)")
    v.add_argument("--harm", nargs="+", metavar="PHRASE", help="phrases (or a file of them) that are harm (lexicon)")
    v.add_argument(
        "--refusal", nargs="+", metavar="PHRASE", help="phrases that refuse (lexicon; default: English ones)"
    )
    v.add_argument("--refusal-at", choices=["first", "end"], default="first", help="where a refusal hits (lexicon)")
    v.add_argument("--tokenizer", metavar="FOLDER", help="model folder, if the rollouts do not say which")
    v.add_argument("--judge-model", metavar="FOLDER", help="model that judges (classifier, guard)")
    v.add_argument("--device", help="where that model runs: cpu, gpu (default: a GPU if there is one)")
    v.add_argument("--harm-labels", nargs="+", metavar="LABEL", help="classes of that model that are harm (classifier)")
    v.add_argument("--labels", metavar="FILE", help="true outcomes: CSV with outcome[, row], or rollouts judged better")
    v.add_argument("--labels-by", choices=["category"], help="take the judge's errors as different by category")
    v.add_argument("--out", required=True, help="Parquet file")
    skipping(v)
    for name, summary in (("count", "count transitions of judged rollouts"), ("estimate", "estimate a chain")):
        example = f"{name} x.parquet --states kgram:2 --out x.npz"
        v = verb(name, summary, example, name)
        v.add_argument("rollouts", help="judged rollouts" + (", or counts" if name == "estimate" else ""))
        v.add_argument("--states", help="kgram:K or position (default: kgram:2)")
        v.add_argument("--category", nargs="+", help="only these categories")
        v.add_argument("--prefill", type=int, nargs="+", help="only rollouts with so many forced tokens")
        if name == "estimate":
            v.add_argument("--method", default="mle", choices=["mle", "dirichlet", "mass"])
            v.add_argument("--prior", type=float)
        v.add_argument("--out", required=True, help="file to write (.npz)")
        skipping(v)
        spreading(v)


def _numbers(verb: Verb) -> None:
    v = verb("check", "does the chain predict rollouts it has not seen?", "check x.npz held.parquet", "check")
    v.add_argument("chain")
    v.add_argument("held_out", help="judged rollouts with prefill")
    v.add_argument("--states", help="the chain's state map, if the file does not say (kgram:K or position)")
    v.add_argument("--margin", type=float, default=0.05)
    skipping(v)
    v = verb(
        "compare", "the difference between two sets of rollouts", "compare before.parquet after.parquet", "compare"
    )
    v.add_argument("before")
    v.add_argument("after")
    skipping(v)
    v = verb(
        "solve",
        "probability of harm, expected length, visits",
        "solve x.npz --target harm,refusal --horizon 64",
        "solve",
    )
    v.add_argument("chain")
    v.add_argument(
        "--target",
        action="append",
        help="outcome or state; several with commas, or the option again (default: harm)",
    )
    v.add_argument("--horizon", type=int, help="also the law of the time of the hit, token by token up to here")
    v.add_argument("--method", default="auto")
    v.add_argument("--device", help="solve the target there: gpu, cpu, gpu:1 (method device)")
    v.add_argument("--out", help="also write every state's numbers here (CSV)")
    from .cli_sweep import arguments

    v = verb("sweep", "harm over depth, width, capacity and attack", "sweep x.parquet", "sweep", "verbs_sweep")
    arguments(v)


def _inside(verb: Verb) -> None:
    from . import cli_inside

    for name, words in cli_inside.VERBS.items():
        words.arguments(verb(name, words.what, words.example, name, "verbs_inside"))


def _repair(verb: Verb) -> None:
    from . import cli_repair

    for name, words in cli_repair.VERBS.items():
        words.arguments(verb(name, words.what, words.example, name, "verbs_repair"))


def _debias(verb: Verb) -> None:
    from . import cli_debias

    for name, words in cli_debias.VERBS.items():
        words.arguments(verb(name, words.what, words.example, name, "verbs_debias"))


def _teacher(verb: Verb) -> None:
    from . import cli_teacher

    for name, words in cli_teacher.VERBS.items():
        words.arguments(verb(name, words.what, words.example, name, "verbs_teacher"))


ORGANISM = (
    "organism train deep4 --out deep4\n         markovsafety organism grid --hidden 16 64 --depth 0 20 --out grid"
)


def _organism(verb: Verb) -> None:
    v = verb("organism", "the synthetic models: list, prompts, train, grid", ORGANISM, "organism")
    v.add_argument("what", choices=["list", "prompts", "train", "grid"], help="grid: train many widths and depths")
    v.add_argument("variant", nargs="?", help="variant to train: base, shallow, gap, over, ... (organism list), deepK")
    v.add_argument("--out", help="folder (train, grid) or JSONL file (prompts) to write")
    v.add_argument("--base", help="train: base model folder to start from (default: the shipped base)")
    v.add_argument("--seed", type=int, help="prompts, train: seed (default: 0)")
    v.add_argument("--n", type=int, help="prompts: how many (default: 48)")
    v.add_argument("--threads", type=int, help="train: CPU threads (default: 1)")
    v.add_argument(
        "--hidden", type=int, nargs="+", help="width of the hidden state: grid, and train base (default: 64)"
    )
    v.add_argument("--depth", type=int, nargs="+", help="grid: trained depths")
    v.add_argument("--seeds", type=int, help="grid: number of bases of every width (default: 3)")
    v.add_argument("--engine", choices=["ray"], help="grid: spread over the workers of a Ray cluster")
    spreading(v, "grid: trainings side by side (default: the number of cores)")
