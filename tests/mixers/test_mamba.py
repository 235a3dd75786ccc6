"""Mamba: the contract of a mixer, its initial values, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import Mamba
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

SUBJECT = Subject(build=functools.partial(Mamba, d_state=4, use_bias=True), d_model=16)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


def test_parameter_count_is_that_of_the_card():
    d, n, w, r = 64, 16, 4, 4
    e = 2 * d
    want = 3 * d * e + e * (w + 1) + e * (r + 2 * n) + e * r + e + e * n + e
    mixer = Mamba(d, rngs=nnx.Rngs(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param))) == want


def test_initial_values():
    mixer = Mamba(256, dt_min=1e-3, dt_max=0.1, n_residuals=4, rngs=nnx.Rngs(0))
    dt = jax.nn.softplus(mixer.dt_bias[...])
    assert 9e-4 < float(dt.min()) < 2e-3 and 0.05 < float(dt.max()) < 0.101
    log_dt = np.log(np.asarray(dt))  # uniform in the logarithm
    assert abs(log_dt.mean() - np.log(1e-2)) < 0.15
    np.testing.assert_allclose(np.exp(mixer.A_log[...][7]), np.arange(1, 17), rtol=1e-6)
    np.testing.assert_array_equal(mixer.D[...], 1.0)
    for kernel, bound in (
        (mixer.in_proj.kernel, 256**-0.5),
        (mixer.conv.weight, 0.5),
        (mixer.x_proj.kernel, 512**-0.5),
        (mixer.dt_proj.kernel, 16**-0.5),
        (mixer.out_proj.kernel, (512 * 4) ** -0.5),
    ):
        assert 0.95 * bound < float(jnp.abs(kernel[...]).max()) <= bound


def test_step_sizes_never_start_below_the_floor():
    mixer = Mamba(64, dt_min=1e-6, dt_max=1e-3, dt_init_floor=1e-4, rngs=nnx.Rngs(0))
    assert float(jax.nn.softplus(mixer.dt_bias[...]).min()) > 0.99e-4


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(d_state=0), "d_state is 0"),
        (dict(expand=0), "expand is 0"),
        (dict(dt_rank="some"), "dt_rank is 'some'; it must be 'auto'"),
        (dict(dt_rank=0), "dt_rank is 0"),
        (dict(dt_min=0.2), "dt_min is 0.2 and dt_max 0.1"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        Mamba(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2, 1),  # has all that the others have
        pytest.param((8, 1, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 8, 1), marks=pytest.mark.slow),
    ],
)
def test_spread_over_eight_devices(shape):
    """Each operator call stands in shard_map: outputs and gradients are those of one device."""
    graphdef, variables = nnx.split(Mamba(16, d_state=4, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.scan.h) + jnp.sum(state.conv.x)

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
