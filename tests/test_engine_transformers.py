"""Engine transformers: its draws against exact laws, its numbers against a plain forward pass, and broken folders."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from tiny import EOS, WORDS, byte_tokenizer, ids, random_model

from markovsafety import InputError, ModelError, UntrustedError, sample
from markovsafety.rollouts import Rollouts
from markovsafety.rollouts.engines import Engine, Job, open_engine, rollout_keys
from markovsafety.rollouts.engines.replay import replay, score
from markovsafety.rollouts.engines.transformers import _choose

KINDS = ("qwen2", "gpt_neox")
PROMPTS = ["hello", "help one tea . step", "i cannot help"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: random_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def engine(request, folders):
    return open_engine("transformers", folders[request.param], device="cpu", batch_size=512)


def exact(engine, context):
    """The model's next-token probabilities by a plain forward pass in float64."""
    with torch.inference_mode():
        logits = engine.model(torch.tensor([list(context)])).logits[0, -1].double()
    return torch.softmax(logits, -1).numpy()


def tempered(law, temperature, top_p):
    """Temperature, then the smallest set of likeliest tokens that reaches top_p; written from the definition."""
    law = law ** (1 / temperature)
    law = law / law.sum()
    kept, total = np.zeros_like(law), 0.0
    for token in np.argsort(-law, kind="stable"):
        if total < top_p:
            kept[token] = law[token]
            total += law[token]
    return kept / kept.sum()


def surprise(counts, law):
    """Pearson's statistic over its critical value for a false alarm of 1e-8; rare tokens are pooled."""
    assert (counts[law == 0] == 0).all()
    expected = counts.sum() * law
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return ((seen - wanted) ** 2 / wanted).sum() / chi2.isf(1e-8, max(len(seen) - 1, 1))


def job_of(engine, n=1, *, prompts=PROMPTS, forced=(), **options):
    tokens = [engine.tokenizer.prompt_ids(p) for p in prompts]
    prompt_of = np.repeat(np.arange(len(tokens)), n)
    given = {"max_tokens": 8, "eos_ids": (EOS,), **options}
    keys = rollout_keys(0, np.arange(len(prompt_of)))
    return Job(tokens, prompt_of, [np.array(forced, np.int32)] * len(keys), keys, **given)


# --- what is drawn ---


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.7, 0.9)])
def test_frequencies_are_the_models(engine, temperature, top_p):
    """First token, and second token after each common first one: two simultaneous tests per case, each at 1e-8."""
    job = job_of(engine, 8000, prompts=PROMPTS[:1], max_tokens=2, temperature=temperature, top_p=top_p)
    drawn = engine.run(job).tokens
    law = tempered(exact(engine, job.prompts[0]), temperature, top_p)
    first = np.bincount([t[0] for t in drawn], minlength=len(WORDS))
    assert surprise(first, law) < 1
    assert surprise(first, np.roll(law, 1) + 1e-9) > 1  # the test can fail
    common = int(np.where(np.arange(len(WORDS)) == EOS, 0, first).argmax())
    law = tempered(exact(engine, [*job.prompts[0], common]), temperature, top_p)
    second = np.bincount([t[1] for t in drawn if t[0] == common], minlength=len(WORDS))
    assert surprise(second, law) < 1


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_impossible_tokens_are_never_drawn(top_p):
    """Also at the very ends of the unit interval, where rounding could point at a token without mass."""
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.5, -torch.inf]]).repeat(2, 1)
    ends = np.array([0.0, 1 - 2.0**-24], np.float32)
    token, logprob, drawn = _choose(scores, ends, 1.0, top_p)
    assert token[:, 0].tolist() == [1, 3 if top_p == 1 else 1]
    law = torch.softmax(scores[0], -1)
    assert logprob.exp().tolist() == pytest.approx([law[1].item(), law[3].item()] if top_p == 1 else [1, 1])
    assert drawn[0].tolist() == pytest.approx(law.tolist() if top_p == 1 else [0, 1, 0, 0, 0])


