"""The convolution inside chunks against a double loop, whole and with documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqzoo.nn.chunk_conv import chunk_conv, toeplitz

ROW = np.array([-1] * 3 + [0] * 6 + [1] + [2] * 20 + [-1] * 2 + [3] * 8)


def test_toeplitz():
    kernel = np.random.default_rng(0).normal(size=(2, 5))
    want = np.zeros((2, 5, 5))
    for s in range(5):
        want[:, s, s:] = kernel[:, : 5 - s]
    np.testing.assert_array_equal(toeplitz(jnp.asarray(kernel, jnp.float32)), want.astype("f"))


@pytest.mark.parametrize("c", [40, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packed", [False, True])
def test_agrees(packed, c):
    """To 1e-12 in float64, both gradients by a random direction."""
    rng = np.random.default_rng(0)
    names = ROW[:40].reshape(-1, c) if packed else np.zeros((40 // c, c), int)
    x, dy = (rng.normal(size=(3, 1, 40 // c, c)) * (names >= 0) for _ in range(2))
    kernel = rng.normal(size=(3, c))
    sees = np.tri(c, dtype=bool) & (names[:, :, None] == names[:, None])
    lag = np.arange(c)[:, None] - np.arange(c)
    wide = np.where(sees, kernel[:, None][:, :, np.maximum(lag, 0)], 0)  # [d i t s]
    want = np.einsum("dits,dbis->dbit", wide, x)
    dx = np.einsum("dits,dbit->dbis", wide, dy)
    dkernel = np.stack(
        [np.einsum("its,dbit,dbis->d", sees & (lag == n), dy, x) for n in range(c)], axis=1
    )
    with jax.enable_x64(True):
        documents = jnp.asarray(names, jnp.int32)[None] if packed else None

        @jax.jit
        def run(x, k, dy):
            y, pull = jax.vjp(lambda x, k: chunk_conv(x, k, documents), x, k)
            return y, *pull(dy)

        found = tuple(map(np.asarray, run(*map(jnp.asarray, (x, kernel, dy)))))
    for got, expected in zip(found, (want, dx * (names >= 0), dkernel), strict=True):
        np.testing.assert_allclose(got * (names >= 0 if got.ndim == 4 else 1), expected, atol=1e-12)
