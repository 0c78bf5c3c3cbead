"""The words of the command ``teacher``: a refusal-feature teacher, its filter, its student, and a watch on the data."""

from __future__ import annotations

import argparse

from .cli_words import Words, engine_words, seed

__all__ = ["STEPS", "VERBS"]

STEPS = {
    "train": "a base model and labelled alignment pairs -> a teacher and its filter",
    "fit": "an aligned model as it is and labelled pairs -> a filter by its own feature, read where validation says; "
    "nothing is trained, and the folder serves as one of train does",
    "filter": "a teacher and fine-tuning data -> what is kept and dropped, how good that was, rows to review",
    "student": "a base model, a teacher and data -> a model that learned what the filter kept, held to the teacher",
    "monitor": "a teacher, reference data and batches that came later -> has the data drifted? (1: it has); whether "
    "more clean rows are dropped than before can be told of labelled batches only",
}
PAIRS = "CSV or JSONL with prompt, answer, harmful (true or false) and perhaps category"
EXAMPLES = (
    ("a teacher, and its filter", "teacher train organism:base --pairs organism:1200 --out t"),
    ("or a filter by an aligned model as it is", "teacher fit organism:shallow --pairs organism:1200 --out f"),
    (
        "what to learn, and what people should look at",
        "teacher filter t --data data.jsonl --review rows.csv --out kept",
    ),
    (
        "a model that learns what was kept, held to the teacher",
        "teacher student organism:base --teacher t --data data.jsonl --pairs organism:1200 --out s",
    ),
    (
        "have later batches drifted?",
        "teacher monitor t --reference data.jsonl --data monday.jsonl tuesday.jsonl --out drift.json",
    ),
)


def _teacher(v: argparse.ArgumentParser) -> None:
    v.add_argument("what", choices=list(STEPS), help="; ".join(f"{name}: {what}" for name, what in STEPS.items()))
    v.add_argument(
        "model",
        help="train, student: base model folder, hub id, or organism:NAME; fit: aligned model, likewise; filter, "
        "monitor: folder of train or fit",
    )
    v.add_argument("--pairs", help=f"train, fit, student: alignment pairs: {PAIRS}; or organism[:N]")
    v.add_argument("--data", nargs="+", help=f"fine-tuning data: {PAIRS}, labels where known; monitor: one per batch")
    v.add_argument("--teacher", metavar="DIR", help="student: folder of train or fit")
    v.add_argument("--reference", help="monitor: data that the filter was found right on; or a monitor (.safetensors)")
    v.add_argument(
        "--level", type=int, help="train, fit: of the feature in the residual stream (train: the middle; fit: the best)"
    )
    v.add_argument(
        "--position", choices=["t_post", "t_inst"], help="train, fit: where it is read (train: t_post; fit: the best)"
    )
    v.add_argument("--weight", type=float, help="train: of the penalty (default: 0.1); student: of the teacher (1)")
    v.add_argument(
        "--feature", default="dynamic", choices=["dynamic", "fixed"], help="train: of each batch or the base"
    )
    v.add_argument("--recall", type=float, default=0.95, help="train, fit: wished on validation (default: 0.95)")
    v.add_argument("--threshold", type=float, help="train, fit: instead of the one for the recall")
    v.add_argument("--validation", type=float, default=0.25, help="train: share of prompts kept for it (default: 0.25)")
    v.add_argument("--no-filter", action="store_true", help="student: learn all data")
    v.add_argument("--review", metavar="FILE", help="filter: also write rows for people to decide about (CSV, JSONL)")
    v.add_argument("--decisions", metavar="FILE", help="filter, student: a review with decisions, before the filter's")
    v.add_argument("--rate", type=float, default=0.01, help="monitor: of any false alarm, over all batches (0.01)")
    v.add_argument("--horizon", type=int, default=100, help="monitor: batches to be keen for (default: 100)")
    v.add_argument(
        "--begin", type=int, help="monitor: batches that were watched before (default: as the monitor's file says)"
    )
    v.add_argument("--steps", type=int, default=200, help="train, student: updates (default: 200)")
    v.add_argument("--batch-size", type=int, default=32, help="rows per update (default: 32)")
    v.add_argument("--learning-rate", type=float, default=1e-3, help="the largest (default: 1e-3)")
    v.add_argument("--warmup", type=int, default=10, help="updates until that rate is reached (default: 10)")
    v.add_argument("--save-every", type=int, default=250, help="updates between checkpoints (default: 250)")
    v.add_argument("--lora", type=int, metavar="RANK", help="train adapters on all linear maps, and merge them")
    system = "train, fit: system message of all prompts; afterwards the filter's own is used"
    engine_words(v, batch=False, system=system)
    seed(v)
    v.add_argument("--out", required=True, help="folder to write (monitor: JSON); training that was stopped goes on")


VERBS = {
    "teacher": Words(
        "fine-tuning on data that may be poisoned: a refusal-feature teacher that filters it and teaches the student",
        EXAMPLES,
        _teacher,
    ),
}
