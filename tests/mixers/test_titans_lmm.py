"""Titans, the memory alone: the contract of a mixer, its formula, initial values, settings."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import TitansLMM
from seqzoo.nn.report import captured, gather
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

MAKE = functools.partial(TitansLMM, n_heads=2, head_dim=8, chunk=16)
SUBJECT = Subject(build=MAKE, d_model=16)
# A literal linear memory, nothing around it, and chunks longer than documents.
BARE = Subject(
    build=functools.partial(
        TitansLMM,
        n_heads=1,
        head_dim=4,
        chunk=40,
        memory_layers=1,
        memory_norm=False,
        d_conv=0,
        n_persistent=0,
        limit="none",
        output_gate="none",
    ),
    d_model=16,
)
FAST = (
    "constructor",
    "parameters",
    "decay",
    "one_graphdef",
    "built_abstractly",
    "state_bytes",
    "steps_equal_whole",
    "causal",
    "packed_streams",
    "packed_by_token",
)


@pytest.mark.parametrize(
    "promise", [pytest.param(p, marks=() if p in FAST else pytest.mark.slow) for p in PROMISES]
)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES)
def test_promise_otherwise(promise):
    result = check_promise(promise, BARE)
    assert result.outcome == "kept", result.detail


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def wide(variable):
    return np.asarray(variable[...], np.float64)


def test_formula():
    """Token by token in numpy, chunks of 2: a linear memory after two persistent tokens."""
    mixer = TitansLMM(
        8,
        n_heads=2,
        head_dim=4,
        chunk=2,
        memory_layers=1,
        memory_norm=False,
        n_persistent=2,
        limit="none",
        output_gate="silu",
        rngs=nnx.Rngs(0),
    )
    memory = mixer.memory
    memory.persistent[...] = 50 * memory.persistent[...]
    x = np.random.default_rng(0).normal(size=(5, 8))

    def inputs(x):
        y = np.pad(x @ wide(memory.inputs.proj.kernel), ((3, 0), (0, 0)))
        taps = wide(memory.inputs.conv.weight)
        y = sum(taps[i] * y[i : i + len(x)] for i in range(4))
        y = (y * sigmoid(y)).reshape(len(x), 2, 3, 4)
        unit = lambda y: y / np.sqrt(np.sum(y**2, -1, keepdims=True) + 1e-6)
        gates = sigmoid(np.einsum("td,dhg->thg", x, wide(memory.gates)) + wide(memory.gates_bias))
        return unit(y[:, :, 0]), unit(y[:, :, 1]), y[:, :, 2], gates

    w, s, said = wide(memory.w_out), 0.0, []
    theta_max = (1 - sigmoid(1.0)) / 2
    for part in (wide(memory.persistent), x):  # the persistent ones fill a chunk of their own
        q, k, v, gates = inputs(part)
        for t in range(len(part)):
            start = w if t % 2 == 0 else start
            alpha, eta, theta = np.moveaxis(gates[t], -1, 0)[..., None, None]
            error = np.einsum("hvk,hk->hv", start, k[t]) - v[t]
            s = eta * s - theta_max * theta * 2 * error[..., None] * k[t][:, None]
            w = (1 - alpha) * w + s
            said.append(np.einsum("hvk,hk->hv", w, q[t]))
    y = np.stack(said[2:])
    y = (y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5)).reshape(5, -1)
    gate = x @ wide(mixer.gate_proj.kernel)
    want = (y * gate * sigmoid(gate)) @ wide(mixer.out_proj.kernel)
    got, state = jax.jit(mixer.__call__)(jnp.asarray(x[None], jnp.float32))
    np.testing.assert_allclose(got[0], want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_allclose(state.memory.now.w_out[0], w, atol=2e-5 * np.abs(w).max())


def test_initial_values():
    mixer = TitansLMM(256, memory_layers=3, rngs=nnx.Rngs(0))
    memory = mixer.memory
    assert (mixer.memory.n_heads, memory.w_in.shape) == (4, (4, 256, 64))
    assert memory.w_hidden.shape == (4, 1, 256, 256)
    for w, both in ((memory.w_in, 320), (memory.w_out, 320), (memory.w_hidden, 512)):
        bound = math.sqrt(6 / both)
        assert 0.95 * bound < float(jnp.abs(w[...]).max()) <= bound
    taps = np.asarray(memory.inputs.conv.weight[...])
    assert np.abs(taps[-1].mean() - 1) < 0.01 and np.std(taps) == pytest.approx(0.433, abs=0.01)
    shares = sigmoid(np.asarray(memory.gates_bias[...][0]))
    np.testing.assert_allclose(shares, [0.018, 0.731, 0.5], atol=1e-3)
    assert memory.theta_max == pytest.approx((1 - 0.731) / 64, rel=1e-2)
    assert not np.any(memory.gamma[...])
    assert memory.persistent.shape == (4, 256)
    empty = TitansLMM(16, head_dim=8, empty_memory=True, use_momentum=False, rngs=nnx.Rngs(0))
    assert not np.any(empty.memory.w_out[...]) and np.any(empty.memory.w_in[...])
    assert empty.memory.theta_max == 1 / 64


def test_a_step_that_may_diverge_is_warned_of():
    with pytest.warns(UserWarning, match=r"theta_max is 0.1: above \(1 - eta\) / chunk = 0.01681"):
        MAKE(16, theta_max=0.1, rngs=nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAKE(16, theta_max=0.06, use_momentum=False, rngs=nnx.Rngs(0))
        MAKE(16, rngs=nnx.Rngs(0))


def test_it_tells_of_its_memory():
    graphdef, variables = nnx.split(MAKE(16, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 20, 16))
    ids = jnp.asarray([[1] * 20, [1] * 5 + [0] * 15], jnp.int32)
    call = lambda mixer, x: mixer(x, segment_ids=ids)
    run = lambda variables, x: captured(nnx.merge(graphdef, variables), call, x)
    (_, state), told = jax.jit(run)(variables, x)
    reports = gather([[{name: value[None] for name, value in told.items()}]])
    values = {name: float(value[0]) for name, value in reports.values.items()}
    assert set(values) == {
        f"memory_{name}"
        for name in ("forgetting", "momentum", "step_size", "surprise", "state_norm")
    }
    assert values["memory_forgetting"] == pytest.approx(0.018, abs=2e-3)
    assert values["memory_momentum"] == pytest.approx(0.73, abs=0.02)
    square = sum(np.sum(np.square(w), axis=(-1, -2)) for w in (state.memory.now[:2]))
    square = square + np.sum(np.square(state.memory.now.gamma), axis=-1)
    assert values["memory_state_norm"] == pytest.approx(np.sqrt(square).mean(), rel=1e-5)
    assert 0 < values["memory_surprise"] < values["memory_state_norm"]


def test_switches():
    """Without forgetting and momentum, the operator gets zeros; without a norm, no gamma."""
    mixer = MAKE(16, use_forgetting=False, use_momentum=False, memory_norm=False, rngs=nnx.Rngs(0))
    alpha, eta, theta = mixer.memory._gates(jnp.ones((1, 3, 16)))
    assert not np.any(alpha) and not np.any(eta) and np.all(theta > 0)
    assert mixer.memory.weights().gamma is None


@pytest.mark.slow
def test_keys_and_gradients_of_0():
    """x = 0: keys of length 0, and no way for a gradient to have a direction."""
    mixer = MAKE(16, limit="normalise", n_persistent=0, rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(mixer)
    loss = lambda v, x: jnp.sum(nnx.merge(graphdef, v)(x)[0] ** 2)
    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, jnp.zeros((1, 5, 16)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(n_heads=0), "n_heads is 0"),
        (dict(head_dim=0), "head_dim is 0"),
        (dict(chunk=0), "chunk is 0"),
        (dict(memory_layers=0), "memory_layers is 0"),
        (dict(memory_expand=0.3), "memory_expand is 0.3: it makes 2.4 inner channels"),
        (dict(d_conv=-1), "d_conv is -1"),
        (dict(n_persistent=-1), "n_persistent is -1"),
        (dict(theta_max=0.0), "theta_max is 0.0; it must be above 0"),
        (dict(limit="norm"), "limit is 'norm'; allowed: none, clip, normalise"),
        (dict(max_norm=0.0), "max_norm is 0.0"),
        (dict(activation="relu"), "activation is 'relu'; allowed: gelu, silu"),
        (dict(output_gate="relu"), "output_gate is 'relu'; allowed: linear, silu, none"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        MAKE(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_spread_over_eight_devices():
    """Each operator call stands in shard_map: results are those of one device."""
    graphdef, variables = nnx.split(MAKE(16, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.memory.now.w_in)

    run = jax.value_and_grad(loss, argnums=(0, 1))
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
