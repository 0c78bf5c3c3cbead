"""The JAX engine: its numbers against transformers, its sampler against exact laws, its batching against one rollout at
a time."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llama_families import EOS, FAMILIES, VOCAB, job_of, old_spelling, random_contexts, torch_logits, write_tokenizer
from llama_families import engine as engine
from llama_families import family as family
from scipy.stats import chi2

from markovsafety.rollouts.engines import Engine, Job, open_engine, rollout_keys, uniforms
from markovsafety.rollouts.engines.llama_folder import read_config, read_weights

# -- the model's numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_agree_with_transformers(family, name):
    """Whole sequences padded on either side, and 40 cached steps behind prompts of different lengths, within 1e-4."""
    import jax
    import torch

    from markovsafety.rollouts.engines import jax_llama
    from markovsafety.rollouts.engines.jax_home import Home

    folder, model = family(name)
    config = read_config(folder)
    params = jax_llama.load_params(folder, config, np.float32, Home((jax.devices("cpu")[0],)))
    rng = np.random.default_rng(0)
    lengths = np.array([3, 11, 7])
    tokens = rng.integers(4, VOCAB, (3, 51)).astype(np.int32)
    truth = torch_logits(model, tokens)
    scale = np.abs(truth).max()
    assert scale > 2  # else agreement would say little
    mine = jax.jit(lambda t: jax_llama.forward(params, config, t))(tokens)
    np.testing.assert_allclose(mine, truth, atol=1e-4)

    place, _ = jax_llama._padding((3, 11), lengths, None, left=True)  # a rotary model hardly minds where a row begins
    assert place.positions[0].tolist() == [0] * 9 + [1, 2]
    padded = np.zeros((3, 11), np.int32)
    for row, length in enumerate(lengths):
        padded[row, 11 - length :] = tokens[row, :length]
    mask = (np.arange(11) >= 11 - lengths[:, None]).astype(np.int64)
    left = jax.jit(lambda t, n: jax_llama.forward(params, config, t, n, left=True))(padded, lengths)
    theirs = torch_logits(
        model,
        padded,
        attention_mask=torch.as_tensor(mask),
        position_ids=torch.as_tensor(np.maximum(mask.cumsum(1) - 1, 0)),
    )
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(left[row, 11 - length :], truth[row, :length], atol=1e-4)
        np.testing.assert_allclose(left[row, 11 - length :], theirs[row, 11 - length :], atol=1e-4)

    right = np.where(np.arange(11) < lengths[:, None], tokens[:, :11], 5).astype(np.int32)
    logits, cache = jax.jit(lambda t, n: jax_llama.prefill(params, config, t, n))(right, lengths)
    np.testing.assert_allclose(logits, truth[np.arange(3), lengths - 1], atol=1e-4)
    cache = tuple(np.pad(x, ((0, 0), (0, 0), (0, 53), (0, 0)), constant_values=9.0) for x in cache)
    step = jax.jit(lambda t, p, c: jax_llama.decode(params, config, t, p, c))
    for i in range(40):
        at = lengths + i
        logits, cache = step(tokens[np.arange(3), at], at.astype(np.int32), cache)
        np.testing.assert_allclose(logits, truth[np.arange(3), at], atol=1e-4)


@pytest.mark.parametrize("name", ["llama-linear", "llama-llama3"])
def test_both_spellings_of_rotary_scaling(family, tmp_path, name):
    raw = json.loads((family(name)[0] / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if not key.startswith("rope")}
    new = FAMILIES[name][1]
    old = old_spelling(new)
    older = {**old, "rope_scaling": {"type": old["rope_scaling"]["rope_type"], **old["rope_scaling"]}}
    del older["rope_scaling"]["rope_type"]
    read = []
    for options in (new, old, older, {"rope_theta": old["rope_theta"]}):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **options}))
        read.append(read_config(tmp_path))
    assert read[0] == read[1] == read[2] == read_config(family(name)[0])
    assert read[3].inv_freq != read[0].inv_freq


def test_shards_and_half_precision_files_load(family, tmp_path):
    import transformers

    folder, model = family("llama")
    whole = read_weights(folder, read_config(folder))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    parts = read_weights(tmp_path, read_config(tmp_path))
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[k], parts[k]) for k in whole)
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    write_tokenizer(tmp_path / "half")
    engine = open_engine("jax", tmp_path / "half", dtype="bfloat16")
    assert {x.dtype.name for x in engine.params["layers"][0].values()} == {"bfloat16"}


# -- random numbers ---------------------------------------------------------------------------------------------------


def test_uniforms_are_threefry():
    """Known answer of Random123 (threefry2x32, 20 rounds, all zero), and JAX's own generator elsewhere."""
    import jax.numpy as jnp
    from jax.extend.random import threefry_2x32

    from markovsafety.rollouts.engines.jax_sampling import _uniforms, split_keys

    assert uniforms(np.uint64(0), 0) == (0x6B200159 >> 8) * 2.0**-24
    keys = rollout_keys(5, np.arange(50), np.arange(50) % 7)
    for step in (0, 1, 63, 2**31):
        count = jnp.array([step, 0], jnp.uint32)
        theirs = [int(threefry_2x32(jnp.asarray(k), count)[0]) >> 8 for k in split_keys(keys)[:5]]
        assert np.array_equal(uniforms(keys[:5], step) * 2**24, theirs)
        assert np.array_equal(_uniforms(split_keys(keys), jnp.full(50, step, jnp.uint32)), uniforms(keys, step))


