"""Edits in the JAX engine are those of torch's hooks: the same laws, prompt, prefill and answer told apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from llama_families import VOCAB, family, job_of, random_contexts

from markovsafety import Edit, InputError, sample
from markovsafety.interventions import open_host
from markovsafety.interventions.edits import ANSWER, Part
from markovsafety.rollouts.engines import open_engine

__all__ = ["family"]  # a fixture


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def engines(request, family):
    folder = family(request.param)[0]
    return open_engine("jax", folder, batch_size=16), open_engine("transformers", folder, device="cpu"), folder


def vector(size, seed, scale=2.0):
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def parts(torch_engine, when):
    host = open_host(torch_engine)
    return (
        Part("add", vector(host.width, 1), layer=0, scale=0.5, where=(1, -1), when=when),
        Part("head", vector(host.head_dim, 2), layer=1, head=2, where=(-2, None), when=when),
        Part("project", vector(host.width, 3), layer=1, where=(0, None), when=when),
        Part("add", vector(host.width, 4), layer=2, where=(-1, None), when=when),
        Part("tilt", vector(VOCAB - 3, 5, 0.5), scale=-1),
    )


def forced_of(n):
    rng = np.random.default_rng(2)
    return [rng.integers(4, VOCAB, size=i % 4).astype(np.int32) for i in range(n)]


@pytest.mark.parametrize("when", ["prompt", "answer", "every"])
def test_both_engines_give_the_same_law_under_an_edit(engines, when):
    """Sampled by JAX with its caches, scored by both; the plain model says something else."""
    ours, theirs, _ = engines
    edit = Edit(parts(theirs, when))
    job = job_of(random_contexts(5, 3, 9), 8, forced=forced_of(40))
    out = ours.edited(edit).run(job)
    again = ours.edited(edit).score(job, out.tokens)
    torch_says = theirs.edited(edit).score(job, out.tokens)
    for a, b, c in zip(out.logprob, again.logprob, torch_says.logprob):
        np.testing.assert_allclose(a, b, atol=2e-3)
        np.testing.assert_allclose(a, c, atol=2e-3)
    plain = theirs.score(job, out.tokens)
    assert max(np.nanmax(np.abs(a - b), initial=0) for a, b in zip(out.logprob, plain.logprob)) > 0.05


@pytest.mark.parametrize("place", range(4))
def test_every_part_alone_agrees_with_torch(engines, place):
    ours, theirs, _ = engines
    part = parts(theirs, "every")[place]
    job = job_of(random_contexts(3, 3, 9), 6, forced=forced_of(18), max_tokens=6)
    for where in [(0, None), (-1, None), (1, 3), (-3, -1), (2, -9), ANSWER]:
        edit = Edit((dataclasses.replace(part, where=where),))
        said = ours.edited(edit).run(job)
        wanted = theirs.edited(edit).score(job, said.tokens)
        for a, b in zip(said.logprob, wanted.logprob):
            np.testing.assert_allclose(a, b, atol=2e-3)


def test_an_edit_of_nothing_changes_no_bit(engines):
    ours, theirs, _ = engines
    edit = Edit((Part("add", np.zeros(open_host(theirs).width), layer=1, when="every"),))
    job = job_of(random_contexts(3, 3, 9), 6)
    for a, b in zip(ours.run(job).tokens, ours.edited(edit).run(job).tokens):
        np.testing.assert_array_equal(a, b)


def test_sample_takes_the_engine_that_is_named(engines, tmp_path):
    _, theirs, folder = engines
    edit = Edit((Part("add", vector(open_host(theirs).width, 1), layer=1, when="every"),))
    options = {"n": 3, "max_tokens": 4, "edit": edit}
    asked = [{"prompt_tokens": c} for c in random_contexts(3, 3, 5)]
    said = [sample(folder, asked, engine=name, **options).provenance["engine"] for name in ("auto", "jax")]
    assert [s["name"] for s in said] == ["transformers", "jax"]
    assert said[0]["edit"] == said[1]["edit"] == edit.describe()


def test_what_it_does_not_have_is_refused(engines):
    ours, _, _ = engines
    with pytest.raises(InputError, match="no tilt that differs by answer token"):
        ours.edited(Edit((Part("tilt", np.ones((2, VOCAB))),)))
    with pytest.raises(InputError, match="does not fit the model"):
        ours.edited(Edit((Part("add", np.ones(7)),)))
    with pytest.raises(InputError, match="another model: its weights differ"):
        ours.edited(Edit((), model="0" * 64))
    with pytest.raises(InputError, match="edited already"):
        ours.edited(Edit(())).edited(Edit(()))
