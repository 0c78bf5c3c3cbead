"""What decoding for a GPU adds to the JAX engine: a long vocabulary summed in blocks, attention by a kernel of JAX."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from markovsafety.rollouts.engines import jax_attention
from markovsafety.rollouts.engines.jax_sampling import BLOCK, LONG, _place


@pytest.mark.parametrize("size", [LONG, LONG + 3 * BLOCK + 17])
def test_long_rows_are_summed_in_blocks(size):
    """The token at which the exact cumulative sum passes the mark, up to float32; never one without probability."""
    rng = np.random.default_rng(size)
    weight = np.exp(3 * rng.normal(size=(6, size))).astype(np.float32)
    weight[1, rng.random(size) < 0.9] = 0
    weight[2] = 0
    weight[2, [5, BLOCK, size - 40]] = 1, 2, 1
    weight[3, : size - BLOCK - 9] = 0
    weight[4, 7 * BLOCK :] = 0
    exact = np.cumsum(weight, -1, dtype=np.float64)
    for u in (0.0, 1e-7, *rng.random(40), 1 - 2.0**-24):
        at = np.asarray(_place(jnp.asarray(weight), jnp.full(6, u, jnp.float32)))
        rows = np.arange(6)
        assert (weight[rows, at] > 0).all()
        mark, slack = np.float32(u) * exact[:, -1], 4e-6 * exact[:, -1]
        assert (exact[rows, at] > mark - slack).all()
        assert (exact[rows, at] - weight[rows, at] <= mark + slack).all()
    middle = np.asarray(_place(jnp.asarray(weight[2:3].repeat(4, 0)), jnp.array([0.2, 0.26, 0.7, 0.8], jnp.float32)))
    assert middle.tolist() == [5, BLOCK, BLOCK, size - 40]


def test_the_kernel_attends_as_plain_code_does():
    """JAX's kernel in its interpreter: rows of any length, heads in groups, whatever lies behind a row's end."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(3, 2, 2, 16)), jnp.bfloat16)
    keys, values = (rng.normal(size=(3, 2, 48, 16)) for _ in range(2))
    position = np.array([0, 21, 47], np.int32)
    keys[0, :, 1:], values[1, :, 22:] = 1e4, 1e4
    keys, values = jnp.asarray(keys, jnp.bfloat16), jnp.asarray(values, jnp.bfloat16)
    one = jax_attention.plain(q, keys, values, position)
    two = jax_attention.kernel(q, keys, values, position, interpret=True)
    assert one.dtype == two.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(two, np.float32), atol=0.03)
    np.testing.assert_allclose(
        np.asarray(two[0], np.float32), np.asarray(values[0, :, None, 0], np.float32).repeat(2, 1)
    )