def test_keys_are_distinct_and_belong_to_their_coordinates():
    grid = rollout_keys(3, np.arange(40)[:, None], np.arange(50))
    assert len(np.unique(grid)) == grid.size
    assert grid[7, 9] == rollout_keys(3, 7, 9) != rollout_keys(3, 9, 7)
    assert rollout_keys(4, 7, 9) != grid[7, 9]
    assert not np.any(rollout_keys(3, np.arange(40)) == grid[:, 0])


# -- the sampler ------------------------------------------------------------------------------------------------------


def softmax(logits, temperature=1.0, top_p=1.0):
    """Float64 law after temperature and top_p, and the raw one."""
    raw = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    raw /= raw.sum(-1, keepdims=True)
    law = raw ** (1 / temperature)
    law /= law.sum(-1, keepdims=True)
    order = np.argsort(-law, axis=-1, kind="stable")
    falling = np.take_along_axis(law, order, -1)
    keep = np.zeros(law.shape, bool)
    np.put_along_axis(keep, order, falling.cumsum(-1) - falling < top_p, -1)
    law = np.where(keep, law, 0)
    return law / law.sum(-1, keepdims=True), raw


def chi_square(counts, expected, alarm=1e-9):
    """Pearson's statistic below the quantile with false-alarm rate `alarm`; cells below 10 expected are pooled."""
    assert counts[expected == 0].sum() == 0
    small = expected < 10
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], max(expected[small].sum(), 1e-300))
    if expected[-1] < 10:  # too little even together: join it to a large cell
        counts, expected = np.append(counts[:-2], counts[-2:].sum()), np.append(expected[:-2], expected[-2:].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(alarm, len(expected) - 1), (statistic, len(expected) - 1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.7, 1.0), (0.8, 0.9), (1.0, 0.6)])
def test_frequencies_follow_the_exact_law(family, engine, temperature, top_p):
    """First tokens and pairs of tokens, 20,000 rollouts; two chi-square tests of 1e-9 each make an alarm of 2e-9."""
    _, model = family("llama")
    n, some = 20_000, random_contexts(20, 5, 5)
    context = min(some, key=lambda c: torch_logits(model, c[None])[0, -1].max())  # many tokens have a chance
    job = job_of([context], n, seed=11, max_tokens=2, temperature=temperature, top_p=top_p)
    tokens = engine.run(dataclasses.replace(job, eos_ids=(), processed=False)).tokens
    pairs = np.array(tokens)
    first, _ = softmax(torch_logits(model, context[None])[0, -1], temperature, top_p)
    both = np.concatenate([np.tile(context, (VOCAB, 1)), np.arange(VOCAB)[:, None]], axis=1)
    second, _ = softmax(torch_logits(model, both)[:, -1], temperature, top_p)
    assert first.max() < 0.9
    chi_square(np.bincount(pairs[:, 0], minlength=VOCAB), n * first)
    cells = np.bincount(pairs[:, 0] * VOCAB + pairs[:, 1], minlength=VOCAB**2)
    chi_square(cells, n * (first[:, None] * second).ravel())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(-6, 6), min_size=6, max_size=6), st.floats(0, 1, exclude_max=True), st.floats(0.05, 0.999))
