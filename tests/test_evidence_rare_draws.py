"""Tokens far below 1e-6 are drawn at their rate: plain float32 draws never see them, fine ones do."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from tiny import ids, random_model

from markovsafety.rollouts import sample
from markovsafety.rollouts.engines import Job, open_engine, rollout_keys, uniforms

SMALL = 1e-8
AT = 100  # the rare token's id, in the middle of the vocabulary
PLAIN = np.arange(2**24, dtype=np.float32) * np.float32(2.0**-24)  # every uniform that the plain draw can take


def logits() -> np.ndarray:
    law = np.full(200, (1 - SMALL) / 199)
    law[AT] = SMALL
    return np.log(law).astype(np.float32)


@functools.cache
def picker(fine: bool):
    import jax
    import jax.numpy as jnp

    from markovsafety.rollouts.engines.jax_sampling import Draw, _pick

    draw = Draw("raw", False, 0, fine)
    none = np.zeros((200, 0), np.float32)
    return jax.jit(lambda u: _pick(draw, jnp.tile(logits(), (len(u), 1)), u, none, 1.0, 1.0)["token"])


def near_the_rare_token() -> np.ndarray:
    """All plain uniforms within 1e-4 of where the rare token lies in the order of the ids."""
    edge = AT * (1 - SMALL) / 199
    return PLAIN[np.abs(PLAIN - edge) < 1e-4]


def test_plain_float32_never_draws_a_token_of_1e_8():
    tokens = np.asarray(picker(False)(near_the_rare_token()))
    assert {AT - 1, AT + 1} == set(tokens.tolist())


def test_a_fine_draw_gives_it_its_share_of_the_unit_interval():
    """The share is found by bisection over all float32 numbers, so it does not depend on luck."""
    low, high = np.float32(0), np.float32(1)
    for _ in range(60):
        middle = np.float32((low + high) / 2)
        low, high = (middle, high) if int(picker(True)(np.array([middle]))[0]) == AT else (low, middle)
    assert low == pytest.approx(SMALL, rel=1e-5)
    others = np.asarray(picker(True)(np.linspace(1e-7, 1, 4000).astype(np.float32)))
    assert AT not in others
    assert len(set(others.tolist())) == 199


def test_fine_uniforms_reach_far_below_plain_ones():
    """Of m uniforms the smallest lies below 20 / m but for e^-20 = 2e-9; plain ones stop at 2^-24 = 6e-8."""
    m = 4_000_000
    keys = rollout_keys(0, np.arange(m))
    fine, plain = uniforms(keys, 0, fine=True), uniforms(keys, 0)
    assert 0 < fine.min() < 20 / m
    assert len(np.unique(fine[fine < 1e-3] * 2.0**24 % 1)) > 1000  # digits below the plain grid
    assert (plain * 2.0**24 % 1 == 0).all()
    assert np.abs(fine - plain).max() < 2.0**-23  # the same hash, read further


def test_both_engines_share_the_fine_draw(tmp_path):
    """Ids agree between the engines, and with the order of the probabilities in float64."""
    folder = random_model(tmp_path / "model", "llama")
    n = 64
    keys = rollout_keys(3, np.arange(n))
    prompt = np.array(ids("hello sure"), np.int32)
    job = Job([prompt], np.zeros(n, np.int64), [prompt[:0]] * n, keys, 6, eos_ids=(2,), fine=True)
    ours, theirs = (open_engine(name, folder).run(job) for name in ("jax", "transformers"))
    assert all(np.array_equal(a, b) for a, b in zip(ours.tokens, theirs.tokens))
    plain = open_engine("jax", folder).run(Job(**{**vars(job), "fine": False}))
    assert any(not np.array_equal(a, b) for a, b in zip(ours.tokens, plain.tokens))


def test_jax_and_numpy_fine_uniforms_agree():
    import jax.numpy as jnp

    from markovsafety.rollouts.engines.jax_sampling import _uniforms, split_keys

    keys = rollout_keys(1, np.arange(50))
    made = _uniforms(split_keys(keys), jnp.full(50, 7, jnp.uint32), True)
    assert np.array_equal(made, uniforms(keys, 7, fine=True))


def test_sample_asks_for_fine_draws(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    options = {"n": 8, "max_tokens": 6, "progress": False}
    plain, fine = (sample(folder, ["hello sure"], **options, fine=fine) for fine in (False, True))
    assert plain != fine
    assert fine.provenance["sampling"]["fine"] is True
    assert "fine" not in plain.provenance["sampling"]  # folders of earlier runs go on
