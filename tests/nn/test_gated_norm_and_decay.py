"""Norms and decays around linear recurrences, against their formulas in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.nn.decay import SoftplusDecay
from seqzoo.nn.gated_norm import GatedRMSNorm, l2_norm


def test_l2_norm():
    x = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    want = x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(l2_norm(jnp.asarray(x)), want, rtol=2e-6)
    assert not np.any(l2_norm(jnp.zeros((2, 4))))
    assert l2_norm(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_gated_norm():
    rng = np.random.default_rng(0)
    x, gate = (rng.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(2))
    norm = GatedRMSNorm(4, eps=1e-3, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(4.0)
    plain = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-3) * np.arange(4)
    np.testing.assert_allclose(norm(jnp.asarray(x)), plain, rtol=2e-6)
    gated = plain * gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(norm(jnp.asarray(x), jnp.asarray(gate)), gated, rtol=1e-5, atol=1e-7)
    small = GatedRMSNorm(4, dtype="bfloat16", rngs=nnx.Rngs(0))
    assert small(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_gated_norm_in_groups():
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    norm = GatedRMSNorm(6, n_groups=2, eps=1e-3, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(6.0)
    parts = x.reshape(2, 3, 2, 3)
    want = parts / np.sqrt(np.mean(parts**2, -1, keepdims=True) + 1e-3)
    want = want.reshape(x.shape) * np.arange(6)
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=2e-6)
    with pytest.raises(ValueError, match="n_groups is 4"):
        GatedRMSNorm(6, n_groups=4, rngs=nnx.Rngs(0))


def test_decay_formula():
    decay = SoftplusDecay(3, rngs=nnx.Rngs(0))
    a = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    dt = np.log1p(np.exp(a + np.asarray(decay.dt_bias[...])))
    g = decay(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(g, -np.exp(decay.A_log[...]) * dt, rtol=1e-5)
    np.testing.assert_allclose(-decay.rates() * decay.step_sizes(jnp.asarray(a)), g, rtol=1e-6)
    assert decay(jnp.asarray(a, jnp.bfloat16)).dtype == jnp.float32


def test_decay_initial_values():
    decay = SoftplusDecay(512, rngs=nnx.Rngs(0))
    rates = np.exp(decay.A_log[...])
    assert 0 < rates.min() < 0.5 and 15.5 < rates.max() <= 16 and 7.5 < rates.mean() < 8.5
    dt = np.log1p(np.exp(np.asarray(decay.dt_bias[...], np.float64)))
    assert 0.99e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.101
    assert abs(np.log(dt).mean() - np.log(1e-2)) < 0.2
    low = SoftplusDecay(64, dt_min=1e-6, dt_max=1e-3, rngs=nnx.Rngs(0))
    assert np.log1p(np.exp(np.asarray(low.dt_bias[...], np.float64))).min() > 0.99e-4


@pytest.mark.parametrize(
    "keywords, message",
    [(dict(a_min=0.0), "a_min is 0.0"), (dict(dt_min=0.2), "dt_min is 0.2 and dt_max 0.1")],
)
def test_bad_decay(keywords, message):
    with pytest.raises(ValueError, match=message):
        SoftplusDecay(2, **keywords, rngs=nnx.Rngs(0))