def test_one_pick_with_ties(levels, u, top_p):
    """Whole-number logits: equal ones go by the smaller id into the kept set, and the sum runs in the order of ids."""
    import jax

    from markovsafety.rollouts.engines.jax_sampling import Draw, _pick

    logits, u = np.array(levels, np.float32), np.float32(u)
    law, raw = softmax(logits, 1.0, top_p)
    falling = np.sort(softmax(logits)[0])[::-1].cumsum()
    assume(
        np.abs(falling - top_p).min() > 1e-5 and np.abs(law.cumsum() - u).min() > 1e-5
    )  # float32 decides closer ones
    pick = _jitted(jax.jit, _pick)
    record = pick(Draw("nucleus", True, 1), logits[None], u[None], np.eye(6, 1, dtype=np.float32), 1.0, top_p)
    token = int(record["token"][0])
    assert token == np.searchsorted(law.cumsum(), u, side="right")
    assert record["processed"][0] == pytest.approx(np.log(law[token]), abs=1e-5)
    assert record["logprob"][0] == pytest.approx(np.log(raw[token]), abs=1e-5)
    assert record["mass"][0, 0] == pytest.approx(law[0], abs=1e-5)


@lru_cache
def _jitted(jit, function):
    return jit(function, static_argnums=0)


def reference(model, job: Job, rollout: int):
    """One rollout sampled alone with torch's logits: tokens, raw and processed log-probabilities, class masses."""
    ids = [*job.prompts[job.prompt_of[rollout]].tolist(), *job.forced[rollout].tolist()]
    tokens, raw, processed, mass = [], [], [], []
    for step in range(job.max_tokens):
        logits = torch_logits(model, [ids])[0, -1]
        if job.temperature == 0:
            law, full = np.eye(VOCAB)[logits.argmax()], softmax(logits)[1]
        else:
            law, full = softmax(logits, job.temperature, job.top_p)
        token = int(np.searchsorted(law.cumsum(), uniforms(job.keys[rollout], step) * law.sum(), side="right"))
        tokens.append(token)
        raw.append(np.log(full[token]))
        processed.append(np.log(law[token]))
        mass.append([law[np.asarray(c)].sum() / law.sum() for c in job.classes.values()])
        ids.append(token)
        if token in job.eos_ids:
            break
    return tokens, raw, processed, mass


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0.0, 1.0)])
def test_each_rollout_is_what_its_key_says(family, engine, temperature, top_p):
    """Contexts of 2 to 44 tokens, caches of several lengths, slots refilled: the same as one rollout at a time.

    Tokens are compared exactly: float32 moves a cumulative sum by about 1e-6, so one token in a million could differ,
    and the seed is fixed. Recorded values carry the float32 of the logits (1e-4), not of the sampler.
    """
    _, model = family("llama")
    contexts = random_contexts(9, 2, 30, seed=4)
    forced = [np.arange(4, 4 + (i % 3) * 7, dtype=np.int32) for i in range(54)]
    classes = {"odd": np.arange(5, VOCAB, 2), "eos": np.array([EOS])}
    job = job_of(contexts, 6, forced=forced, max_tokens=50, temperature=temperature, top_p=top_p, classes=classes)
    output = engine.run(job)
    assert output.info["workers"] == 1 or output.info["batch"] < len(job)
    for i in range(0, 54, 2 if temperature == 1 else 7):
        tokens, raw, processed, mass = reference(model, job, i)
        skip = len(forced[i])
        assert output.tokens[i].tolist() == [*forced[i], *tokens]
        assert np.isnan(output.logprob[i][:skip]).all()
        np.testing.assert_allclose(output.logprob[i][skip:], raw, atol=1e-4)
        if job.raw:
            assert output.logprob_processed is None
        else:
            np.testing.assert_allclose(output.logprob_processed[i][skip:], processed, atol=3e-4)
        for c, name in enumerate(classes):
            assert np.isnan(output.mass[name][i][:skip]).all()
            np.testing.assert_allclose(output.mass[name][i][skip:], np.array(mass)[:, c], atol=1e-4)
    assert len({len(t) for t in output.tokens}) > 3 or temperature == 0


