"""GLA: the contract of a mixer, its formula, its initial values, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import GLA
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

# Decays near 1/2, so that an error in one shows.
SUBJECT = Subject(
    build=functools.partial(GLA, n_heads=2, gate_low_rank=3, gate_normalizer=1.0), d_model=16
)
WITH_CONV = Subject(build=functools.partial(SUBJECT.build, use_short_conv=True), d_model=16)
OF_STATE = ("state_structure", "state_bytes", "steps_go_on")


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize(
    "promise", [pytest.param(p, marks=() if p in OF_STATE else pytest.mark.slow) for p in PROMISES]
)
def test_promise_with_convolutions(promise):
    result = check_promise(promise, WITH_CONV)
    assert result.outcome == "kept", result.detail


def test_formula():
    """Token by token in numpy."""
    mixer = SUBJECT.build(16, rngs=nnx.Rngs(0))
    weight = lambda layer: np.asarray(layer.kernel[...], np.float64)
    x = np.random.default_rng(0).normal(size=(5, 16))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    q, k, v, gate = (
        (x @ weight(layer)).reshape(5, 2, -1)
        for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj)
    )
    decay = sigmoid(x @ weight(mixer.decay_down) @ weight(mixer.decay_up)).reshape(5, 2, 4)
    s, y = np.zeros((2, 4, 8)), np.zeros((5, 2, 8))
    for t in range(5):
        s = decay[t][..., None] * s + k[t][..., None] * v[t][:, None]
        y[t] = np.einsum("hkv,hk->hv", s, q[t]) / 2
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5) * gate * sigmoid(gate)
    got, state = jax.jit(mixer.__call__)(jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(got[0], y.reshape(5, 16) @ weight(mixer.out_proj), atol=2e-5)
    np.testing.assert_allclose(state.rule.s[0], s, atol=1e-5)


def test_parameter_count_is_that_of_the_source():
    d, h, rank = 64, 4, 16
    mixer = GLA(d, n_heads=h, gate_low_rank=rank, rngs=nnx.Rngs(0))
    want = 2 * d * d // 2 + 3 * d * d + rank * d + (rank + 1) * d // 2 + d // h
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param))) == want


def test_initial_values():
    mixer = GLA(256, n_residuals=4, rngs=nnx.Rngs(0))
    for layer, bound in (
        (mixer.q_proj, 1 / 16),
        (mixer.decay_down, 1 / 16),
        (mixer.decay_up, 1 / 4),
        (mixer.out_proj, 1 / 32),
    ):
        assert 0.95 * bound < float(jnp.abs(layer.kernel[...]).max()) <= bound
    np.testing.assert_array_equal(mixer.decay_up.bias[...], 0)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(n_heads=0), "n_heads is 0"),
        (dict(n_heads=3), "expand_k is 0.5: 8 channels .* do not make 3 heads"),
        (dict(expand_v=0.1), "expand_v is 0.1: 1 channels"),
        (dict(gate_normalizer=0), "gate_normalizer is 0"),
        (dict(gate_low_rank=0), "gate_low_rank is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        GLA(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "gradients", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "gradients"]
)
def test_spread_over_eight_devices(gradients):
    """Each operator call stands in shard_map: results are those of one device."""
    graphdef, variables = nnx.split(GLA(32, n_heads=4, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 32))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.rule.s)

    run = jax.value_and_grad(loss, argnums=(0, 1)) if gradients else loss
    want = jax.jit(run)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh((2, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        lowered = jax.jit(lambda p, x: run(p, x)).lower(params, jax.device_put(x, rows))
    assert "manual" in lowered.as_text()
    got = lowered.compile()(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
