"""The words of the main job, and of what the package brings: ``demo``, ``organism``, ``bench``, ``completion``."""

from __future__ import annotations

import argparse

from .cli_words import Words, seed, spreading

__all__ = ["SHELLS", "VERBS"]

SHELLS = ("bash", "zsh", "fish", "tcsh")
BENCHES = (
    "align capacity check cluster counting coverage debias ensembles gpu hitting hooks inside masses poison posterior "
    "profiles rare rollouts sweep"
).split()


def _demo(v: argparse.ArgumentParser) -> None:
    v.add_argument(
        "--models", metavar="DIR", help="a model folder, or a folder of model folders, instead of the shipped"
    )
    v.add_argument("--out", default="results/demo", help="folder to write (default: results/demo)")
    seed(v)
    v.add_argument("--budget", type=float, default=0.1, help="tolerated probability of harm (default: 0.1)")


def _organism(v: argparse.ArgumentParser) -> None:
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


def _bench(v: argparse.ArgumentParser) -> None:
    v.add_argument("what", choices=BENCHES, help="what is measured")
    v.add_argument("--model", default="organism:shallow", help="for rollouts (default: organism:shallow)")
    v.add_argument(
        "--models",
        metavar="DIR",
        help="folder of model folders (align, capacity, debias, inside, poison: what is missing is trained into it; "
        "ensembles, profiles: they are measured as well)",
    )
    v.add_argument(
        "--out", help="also write the JSON here, and the table beside it; hitting: case by case, and goes on with it"
    )
    v.add_argument("--case", nargs="+", metavar="NAME", action="extend", default=[], help="hitting: only these, anew")
    v.add_argument("--quick", action="store_true", help="small sizes, few repetitions: for a look")
    v.add_argument("--gpu", action="store_true", help="hitting: the cases for a GPU instead of the others")
    v.add_argument(
        "--device",
        choices=["gpu", "cpu"],
        help="hitting: gpu is --gpu, cpu the others; gpu: cpu shows, with --quick, that every part works",
    )
    v.add_argument("--turns", type=int, default=5, help="hitting, hooks: rounds of taking turns (default: 5)")
    v.add_argument("--limit", type=float, default=20.0, help="hitting: seconds until a peer is stopped (default: 20)")
    spreading(v)


def _completion(v: argparse.ArgumentParser) -> None:
    v.add_argument("shell", choices=SHELLS, help="the shell to write for")


VERBS = {
    "demo": Words(
        "the main job on four tiny models, from sampling to the report",
        (
            ("four shipped models, 84,000 rollouts, a report in results/demo; about a minute", "demo"),
            ("models of yours, Llama-family folders with the organism's tokenizer", "demo --models trained --out mine"),
        ),
        _demo,
    ),
    "organism": Words(
        "the synthetic models: list, prompts, train, grid",
        (
            ("what there is", "organism list"),
            ("prompts of the synthetic language, for other programs", "organism prompts --n 96 --out prompts.jsonl"),
            ("a model that is aligned four tokens deep; minutes on a CPU", "organism train deep4 --out deep4"),
            ("many sizes, each trained to two depths", "organism grid --hidden 16 64 --depth 0 20 --out grid"),
        ),
        _organism,
    ),
    "bench": Words(
        "measure against the peers, side by side on this machine",
        (
            ("a look, in seconds", "bench rollouts --quick"),
            ("solvers beside their peers; the table is written beside the JSON", "bench hitting --out hitting.json"),
            ("one GPU, everything, in less than eight minutes", "bench gpu --out gpu.json"),
        ),
        _bench,
    ),
    "completion": Words(
        "a script that completes commands and options in your shell",
        (
            ("bash, for this session and all to come", "completion bash > ~/.markovsafety-completion.bash"),
            ("zsh: into a folder of $fpath", "completion zsh > ~/.zfunc/_markovsafety"),
            ("fish", "completion fish > ~/.config/fish/completions/markovsafety.fish"),
        ),
        _completion,
        "bash: add `source ~/.markovsafety-completion.bash` to ~/.bashrc; start a new shell afterwards.",
    ),
}