def test_batch_shard_and_order_change_nothing(family, engine):
    contexts = random_contexts(7, 2, 40, seed=2)
    job = job_of(contexts, 30, max_tokens=50)
    whole = engine.run(job)
    other = open_engine("jax", family("llama")[0], batch_size=48, workers=3).run(job)
    part = np.random.default_rng(0).permutation(len(job))[:70]
    shard = dataclasses.replace(
        job, prompt_of=job.prompt_of[part], forced=[job.forced[i] for i in part], keys=job.keys[part]
    )
    few = engine.run(shard)
    assert other.info["workers"] == 3
    assert all(np.array_equal(a, b) for a, b in zip(whole.tokens, other.tokens))
    assert all(np.array_equal(whole.tokens[i], few.tokens[k]) for k, i in enumerate(part))
    assert any(not np.array_equal(a, b) for a, b in zip(whole.tokens, engine.run(job_of(contexts, 30, seed=1)).tokens))


def test_endings(engine):
    """An answer ends at its first end-of-sequence id or at max_tokens, and never holds anything after."""
    job = job_of(random_contexts(5, 3, 9), 20, max_tokens=7, eos_ids=(EOS, 9, 30))
    seen = []
    output = engine.run(job, lambda rollouts, tokens: seen.append((rollouts, tokens)))
    for tokens in output.tokens:
        ends = np.isin(tokens, job.eos_ids)
        assert not ends[:-1].any()
        assert len(tokens) == 7 or ends[-1]
    assert {len(t) for t in output.tokens} > {1, 7}
    assert tuple(np.sum(seen, axis=0)) == (100, output.info["sampled_tokens"]) == (100, sum(map(len, output.tokens)))
    one = engine.run(dataclasses.replace(job, max_tokens=1))
    assert all(t.tolist() == w[:1].tolist() for t, w in zip(one.tokens, output.tokens))
    empty = engine.run(job_of([], 0))
    assert empty.tokens == []


def test_score_gives_the_recorded_numbers(family, engine):
    contexts = random_contexts(4, 2, 20, seed=8)
    forced = [np.arange(4, 4 + i % 5, dtype=np.int32) for i in range(20)]
    job = job_of(contexts, 5, forced=forced, classes={"low": np.arange(20)})
    sampled = engine.run(job)
    scored = engine.score(job, sampled.tokens)
    for i in range(20):
        np.testing.assert_allclose(scored.logprob[i], sampled.logprob[i], atol=1e-4)
        np.testing.assert_allclose(scored.mass["low"][i], sampled.mass["low"][i], atol=1e-4)
    assert all(np.isnan(x[: len(f)]).all() for x, f in zip(scored.logprob, forced))


def test_bfloat16_samples_nearly_the_same_law(family, engine):
    """Three digits of bfloat16 move log-probabilities by a tenth, not by one."""
    job = job_of(random_contexts(4, 4, 9), 8, max_tokens=6)
    short = open_engine("jax", family("llama")[0], dtype="bfloat16", batch_size=16)
    output = short.run(job)
    exact = engine.score(job, output.tokens)
    gap = np.concatenate(output.logprob) - np.concatenate(exact.logprob)
    assert 1e-4 < np.abs(gap).max() < 0.5
    assert short.describe()["dtype"] == "bfloat16"


def test_describe_and_protocol(engine):
    assert isinstance(engine, Engine)
    facts = json.loads(json.dumps(engine.describe()))
    assert facts["engine"] == "jax"
    assert facts["versions"]["jax"]
    assert len(facts["tokenizer_hash"]) == 64
