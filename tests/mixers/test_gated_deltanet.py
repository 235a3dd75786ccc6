"""Gated DeltaNet: the contract of a mixer, its formula, its initial values, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import GatedDeltaNet
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

SUBJECT = Subject(
    build=functools.partial(GatedDeltaNet, n_heads=2, head_dim=4, use_conv_bias=True), d_model=16
)
# Values with heads of their own, no convolutions, beta up to 2.
OTHER = Subject(
    build=functools.partial(
        GatedDeltaNet,
        n_heads=1,
        n_v_heads=2,
        head_dim=4,
        use_short_conv=False,
        use_output_gate=False,
        allow_negative_eigenvalues=True,
    ),
    d_model=16,
)
OF_OTHER = ("state_structure", "state_bytes", "steps_go_on")


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize(
    "promise", [pytest.param(p, marks=() if p in OF_OTHER else pytest.mark.slow) for p in PROMISES]
)
def test_promise_otherwise(promise):
    result = check_promise(promise, OTHER)
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize("subject", [SUBJECT, OTHER], ids=["default", "otherwise"])
def test_formula(subject):
    """Token by token in numpy."""
    mixer = subject.build(16, rngs=nnx.Rngs(0))
    wide = lambda variable: np.asarray(variable[...], np.float64)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    x = np.random.default_rng(0).normal(size=(5, 16))
    h, other = 2, subject is OTHER

    def inputs(name):
        y = x @ wide(getattr(mixer, f"{name}_proj").kernel)
        if not other:
            conv = getattr(mixer, f"{name}_conv")
            padded = np.pad(y, ((3, 0), (0, 0)))
            taps = sum(wide(conv.weight)[i] * padded[i : i + 5] for i in range(4))
            y = taps + wide(conv.bias)
        return (y * sigmoid(y)).reshape(5, -1, 8 if name == "v" else 4)

    unit = lambda y: y / np.sqrt(np.sum(y**2, -1, keepdims=True) + 1e-6)
    spread = lambda y: np.repeat(y, h // y.shape[1], axis=1)
    q, k, v = spread(unit(inputs("q"))), spread(unit(inputs("k"))), inputs("v")
    beta = sigmoid(x @ wide(mixer.b_proj.kernel)) * (2 if other else 1)
    dt = np.log1p(np.exp(x @ wide(mixer.a_proj.kernel) + wide(mixer.decay.dt_bias)))
    decay = np.exp(-np.exp(wide(mixer.decay.A_log)) * dt)
    s, y = np.zeros((h, 4, 8)), np.zeros((5, h, 8))
    for t in range(5):
        s = decay[t][:, None, None] * s
        missing = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", s, k[t]))
        s = s + k[t][..., None] * missing[:, None]
        y[t] = np.einsum("hkv,hk->hv", s, q[t]) / 2
    y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5)
    if not other:
        gate = (x @ wide(mixer.gate_proj.kernel)).reshape(5, h, 8)
        y = y * gate * sigmoid(gate)
    want = y.reshape(5, -1) @ wide(mixer.out_proj.kernel)
    got, state = jax.jit(mixer.__call__)(jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(got[0], want, atol=2e-6 + 2e-5 * np.abs(want).max())
    np.testing.assert_allclose(state.rule.s[0], s, atol=1e-5 * np.abs(s).max())


def test_parameter_count_is_that_of_the_source():
    """About 6 d_model^2 where the heads make 3/4 of d_model."""
    d, h, k, v = 64, 3, 16, 32
    mixer = GatedDeltaNet(d, head_dim=k, rngs=nnx.Rngs(0))
    small = 2 * d * h + 2 * h + 4 * h * (2 * k + v) + v
    assert mixer.n_heads == h
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param))) == 6 * d * d + small
    )


@pytest.mark.parametrize("gain", [2**-2.5, 1.0])
def test_initial_values(gain):
    keywords = {} if gain == 2**-2.5 else dict(init_gain=gain)  # the authors' is the default
    mixer = GatedDeltaNet(256, n_heads=4, head_dim=64, **keywords, rngs=nnx.Rngs(0))
    xavier = lambda n: gain * (6 / n) ** 0.5
    for kernel, bound in (
        (mixer.q_proj.kernel, xavier(512)),
        (mixer.v_proj.kernel, xavier(256 + 512)),
        (mixer.out_proj.kernel, xavier(256 + 512)),
        (mixer.b_proj.kernel, xavier(260)),
        (mixer.k_conv.weight, 0.5),
    ):
        assert 0.95 * bound < float(jnp.abs(kernel[...]).max()) <= bound
    assert mixer.k_conv.bias is None
    np.testing.assert_array_equal(mixer.norm.scale[...], 1.0)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(n_heads=0), "n_heads is 0"),
        (dict(n_heads=2, n_v_heads=3), "n_heads is 2 and n_v_heads 3"),
        (dict(head_dim=0), "head_dim is 0"),
        (dict(head_dim=6, expand_v=1.25), "expand_v is 1.25: it makes 7.5 channels"),
        (dict(expand_v=0.0), "expand_v is 0"),
        (dict(d_conv=0), "d_conv is 0"),
        (dict(init_gain=0.0), "init_gain is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "gradients", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "gradients"]
)
def test_spread_over_eight_devices(gradients):
    """Each operator call stands in shard_map: results are those of one device."""
    graphdef, variables = nnx.split(GatedDeltaNet(32, n_heads=4, head_dim=4, rngs=nnx.Rngs(0)))
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
