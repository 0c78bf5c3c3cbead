"""Preference steps: the loss by hand, what it moves, and what bad pairs are told."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from markovsafety import interventions as iv
from markovsafety import organism
from markovsafety.errors import InputError
from markovsafety.interventions.batches import RowBatches
from markovsafety.interventions.objectives import Setting, as_tensors

ids = organism.WORDS.index


@pytest.fixture(scope="module")
def engine():
    return iv.open_host(organism.model_path("base"), device="cpu").engine


@pytest.fixture(scope="module")
def pairs(engine):
    """Refusals preferred to the beginning of a compliant answer, on harmful prompts of the training split."""
    refusal = [ids(w) for w in ("sorry", "i", "cannot", "assist", ".", "<eos>")]
    asked = organism.prompts("train", n=24, reach=8, seed=3)
    return [iv.Preference(engine.tokenizer.prompt_ids(a["prompt"]).tolist(), refusal, a["prefix"]) for a in asked]


def batch_of(rows, size=4):
    return as_tensors(RowBatches(rows, size, 1, 0)[0])


def test_the_loss_is_that_of_the_paper(engine, pairs):
    """Log-probabilities of whole answers, token by token with plain softmax, of a model that is not the reference."""
    chosen, rejected = iv.preference_rows(pairs)
    moved = copy.deepcopy(engine.model)
    with torch.no_grad():
        moved.model.norm.weight += 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    bound = iv.Preferred(rejected, beta=0.3).bind(Setting(engine, 4, 1, 0))
    batch = batch_of(chosen)
    loss, parts = bound(moved, batch)

    def total(model, row):
        tokens = torch.tensor([row.tokens])
        law = torch.log_softmax(model(tokens, use_cache=False).logits[0].double(), -1)
        return sum(float(law[i - 1, row.tokens[i]].detach()) for i in range(row.answer, len(row.tokens)))

    margins = []
    for i in batch["index"].tolist():
        gains = [total(moved, r[i]) - total(engine.model, r[i]) for r in (chosen, rejected)]
        margins.append(gains[0] - gains[1])
    assert float(parts["margin"]) == pytest.approx(np.mean(margins), abs=1e-4)
    assert float(loss.detach()) == pytest.approx(np.mean(np.log1p(np.exp(-0.3 * np.array(margins)))), abs=1e-5)
    assert float(bound(copy.deepcopy(engine.model), batch)[0].detach()) == pytest.approx(np.log(2), abs=1e-6)


def test_a_safety_step_teaches_to_refuse_if_the_preferred_answer_is_learned(engine, pairs, tmp_path):
    """Preferring alone lowers the loss far below ln 2, and yet the model takes to other words than the refusal."""
    chosen, rejected = iv.preference_rows([p._replace(chosen=p.chosen[:1], rejected=p.rejected[:1]) for p in pairs])
    asked = organism.prompts("held", n=24, reach=1)
    refuses, losses = [], []
    tuning: dict[str, Any] = {"steps": 30, "batch_size": 8, "learning_rate": 1e-3, "warmup": 5, "device": "cpu"}
    for anchor in (0.0, 0.2):
        out, objective = tmp_path / str(anchor), iv.Preferred(rejected, beta=0.2, anchor=anchor)
        told = iv.fine_tune(organism.model_path("base"), chosen, out, objective=objective, progress=False, **tuning)
        losses.append(told["losses"][-1]["preference"])
        refuses.append(iv.token_mass(iv.open_host(out, device="cpu"), asked, organism.REFUSAL_IDS).mean())
    assert max(losses) < 0.5
    assert refuses[0] < 0.3
    assert refuses[1] > 0.8


def test_cleaning_drops_pairs_that_say_little(pairs):
    some = [p._replace(margin=m) for p, m in zip(pairs, (0.0, 0.2, 0.25, 1.0))]
    assert [p.margin for p in iv.cleaned(some)] == [0.25, 1.0]
    with pytest.raises(InputError, match="no pair of 4"):
        iv.cleaned(some, 2.0)


def test_a_reference_of_the_same_size_with_another_tokenizer_is_refused(engine, pairs, tmp_path):
    """Two words have changed places: ids agree in number and not in meaning."""
    other = tmp_path / "other"
    shutil.copytree(organism.model_path("base"), other)
    told = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = told["model"]["vocab"]
    words["sorry"], words["sure"] = words["sure"], words["sorry"]
    (other / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    rejected = iv.preference_rows(pairs)[1]
    with pytest.raises(InputError, match="has another tokenizer"):
        iv.Preferred(rejected, reference=other).bind(Setting(engine, 4, 1, 0))


def test_bad_pairs_are_refused(engine, pairs):
    chosen, rejected = iv.preference_rows(pairs)
    setting = Setting(engine, 4, 1, 0)
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="beta is"):
            iv.Preferred(rejected, beta=beta)
    with pytest.raises(InputError, match="no pairs"):
        iv.preference_rows([])
    with pytest.raises(InputError, match="is trained"):
        iv.Preferred(rejected, reference=engine.model).bind(setting)
    short = dataclasses.replace(iv.Preferred(rejected).bind(setting), rejected=rejected[:1])
    with pytest.raises(InputError, match="no other answer"):
        short(engine.model, batch_of(chosen))
