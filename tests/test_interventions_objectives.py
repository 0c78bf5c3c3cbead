"""What fine-tuning minimises, against closed forms, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import WORDS, random_model
from tuned_rows import ROWS, batch_of, bound, log_laws, opened

from markovsafety import InputError
from markovsafety.interventions.augment import Row
from markovsafety.interventions.batches import RowBatches
from markovsafety.interventions.objectives import Constrained, CrossEntropy, Distilled, as_tensors


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("other"), "llama", seed=1)


def test_cross_entropy_is_the_weighted_sum_over_the_constant(base):
    model = opened(base).model
    loss, parts = CrossEntropy()(model, batch_of(ROWS))
    expected = 0.0
    for r in ROWS:
        law = log_laws(model, r.tokens)
        expected -= r.weight * sum(law[t - 1, r.tokens[t]] for t in range(r.loss_from, len(r.tokens)))
    assert float(loss.detach()) == pytest.approx(expected / 7.0, rel=1e-5)
    assert float(parts["cross_entropy"]) == float(loss.detach())


BETAS = (0.5, 2.0, 0.0, 0.1)


def test_constrained_is_the_formula_token_by_token(base, other):
    engine = opened(base)
    objective = bound(Constrained(BETAS, reference=other), engine)
    loss, _ = objective(engine.model, batch_of(ROWS))
    reference, expected = opened(other).model, 0.0
    for r in ROWS:
        ours, theirs = log_laws(engine.model, r.tokens), log_laws(reference, r.tokens)
        for t in range(r.loss_from, len(r.tokens)):
            beta = BETAS[min(t - r.answer, 3)]
            delta = theirs[t - 1, r.tokens[t]] - ours[t - 1, r.tokens[t]]
            each = delta if beta == 0 else 2 / beta * (np.logaddexp(0, beta * delta) - np.log(2))
            expected += r.weight * each
    assert float(loss.detach()) == pytest.approx(expected / 7.0, rel=1e-5)


def gradient(objective, model, batch):
    model.zero_grad()
    objective(model, batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def test_constrained_begins_as_cross_entropy_and_ends_at_the_reference(base, other):
    """Its gradient is that of cross-entropy at the reference, and 2 sigmoid(beta delta) of it, token by token."""
    engine, batch = opened(base), batch_of(ROWS)
    start = bound(Constrained(BETAS), engine)
    assert float(start(engine.model, batch)[0].detach()) == 0.0
    plain = gradient(CrossEntropy(), engine.model, batch)
    assert torch.allclose(gradient(start, engine.model, batch), plain, atol=1e-6)
    away = bound(Constrained(BETAS, reference=other), engine)
    found = gradient(away, engine.model, batch)
    assert not torch.allclose(found, plain, atol=1e-2)
    weighted = torch.zeros_like(found)
    reference = opened(other).model
    for r in ROWS:
        ours, theirs = log_laws(engine.model, r.tokens), log_laws(reference, r.tokens)
        for t in range(r.loss_from, len(r.tokens)):
            delta = theirs[t - 1, r.tokens[t]] - ours[t - 1, r.tokens[t]]
            rate = 2 / (1 + np.exp(-BETAS[min(t - r.answer, 3)] * delta))
            alone = batch_of([Row(r.tokens[: t + 1], r.answer, t, r.weight)])
            weighted += rate * gradient(CrossEntropy(), engine.model, alone)
    assert torch.allclose(found, weighted, rtol=1e-4, atol=1e-5)


def test_constrained_by_finite_differences(base, other):
    engine, batch = opened(base), batch_of(ROWS)
    objective, model = bound(Constrained(BETAS, reference=other), engine), engine.model.double()
    objective.reference.double()
    slope, generator, step = gradient(objective, model, batch), torch.Generator().manual_seed(0), 1e-3
    way = torch.randn(len(slope), generator=generator, dtype=torch.float64)
    values = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(model.parameters()).detach() + sign * step * way, model.parameters()
        )
        values.append(float(objective(model, batch)[0].detach()))
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(model.parameters()).detach() - sign * step * way, model.parameters()
        )
    # logits are rounded to float32 before the softmax: 1e-7 / step of relative noise, and step^2 of curvature
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(slope @ way), rel=1e-2)


@pytest.mark.parametrize("on", ["response", "loss"])
@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_distilled_is_cross_entropy_and_the_divergence_from_the_teacher(base, other, on, heat):
    engine = opened(base)
    loss, parts = bound(Distilled(other, 0.7, heat, on), engine)(engine.model, batch_of(ROWS))
    teacher, expected = opened(other).model, 0.0
    for r in ROWS:
        with torch.no_grad():
            ours, theirs = (
                torch.log_softmax(m(input_ids=torch.tensor([r.tokens])).logits[0].double() / heat, -1).numpy()
                for m in (engine.model, teacher)
            )
        for t in range(r.answer if on == "response" else r.loss_from, len(r.tokens)):
            expected += r.weight * heat**2 * float(np.exp(theirs[t - 1]) @ (theirs[t - 1] - ours[t - 1]))
    entropy, _ = CrossEntropy()(engine.model, batch_of(ROWS))
    assert float(parts["kl"]) == pytest.approx(expected / 7.0, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(float(entropy.detach()) + 0.7 * expected / 7.0, rel=1e-5)


def test_rows_to_imitate_have_batches_and_a_constant_of_their_own(base, other):
    engine = opened(base)
    objective = bound(Distilled(other, rows=ROWS[1:4]), engine)
    own = RowBatches([r._replace(loss_from=r.answer) for r in ROWS[1:4]], 2, 3, 0)
    assert objective.batches == own
    _, parts = objective(engine.model, batch_of(ROWS[:1]))
    _, alone = bound(Distilled(other), engine)(engine.model, as_tensors(own[0]))
    assert float(parts["kl"]) == pytest.approx(float(alone["kl"]), rel=1e-6)


def test_the_teacher_is_frozen_and_of_the_same_tokenizer(base, other, tmp_path):
    engine = opened(base)
    teacher = bound(Distilled(other), engine).teacher
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    foreign = random_model(tmp_path / "foreign", "llama", vocab_size=len(WORDS) + 1)
    for wrong in (foreign, 3, engine.model):
        with pytest.raises(InputError, match="the teacher"):
            bound(Distilled(wrong), engine)
    with pytest.raises(InputError, match="temperature"):
        Distilled(other, temperature=0.0)
    with pytest.raises(InputError, match="beta"):
        Constrained(-1.0)