def test_zero_temperature_takes_the_likeliest(engine):
    job = job_of(engine, temperature=0.0)
    out = engine.run(job)
    for prompt, answer in zip(job.prompts, out.tokens):
        context = list(prompt)
        for token in answer:
            assert token == exact(engine, context).argmax()
            context.append(token)
    assert out.logprob_processed is not None
    assert all((values == 0).all() for values in out.logprob_processed)


def test_answers_end_where_they_should(engine):
    forced = ids("sure i")
    job = job_of(engine, 300, forced=forced, max_tokens=6)
    lengths = []
    for answer in engine.run(job).tokens:
        assert answer[:2].tolist() == forced
        sampled = answer[2:]
        assert 1 <= len(sampled) <= 6
        assert EOS not in sampled[:-1]
        assert sampled[-1] == EOS or len(sampled) == 6
        assert answer.dtype == np.int32
        lengths.append(len(sampled))
    assert len(set(lengths)) > 3
    endless = job_of(engine, 3, max_tokens=6, eos_ids=())
    assert {len(t) for t in engine.run(endless).tokens} == {6}


# --- what is recorded ---


def test_recorded_numbers_are_those_of_a_plain_forward_pass(engine):
    """To 1e-4 in float32: the cached and the whole pass sum in different orders."""
    classes = {"bad": np.array([12, 13]), "end": np.array([EOS])}
    job = job_of(engine, 5, forced=ids("sure"), classes=classes, temperature=0.8, top_p=0.9)
    out = engine.run(job)
    assert out.logprob_processed is not None
    for row, answer in enumerate(out.tokens):
        columns = [out.logprob[row], out.logprob_processed[row], out.mass["bad"][row], out.mass["end"][row]]
        assert all(len(c) == len(answer) and np.isnan(c[0]) and c.dtype == np.float32 for c in columns)
        for i in range(1, len(answer)):
            law = exact(engine, [*job.prompts[job.prompt_of[row]], *answer[:i]])
            drawn = tempered(law, 0.8, 0.9)
            truth = [np.log(law[answer[i]]), np.log(drawn[answer[i]]), drawn[[12, 13]].sum(), drawn[EOS]]
            assert np.allclose([c[i] for c in columns], truth, atol=1e-4)


def test_padding_and_batching_do_not_show(folders, engine):
    """The same key gives the same answer alone and beside longer prompts."""
    job = job_of(engine, 20)
    together = engine.run(job)
    kind = "qwen2" if "Qwen2" in engine.describe()["architecture"] else "gpt_neox"
    alone = open_engine("transformers", folders[kind], device="cpu", batch_size=1).run(job)
    assert [t.tolist() for t in together.tokens] == [t.tolist() for t in alone.tokens]
    assert np.allclose(np.concatenate(together.logprob), np.concatenate(alone.logprob), atol=1e-5)


def test_the_two_engines_speak_alike(folders):
    """Same columns, and the same keys give the same answers up to draws within rounding of a boundary."""
    options = {"n": 100, "max_tokens": 8, "prefill": 2, "prefix": ["sure step"] * 3, "classes": {"bad": [12, 13]}}
    options |= {"temperature": 0.9, "top_p": 0.95, "device": "cpu"}
    mine = sample(folders["qwen2"], PROMPTS, engine="transformers", **options)
    theirs = sample(folders["qwen2"], PROMPTS, engine="jax", **options)
    assert mine.columns.keys() == theirs.columns.keys()
    assert all(mine.columns[c].dtype == theirs.columns[c].dtype for c in mine.columns if c != "prompt_tokens")
    assert mine.provenance.keys() == theirs.provenance.keys()
    same = [np.array_equal(a, b) for a, b in zip(mine.answers(), theirs.answers())]
    assert np.mean(same) > 0.99
    mine, theirs = mine[np.array(same)], theirs[np.array(same)]
    for name in ("logprob", "logprob_processed", "mass_bad"):
        assert np.allclose(mine.columns[name], theirs.columns[name], atol=1e-4, equal_nan=True)
    assert mine.columns["prompt_tokens"] == theirs.columns["prompt_tokens"]


