"""The inverse of unit lower triangular matrices, where a product of powers would fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core.triangular import inverse


def lower_of(keys, beta):
    return np.tril(beta * np.einsum("nik,njk->nij", keys, keys), -1).astype(np.float32)


@pytest.mark.parametrize("c", [1, 7, 16, 64])
def test_inverse(c):
    keys = np.random.default_rng(0).normal(size=(3, c, 8))
    lower = lower_of(keys / np.linalg.norm(keys, axis=-1, keepdims=True), 0.9)
    want = np.linalg.inv(np.eye(c) + lower.astype(np.float64))
    np.testing.assert_allclose(jax.jit(inverse)(lower), want, atol=3e-7)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_keys_alike(noise):
    """One key all along (entries of the powers reach 1e17), and keys of cosine about 0.8."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(4, 1, 16)) + noise * rng.normal(size=(4, 64, 16))
    lower = lower_of(keys / np.linalg.norm(keys, axis=-1, keepdims=True), 0.99)
    want = np.linalg.inv(np.eye(64) + lower.astype(np.float64))
    np.testing.assert_allclose(jax.jit(inverse)(lower), want, atol=1e-6)


def test_bad_size():
    with pytest.raises(ValueError, match="c is 48"):
        inverse(jnp.zeros((1, 48, 48)))
