"""Mamba2: the contract of a mixer, its formula, its initial values, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import Mamba2
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

# Four heads of 8 channels, two of them to a B and C.
SUBJECT = Subject(
    build=functools.partial(Mamba2, d_state=4, head_dim=8, n_groups=2, use_bias=True), d_model=16
)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


def test_formula():
    """Token by token in numpy, as the source's step computes it."""
    mixer = Mamba2(16, d_state=4, head_dim=8, n_groups=2, rngs=nnx.Rngs(0))
    mixer.norm.scale[...] = jnp.linspace(0.5, 1.5, 32)
    mixer.D[...] = jnp.linspace(-1, 1, 4)
    array = lambda value: np.asarray(value[...], np.float64)
    x = np.random.default_rng(0).normal(size=(6, 16))
    silu = lambda a: a / (1 + np.exp(-a))

    def convolve(layer, a):
        weight = array(layer.weight)
        padded = np.pad(a, ((3, 0), (0, 0)))
        return silu(sum(weight[i] * padded[i : i + 6] for i in range(4)) + array(layer.bias))

    z, xs = np.split(x @ array(mixer.in_proj.kernel), 2, axis=1)
    u = convolve(mixer.conv, xs).reshape(6, 4, 8)
    B, C = np.split(convolve(mixer.bc_conv, x @ array(mixer.bc_proj.kernel)), 2, axis=1)
    B, C = (np.repeat(a.reshape(6, 2, 4), 2, axis=1) for a in (B, C))  # for each head
    dt = np.log1p(np.exp(x @ array(mixer.dt_proj.kernel) + array(mixer.decay.dt_bias)))
    decay = np.exp(-np.exp(array(mixer.decay.A_log)) * dt)
    s, y = np.zeros((4, 4, 8)), np.zeros((6, 4, 8))
    for t in range(6):
        s = decay[t][:, None, None] * s + B[t][..., None] * (dt[t][:, None] * u[t])[:, None]
        y[t] = np.einsum("hnp,hn->hp", s, C[t]) + array(mixer.D)[:, None] * u[t]
    y = (y.reshape(6, 32) * silu(z)).reshape(6, 2, 16)
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5)
    want = y.reshape(6, 32) * np.linspace(0.5, 1.5, 32) @ array(mixer.out_proj.kernel)
    got, state = jax.jit(mixer.__call__)(jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(got[0], want, atol=2e-5)
    np.testing.assert_allclose(state.ssm.s[0], s, atol=1e-5)


def test_parameter_count_is_that_of_the_source():
    d, n, p = 64, 16, 32
    e, h = 2 * d, 2 * d // p
    want = d * (2 * e + 2 * n + h) + 5 * (e + 2 * n) + 3 * h + e + e * d
    mixer = Mamba2(d, d_state=n, head_dim=p, rngs=nnx.Rngs(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param))) == want


def test_initial_values():
    mixer = Mamba2(256, d_state=16, head_dim=1, n_residuals=4, rngs=nnx.Rngs(0))
    dt = jax.nn.softplus(mixer.decay.dt_bias[...])
    assert 9e-4 < float(dt.min()) < 2e-3 and 0.05 < float(dt.max()) < 0.101
    rates = mixer.decay.rates()
    assert 1 <= float(rates.min()) < 1.5 and 15.5 < float(rates.max()) < 16.001
    np.testing.assert_array_equal(mixer.D[...], 1.0)
    for kernel, bound in (
        (mixer.in_proj.kernel, 1 / 16),
        (mixer.bc_proj.kernel, 1 / 16),
        (mixer.conv.weight, 0.5),
        (mixer.out_proj.kernel, (512 * 4) ** -0.5),
    ):
        assert 0.95 * bound < float(jnp.abs(kernel[...]).max()) <= bound


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(d_state=0), "d_state is 0"),
        (dict(head_dim=5), "head_dim is 5; it must divide expand \\* d_model = 32"),
        (dict(head_dim=8, n_groups=3), "n_groups is 3; it must divide the number of heads, .* = 4"),
        (dict(head_dim=8, a_min=0.0), "a_min is 0.0"),
        (dict(head_dim=8, dt_min=0.2), "dt_min is 0.2 and dt_max 0.1"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "shape, groups, gradients",
    [
        ((1, 1, 8, 1), 1, False),
        *(
            pytest.param(shape, groups, True, marks=pytest.mark.slow)
            for shape, groups in (
                ((1, 1, 8, 1), 1),
                ((2, 2, 2, 1), 2),
                ((8, 1, 1, 1), 1),
                ((1, 2, 4, 1), 1),
            )
        ),
    ],
)
def test_spread_over_eight_devices(shape, groups, gradients):
    """Each operator call stands in shard_map: results are those of one device."""
    mixer = Mamba2(32, d_state=4, head_dim=8, n_groups=groups, rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (8, 37, 32))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.ssm.s) + jnp.sum(state.bc_conv.x)

    run = jax.value_and_grad(loss, argnums=(0, 1)) if gradients else loss
    want = jax.jit(run)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        lowered = jax.jit(lambda p, x: run(p, x)).lower(params, jax.device_put(x, rows))
    assert "manual" in lowered.as_text()
    got = lowered.compile()(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


def test_groups_that_cannot_be_spread():
    mixer = Mamba2(32, d_state=4, head_dim=8, n_groups=2, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((1, 1, 8, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with use_mesh(mesh), pytest.raises(ValueError, match="'heads' of 2 is no multiple of 8"):
        jax.eval_shape(lambda x: mixer(x)[0], jnp.zeros((1, 3, 32)))