def test_scoring_gives_what_sampling_recorded(engine):
    rolls = sample(engine, PROMPTS, n=4, max_tokens=8, prefill=[0, 2], prefix=["sure i"] * 3, classes={"bad": [12]})
    bare = rolls.replace(columns={"prompt_tokens": rolls.columns["prompt_tokens"]})
    scored = score(bare, engine, {"bad": ["poison"]})
    for name in ("logprob", "mass_bad"):
        assert np.allclose(scored.columns[name], rolls.columns[name], atol=1e-4, equal_nan=True)
    assert np.array_equal(np.isnan(scored.columns["logprob"]), np.isnan(rolls.columns["logprob"]))
    log = [{"prompt": "hello", "text": "sure tea", "finish_reason": "stop"}, {"prompt": "hello", "text": ""}]
    logged = replay(log, scorer=engine)
    assert logged.tokens.tolist() == [*ids("sure tea"), EOS]
    law = exact(engine, [*ids("<bos> hello"), *ids("sure")])
    assert logged.columns["logprob"][1] == pytest.approx(np.log(law[ids("tea")[0]]), abs=1e-4)


def test_settings_that_come_with_a_model_do_not_bend_it(folders, tmp_path):
    shutil.copytree(folders["qwen2"], tmp_path / "m")
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 9.0, "eos_token_id": [EOS, 5]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(settings))
    plain, bent = (open_engine("transformers", f, device="cpu") for f in (folders["qwen2"], tmp_path / "m"))
    job = job_of(plain, 50)
    assert [t.tolist() for t in plain.run(job).tokens] == [t.tolist() for t in bent.run(job).tokens]
    assert bent.tokenizer.eos_ids == (EOS, 5)  # but what ends an answer is the model's to say


def test_auto_takes_transformers_for_other_architectures(folders):
    rolls = sample(folders["gpt_neox"], PROMPTS, n=3, max_tokens=4, prefill=[0, 1], prefix=["sure"] * 3, device="cpu")
    assert isinstance(rolls, Rollouts)
    assert rolls.provenance["engine"]["name"] == "transformers"
    assert rolls.provenance["engine"]["architecture"] == "GPTNeoXForCausalLM"
    assert rolls.provenance["model"]["weights"]["of"].startswith("name, size and all bytes")


def test_half_precision_and_progress(folders):
    engine = open_engine("transformers", folders["qwen2"], dtype="bfloat16", device="cpu", batch_size=4)
    assert isinstance(engine, Engine)
    seen = []
    out = engine.run(job_of(engine, 3), lambda rollouts, tokens: seen.append((rollouts, tokens)))
    assert np.sum(seen, axis=0).tolist() == [9, sum(map(len, out.tokens))]
    assert engine.describe()["dtype"] == "bfloat16"
    json.dumps(engine.describe())


