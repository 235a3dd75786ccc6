"""Retention: the contract of a mixer, its formula, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import Retention
from seqzoo.mixers.retention import log_decays
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

SUBJECT = Subject(build=functools.partial(Retention, n_heads=2), d_model=16)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


def test_decays_are_those_of_the_paper():
    want = 1 - 2.0 ** (-5 - np.arange(8))
    np.testing.assert_allclose(np.exp(np.asarray(log_decays(8), np.float64)), want, rtol=1e-7)


def test_formula():
    """All pairs in numpy: turned by the distance, faded by it."""
    mixer = SUBJECT.build(16, rngs=nnx.Rngs(0))
    weight = lambda layer: np.asarray(layer.kernel[...], np.float64)
    x = np.random.default_rng(0).normal(size=(5, 16))
    q, k, v, gate = (
        (x @ weight(layer)).reshape(5, 2, -1)
        for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj)
    )
    # Pairs of channels as complex numbers.
    q, k = (a[..., :4] + 1j * a[..., 4:] for a in (q, k))
    frequency = 10000.0 ** (-np.arange(4) / 4)
    y = np.zeros((5, 2, 16))
    for i in range(5):
        for j in range(i + 1):
            turned = np.exp(1j * (i - j) * frequency)
            fade = (1 - 2.0 ** (-5 - np.arange(2))) ** (i - j)
            # q_i turned by i against k_j turned by j: Re(q conj(k) e^{i (i-j) w}).
            score = np.real(np.sum(q[i] * np.conj(k[j]) * turned, -1)) / np.sqrt(8)
            y[i] += (fade * score)[:, None] * v[j]
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5) * gate / (1 + np.exp(-gate))
    got, state = jax.jit(mixer.__call__)(jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(got[0], y.reshape(5, 32) @ weight(mixer.out_proj), atol=2e-5)
    assert int(state.count[0]) == 5


def test_positions_restart_with_documents():
    mixer = SUBJECT.build(16, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [0, 3, 3, 3, 3, 3]], jnp.int32)
    x = jnp.ones((2, 6, 16))
    _, state = jax.jit(mixer.__call__)(x, segment_ids=ids)
    np.testing.assert_array_equal(state.count, [3, 5])
    _, state = jax.jit(mixer.__call__)(x, segment_ids=jnp.full((2, 6), 3, jnp.int32), state=state)
    np.testing.assert_array_equal(state.count, [6, 11])


def test_parameter_count():
    d, h = 64, 4
    mixer = Retention(d, n_heads=h, rngs=nnx.Rngs(0))
    want = 2 * d * d + 3 * 2 * d * d + 2 * d // h
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param))) == want


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(n_heads=0), "n_heads is 0"),
        (dict(n_heads=3), "expand_k is 1.0: 16 channels .* do not make 3 heads"),
        (dict(n_heads=16), "expand_k is 1.0: queries of 1 channels per head cannot be turned"),
        (dict(n_residuals=0), "n_residuals is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        Retention(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 1, 8, 1)])
def test_spread_over_eight_devices(shape):
    """Each operator call stands in shard_map: outputs and gradients are those of one device."""
    graphdef, variables = nnx.split(Retention(32, n_heads=8, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 32))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.rule.s)

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(grad)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        lowered = jax.jit(lambda p, x: grad(p, x)).lower(params, jax.device_put(x, rows))
    assert "manual" in lowered.as_text()
    got = lowered.compile()(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
