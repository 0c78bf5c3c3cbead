"""Reading and editing activations: exactly what was asked, where it was asked, and nothing left behind.

Random models of many families (transformers): no number here depends on what a model has learned.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect

import numpy as np
import pytest
import torch
from hosts import PROMPTS, add, folders, host, hosts, llama, vector
from tiny import EOS, WORDS

from markovsafety import Edit, InputError, read_rollouts, sample
from markovsafety.interventions import open_host
from markovsafety.interventions.edits import ANSWER, Part
from markovsafety.interventions.hooks import Attached, columns
from markovsafety.interventions.host import Host
from markovsafety.interventions.record import activations, head_outputs, laws, projections, token_mass
from markovsafety.rollouts.engines import Job, open_engine, rollout_keys
from markovsafety.rollouts.engines.transformers_batch import Batch

__all__ = ["folders", "host", "hosts", "llama"]  # fixtures


def whole(host, edit=None):
    """Residual stream at every token of the longest prompt, (levels, tokens, width)."""
    ids = host.prompt_ids(PROMPTS[2:])
    return activations(host, ids, range(len(ids[0])), edit=edit)[0]


# --- structure ---


def test_the_parts_are_found_in_every_family(host):
    config = host.engine.model.config
    assert host.layers == config.num_hidden_layers == 3
    assert host.heads == 4
    assert host.width == config.hidden_size
    assert len(set(map(id, host.mixers))) == 3
    assert activations(host, PROMPTS, (0, -1)).shape == (3, 4, 2, host.width)
    assert head_outputs(host, PROMPTS).shape == (3, 3, 4, host.head_dim)


def test_the_first_level_is_what_the_model_calls_hidden_state_zero(host):
    ids = host.prompt_ids(PROMPTS[2:])
    with torch.inference_mode():
        states = host.engine.model(torch.tensor(np.array(ids)), output_hidden_states=True).hidden_states
    seen = whole(host)
    for level in range(host.layers):  # the last entry of hidden_states is behind the final norm
        np.testing.assert_allclose(seen[level], states[level][0].numpy(), atol=1e-5)


# --- edits are exact ---


@pytest.mark.parametrize("level", range(4))
def test_an_addition_shows_at_its_positions_and_nowhere_else(host, level):
    """H2: +scale * vector at the slice, at its level; earlier levels and earlier positions do not move."""
    edit = add(host, level, where=(1, -1), scale=0.5)
    base, edited = whole(host), whole(host, edit)
    change = edited[level] - base[level]
    wanted = np.zeros_like(change)
    wanted[1:-1] = 0.5 * edit.parts[0].vector
    np.testing.assert_allclose(change, wanted, atol=2e-5)
    np.testing.assert_array_equal(edited[:level], base[:level])
    np.testing.assert_array_equal(edited[:, 0], base[:, 0])
    if level < host.layers:
        assert np.abs(edited[level + 1, -1] - base[level + 1, -1]).max() > 1e-3  # it does travel on


def test_projecting_out_leaves_nothing_along_the_vector(host):
    v = vector(host.width)
    edited = whole(host, Edit((Part("project", v, layer=1, where=(0, None)),)))
    base = whole(host)
    unit = v / np.linalg.norm(v)
    assert np.abs(edited[1] @ unit).max() < 1e-4 < np.abs(base[1] @ unit).max()
    np.testing.assert_allclose(edited[1], base[1] - np.outer(base[1] @ unit, unit), atol=1e-5)
    half = whole(host, Edit((Part("project", v, layer=1, scale=0.5, where=(0, None)),)))
    np.testing.assert_allclose(half[1] @ unit, 0.5 * (base[1] @ unit), atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_head_edit_is_its_slice_of_the_projection_added_to_the_stream(host, layer):
    """P3g: x[head slice] += delta is W_O[:, slice] delta on what attention adds."""
    head, delta = 2, vector(host.head_dim, 5)
    edited = whole(host, Edit((Part("head", delta, layer=layer, head=head, where=(-1, None)),)))
    mixer = host.mixers[layer]
    seen = []
    handle = mixer.register_forward_hook(lambda module, args, out: seen.append(out[0, -1].clone()))
    try:
        whole(host)
        with Attached(host, Edit((Part("head", delta, layer=layer, head=head),))).during(
            Batch.of(host.prompt_ids(PROMPTS[2:]), [np.zeros(0, np.int64)], left=False)
        ):
            whole(host)
    finally:
        handle.remove()
    weight = mixer.weight.detach()
    weight = weight.T if weight.shape[0] != host.width or hasattr(mixer, "nf") else weight  # GPT-2 stores it turned
    moved = weight[:, head * host.head_dim : (head + 1) * host.head_dim] @ torch.as_tensor(delta)
    np.testing.assert_allclose((seen[1] - seen[0]).numpy(), moved.numpy(), atol=1e-4)
    assert np.abs(edited[layer + 1, -1] - whole(host)[layer + 1, -1]).max() > 1e-3
    np.testing.assert_array_equal(edited[:, :-1], whole(host)[:, :-1])


def test_a_tilt_multiplies_the_law_and_normalises(host):
    b = vector(len(WORDS), 3, 1.0)
    base, edited = laws(host, PROMPTS)[:, 0], laws(host, PROMPTS, edit=Edit((Part("tilt", b, scale=-1.5),)))[:, 0]
    wanted = base - 1.5 * b
    wanted -= np.log(np.exp(wanted).sum(-1, keepdims=True))
    np.testing.assert_allclose(edited, wanted, atol=1e-4)


def test_a_tilt_with_rows_acts_on_the_first_tokens_only(llama):
    answers = [np.array([5, 6, 7, 8])] * 3
    b = np.stack([vector(len(WORDS), i, 1.0) for i in range(2)])
    base = laws(llama, PROMPTS, answers, last=5)
    edited = laws(llama, PROMPTS, answers, last=5, edit=Edit((Part("tilt", b),)))
    moved = np.abs(edited - base).max(axis=(0, 2)) > 1e-3
    assert moved.tolist() == [True, True, False, False, False]


def test_tables_of_a_tilt_are_made_once_for_a_batch(llama):
    ids = llama.prompt_ids(PROMPTS)
    batch = Batch.of(ids, [np.array([5, 6])] * 3, left=True)
    tilt = Edit((Part("tilt", np.ones(len(WORDS))), Part("tilt", np.ones((2, len(WORDS)))))) * 2.0
    with Attached(llama, tilt).during(batch) as change:
        seen = [change(torch.zeros(3, 1, len(WORDS)), batch.width - 3 + i)[:, 0, 0].tolist() for i in range(4)]
        kept = dict(change.kept)
        change(torch.zeros(3, 1, len(WORDS)), batch.width)
        assert all(change.kept[key] is kept[key] for key in change.kept)
        assert len(kept) == 2
    assert seen == [[4.0] * 3, [4.0] * 3, [2.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("when", ["prompt", "answer", "every"])
def test_when_says_which_positions_of_an_answer_are_edited(llama, when):
    answers = [np.array([5, 6, 7]), np.array([6, 7, 8]), np.array([9, 5, 5])]
    v = vector(llama.width)
    edit = Edit((Part("add", v, layer=llama.layers, where=(-1, None), when=when),))
    unit = v / (v @ v)
    base = projections(llama, PROMPTS, answers, {"v": (llama.layers, unit)})["v"]
    edited = projections(llama, PROMPTS, answers, {"v": (llama.layers, unit)}, edit=edit)["v"]
    prompt, answer = float(when != "answer"), float(when != "prompt")
    for a, b in zip(base, edited):
        np.testing.assert_allclose(b - a, [prompt, answer, answer], atol=1e-5)


def test_parts_act_in_their_order_and_scale(llama):
    v = vector(llama.width)
    first, second = Part("add", v, layer=1), Part("project", v, layer=1)
    gone = whole(llama, Edit((first, second)))[1, -1] @ v
    there = whole(llama, Edit((second, first)))[1, -1] @ v
    assert abs(gone) < 1e-3
    np.testing.assert_allclose(there, v @ v, rtol=1e-4)
    both = add(llama, 1) + add(llama, 2)
    assert [p.layer for p in (-2 * both).parts] == [1, 2]
    assert [p.scale for p in (-2 * both).parts] == [-2, -2]


def test_the_control_has_the_same_norms_and_another_direction():
    tilt = np.arange(12.0)
    edit = Edit((Part("add", vector(8), layer=1, scale=2), Part("tilt", tilt)))
    control = edit.control(3)
    a, b = edit.parts[0].vector, control.parts[0].vector
    np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(b), rtol=1e-6)
    assert abs(a @ b) < 0.9 * (a @ a)
    assert sorted(control.parts[1].vector) == sorted(tilt)
    assert control.parts[0].scale == 2
    np.testing.assert_array_equal(b, edit.control(3).parts[0].vector)


# --- generation ---


def drawn(engine, n=24, forced=(), max_tokens=6):
    prompts = [engine.tokenizer.prompt_ids(p) for p in PROMPTS]
    prompt_of = np.repeat(np.arange(len(prompts)), n)
    keys = rollout_keys(0, np.arange(len(prompt_of)))
    given = [np.array(forced[: i % (len(forced) + 1)], np.int32) for i in range(len(prompt_of))]
    return Job(prompts, prompt_of, given, keys, max_tokens, eos_ids=(EOS,))


@pytest.mark.parametrize("when", ["prompt", "answer", "every"])
def test_what_is_sampled_under_an_edit_is_what_a_plain_pass_under_it_says(host, when):
    """With left padding, a cache and prefills of unequal length the log-probabilities are those without any of it."""
    parts = (
        Part("add", vector(host.width, 1, 1.0), layer=1, where=(-2, None), when=when),
        Part("head", vector(host.head_dim, 2), layer=2, head=1, when=when),
        Part("project", vector(host.width, 3), layer=2, where=(0, None), when=when),
        Part("tilt", np.stack([vector(len(WORDS), i, 1.0) for i in range(3)])),
    )
    engine = host.engine.edited(Edit(parts))
    job = drawn(engine, forced=(5, 6, 7))
    out = engine.run(job)
    again = engine.score(job, out.tokens)
    plain = host.engine.score(job, out.tokens)
    for a, b in zip(out.logprob, again.logprob):
        np.testing.assert_allclose(a, b, atol=2e-3 if host.engine.model.config.model_type == "gemma2" else 2e-4)
    gap = max(np.nanmax(np.abs(a - b), initial=0) for a, b in zip(out.logprob, plain.logprob))
    assert gap > 0.05


def test_a_rollout_under_an_edit_does_not_depend_on_its_batch(llama):
    edit = add(llama, 1, where=(0, None), when="every")
    engine = llama.engine.edited(edit)
    job = drawn(engine, forced=(5, 6))
    alone = dataclasses.replace(engine, batch_size=5).run(job)
    for a, b in zip(engine.run(job).tokens, alone.tokens):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_left_behind(host):
    """H3: after an edit, and after one that broke off, hooks are gone and logits are the same bits."""
    ids = host.prompt_ids(PROMPTS)
    batch = Batch.of(ids, [np.zeros(0, np.int64)] * 3, left=False)
    before = host.forward(batch, logits=True)
    hooks = count_hooks(host)
    with Attached(host, add(host, 1)).during(batch):
        assert count_hooks(host) > hooks
        assert not torch.equal(host.forward(batch, logits=True), before)
    assert count_hooks(host) == hooks
    with pytest.raises(RuntimeError, match="on purpose"), Attached(host, add(host, 1)).during(batch):
        raise RuntimeError("on purpose")
    assert count_hooks(host) == hooks
    assert torch.equal(host.forward(batch, logits=True), before)


def count_hooks(host):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.engine.model.modules())


def test_a_batch_of_three_keeps_three_rows(host):
    """H1: behind the last block, whether a block returns a tensor or a tuple."""
    seen = activations(host, PROMPTS, (-1,), levels=[host.layers])
    alone = [activations(host, [p], (-1,), levels=[host.layers])[0] for p in PROMPTS]
    np.testing.assert_allclose(seen, np.stack(alone), atol=1e-4)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3


def test_touched_positions_are_counted(llama):
    ids = llama.prompt_ids(PROMPTS)
    batch = Batch.of(ids, [np.array([5, 6]), np.array([5]), np.zeros(0, np.int64)], left=False)
    touched: list[int] = []
    parts = (
        Part("add", vector(llama.width), layer=1, where=(0, None)),
        Part("add", vector(llama.width), layer=1, where=ANSWER, when="answer"),
        Part("add", vector(llama.width), layer=1, where=(-1, None), when="every"),
    )
    with Attached(llama, Edit(parts)).during(batch, touched):
        llama.forward(batch)
    assert touched == [sum(map(len, ids)), 3, 6]


def test_columns_cut_the_slice_at_the_prompt_as_python_does():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes, forced = rng.integers(1, 7, 3), rng.integers(0, 4, 3)
        batch = Batch.of([np.arange(n) for n in sizes], [np.arange(n) for n in forced], left=bool(rng.integers(2)))
        where = (int(rng.integers(-8, 8)), [None, int(rng.integers(-8, 8))][rng.integers(2)])
        if where[1] == 0 and where[0] != 0:
            continue  # an empty slice in Python; here 0 is the prompt's end unless both are 0
        for when in ("prompt", "answer", "every"):
            got = columns(Part("add", [1.0], where=where, when=when), batch, 0, batch.width + 2)
            for row in range(3):
                wanted = np.zeros(batch.width + 2, bool)
                prompt = np.arange(batch.begin[row], batch.answer[row])[slice(*where)]
                if when != "answer":
                    wanted[prompt] = True
                if when != "prompt":
                    wanted[batch.answer[row] : batch.end[row]] = wanted[batch.width :] = True
                np.testing.assert_array_equal(got[row], wanted)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt_neox"])
def test_bfloat16_takes_a_float32_vector(folders, kind):
    host = open_host(folders[kind], device="cpu", dtype="bfloat16")
    edit = add(host, 1) + Edit((Part("head", vector(host.head_dim), layer=1), Part("project", vector(host.width))))
    assert np.isfinite(laws(host, PROMPTS, edit=edit)).all()
    change = whole(host, add(host, 1, where=(0, None)))[1] - whole(host)[1]  # numbers around 30 have steps of 0.25
    np.testing.assert_allclose(change, np.broadcast_to(add(host, 1).parts[0].vector, change.shape), atol=0.3)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_lora_layers_are_found_and_edited(folders):
    peft = pytest.importorskip("peft")
    engine = open_engine("transformers", folders["llama"], device="cpu")
    config = peft.LoraConfig(target_modules=["o_proj", "q_proj"], r=2, lora_alpha=4, init_lora_weights=False)
    plain = Host.of(dataclasses.replace(engine, model=copy.deepcopy(engine.model)))
    host = Host.of(dataclasses.replace(engine, model=peft.get_peft_model(engine.model, config).eval()))
    assert type(host.mixers[0]).__module__.startswith("peft")
    assert np.abs(laws(host, PROMPTS) - laws(plain, PROMPTS)).max() > 1e-3
    change = whole(host, add(host, 1, where=(0, None)))[1] - whole(host)[1]
    np.testing.assert_allclose(change, np.broadcast_to(add(host, 1).parts[0].vector, change.shape), atol=1e-4)
    assert len(host.engine.edited(add(host, 1)).run(drawn(host.engine, 2)).tokens) == 6


def test_sampling_writes_the_edit_into_the_provenance_and_resumes_under_it_only(llama, folders, tmp_path):
    edit = add(llama, 1)
    options = {"n": 4, "max_tokens": 5, "engine": "transformers"}
    rolls = sample(folders["llama"], PROMPTS, edit=edit, out=tmp_path / "run", **options)
    assert rolls.provenance["engine"]["edit"]["sha256"] == edit.describe()["sha256"]
    assert "edit" not in sample(folders["llama"], PROMPTS, **options).provenance["engine"]
    again = sample(folders["llama"], PROMPTS, edit=edit, out=tmp_path / "run", **options)
    np.testing.assert_array_equal(again.tokens, rolls.tokens)
    with pytest.raises(InputError):
        sample(folders["llama"], PROMPTS, edit=2 * edit, out=tmp_path / "run", **options)
    np.testing.assert_array_equal(read_rollouts(tmp_path / "run").tokens, rolls.tokens)


def test_recording_equals_one_prompt_at_a_time(host):
    together = head_outputs(host, PROMPTS)
    np.testing.assert_allclose(together, np.concatenate([head_outputs(host, [p]) for p in PROMPTS]), atol=1e-4)
    mass = token_mass(host, PROMPTS, [5, 6])
    np.testing.assert_allclose(mass, np.exp(laws(host, PROMPTS)[:, 0, [5, 6]]).sum(-1), rtol=1e-5)


def test_laws_need_the_logits_of_the_last_columns_only(host):
    """Of prompts of one length a single column; with a large vocabulary all of them would be most of the memory."""
    made = []
    handle = host.engine.model.get_output_embeddings().register_forward_hook(lambda m, a, out: made.append(out.shape))
    ids = host.prompt_ids(PROMPTS[2:] * 2)
    found = laws(host, ids)[:, 0]
    handle.remove()
    batch = Batch.of(ids, [np.zeros(0, np.int64)] * len(ids), left=False)
    logits = host.forward(batch, logits=True)
    assert logits is not None
    np.testing.assert_allclose(found, torch.log_softmax(logits[:, -1].float(), -1).numpy(), atol=1e-4)
    keeps = "logits_to_keep" in inspect.signature(host.engine.model.forward).parameters  # OPT of 4.57 does not
    assert [shape[1] for shape in made] == [1 if keeps else len(ids[0])]
    assert keeps or host.engine.model.config.model_type == "opt"