def test_a_tokenizer_in_an_older_format_is_converted(folders, tmp_path):
    folder = random_model(tmp_path / "m", "qwen2", vocab_size=300)
    vocabulary = json.loads((byte_tokenizer(tmp_path / "b") / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "<|endoftext|>": len(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    engine = open_engine("transformers", folder, device="cpu")
    assert engine.tokenizer.decode(engine.tokenizer.encode("hé")) == "hé"
    assert engine.tokenizer.folder == str(folder)


# --- what cannot be used ---


def broken(folders, tmp_path, kind="qwen2"):
    shutil.copytree(folders[kind], tmp_path / "m")
    return tmp_path / "m"


def test_a_missing_or_half_written_folder(folders, tmp_path):
    for name in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/none"):
        with pytest.raises(ModelError, match="there is no model folder"):
            open_engine("transformers", name)
    folder = broken(folders, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_engine("transformers", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks weights"):
        open_engine("transformers", folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ModelError, match=r"lacks weights: model-1\.safetensors"):
        open_engine("transformers", folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        open_engine("transformers", folder)
    for name in ("../x.safetensors", "", "x" * 256):  # a file elsewhere, or none that there can be
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ModelError, match="is damaged") as caught:
            open_engine("transformers", folder)
        assert "no file of this folder" in caught.value.cause
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_engine("transformers", folder)


def test_weights_that_lack_a_parameter_are_not_filled_with_noise(folders, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = broken(folders, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: model\.layers\.1\.mlp\.up_proj\.weight"):
        open_engine("transformers", folder)


def test_a_tokenizer_of_another_model(folders, tmp_path):
    folder = broken(folders, tmp_path)
    byte_tokenizer(folder)
    with pytest.raises(ModelError, match="the tokenizer has ids up to 259, the model a vocabulary of 16"):
        open_engine("transformers", folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer that can be read"):
        open_engine("transformers", folder)


def test_what_is_no_causal_language_model(folders, tmp_path):
    folder = broken(folders, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        open_engine("transformers", folder)
    trap = {**config, "model_type": "trap", "auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}}
    (folder / "config.json").write_text(json.dumps(trap))
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(ModelError, match="brings Python code of its own"):
        open_engine("transformers", folder)
    assert not (tmp_path / "ran").exists()  # code that comes with a model is not run unasked


def test_nan_logits_are_an_error_that_keeps_the_rest(engine):
    job = job_of(engine, 4, max_tokens=3, forced=ids("sure"))
    small = engine.__class__(engine.model, engine.tokenizer, engine.path, engine.dtype, 4)
    calls = []

    def poison(module, args, kwargs, out):
        calls.append(1)
        if len(calls) > 3:
            out.logits[0, :, 5] = torch.nan
        return out

    handle = engine.model.register_forward_hook(poison, with_kwargs=True)
    try:
        with pytest.raises(UntrustedError, match="NaN") as caught:
            small.run(job)
        with pytest.raises(UntrustedError, match="NaN"):
            small.score(job, [np.array(ids("sure tea"), np.int32)] * len(job))
    finally:
        handle.remove()
    sizes = [len(tokens) for tokens in caught.value.partial.tokens]
    assert 4 <= np.count_nonzero(sizes) < len(job)
    assert all(size == 0 or size > 1 for size in sizes)
    assert [len(v) for v in caught.value.partial.logprob] == sizes


def test_what_does_not_fit_the_model(folders):
    engine = open_engine("transformers", folders["qwen2"], device="cpu")
    for options, says in [
        ({"max_tokens": 64}, "leave no room for 64"),
        ({"prefill": 2, "prefix": [["sure"]]}, "prefix"),
        ({"prefill": 2, "prefix": [[EOS, 5]]}, "the first token that would end the answer"),
    ]:
        with pytest.raises(InputError) as caught:
            sample(engine, ["hello"], **{"n": 1, "max_tokens": 4, **options})
        assert says in str(caught.value)
    job = job_of(engine, forced=[5, EOS])
    with pytest.raises(InputError, match="prefill ends the turn"):
        engine.run(job)
    for options, says in [
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "abacus"}, "no device 'abacus'"),
    ]:
        with pytest.raises(InputError, match=says):
            open_engine("transformers", folders["qwen2"], **options)


def test_without_torch_the_error_says_what_to_install(folders, monkeypatch):
    monkeypatch.delitem(sys.modules, "markovsafety.rollouts.engines.transformers")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelError, match="needs the package 'torch'") as caught:
        open_engine("transformers", folders["qwen2"])
    assert "markovsafety[models]" in caught.value.next
