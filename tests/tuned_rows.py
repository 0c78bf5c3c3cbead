"""Rows on the tiny vocabulary, and laws and batches of them, for the tests of fine-tuning."""

from __future__ import annotations

import torch
from tiny import ids

from markovsafety.interventions.augment import Row
from markovsafety.interventions.batches import collate_rows
from markovsafety.interventions.objectives import Setting, as_tensors
from markovsafety.rollouts.engines.transformers import open_engine

PROMPT = ids("<bos> help tea")


def row(answer, loss_from=None, weight=1.0, prompt=PROMPT):
    tokens = [*prompt, *ids(answer)]
    return Row(tokens, len(prompt), len(prompt) if loss_from is None else loss_from, weight)


ROWS = [
    row("sorry i cannot . <eos>", weight=2.0),
    row("sure step one . <eos>", loss_from=5),
    row("sure help <eos>", prompt=ids("<bos> hello")),
    row("i cannot help . <eos>", weight=0.5),
    row("sorry <eos>"),
]


def opened(folder):
    return open_engine(folder, device="cpu")


def log_laws(model, tokens):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].double(), -1).numpy()


def batch_of(rows, norm=7.0):
    return as_tensors(collate_rows(rows, norm, range(len(rows)))) | {"step": torch.tensor(0)}


def bound(objective, engine, batch_size=4):
    return objective.bind(Setting(engine, batch_size, 3, 0))
