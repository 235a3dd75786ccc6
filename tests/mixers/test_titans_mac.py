"""Titans with memory as a context: the contract of a mixer, segments, an oracle in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import TitansMAC
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

MAKE = functools.partial(TitansMAC, n_heads=2, head_dim=4, chunk=8, segment=16, memory_layers=1)
SUBJECT = Subject(build=MAKE, d_model=16)
OTHER = Subject(
    build=functools.partial(
        TitansMAC,
        n_heads=1,
        head_dim=4,
        chunk=40,
        segment=40,
        n_persistent=0,
        rope=False,
        d_conv=0,
        memory_norm=False,
    ),
    d_model=16,
)
FAST = ("constructor", "one_graphdef", "state_bytes", "steps_equal_whole")


@pytest.mark.parametrize(
    "promise", [pytest.param(p, marks=() if p in FAST else pytest.mark.slow) for p in PROMISES]
)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES)
def test_promise_of_long_segments(promise):
    result = check_promise(promise, OTHER)
    assert result.outcome == "kept", result.detail


def test_formula():
    """Token by token in numpy: a linear memory with chunks of 1 and segments of 3."""
    mixer = TitansMAC(
        8,
        n_heads=2,
        head_dim=4,
        chunk=1,
        segment=3,
        memory_layers=1,
        memory_norm=False,
        limit="none",
        d_conv=0,
        n_persistent=2,
        rope=False,
        rngs=nnx.Rngs(0),
    )
    inside, memory = mixer.inside, mixer.inside.memory
    wide = lambda variable: np.asarray(variable[...], np.float64)
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    silu = lambda a: a * sigmoid(a)
    unit = lambda a: a / np.sqrt(np.sum(a**2, -1, keepdims=True) + 1e-6)
    rms = lambda a: a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-5)
    x = np.random.default_rng(0).normal(size=(8, 8))
    keys = lambda a: (a @ wide(inside.k_proj.kernel)).reshape(-1, 2, 4)
    values = lambda a: (a @ wide(inside.v_proj.kernel)).reshape(-1, 2, 4)
    asked = unit(silu(x @ wide(mixer.read.proj.kernel)).reshape(8, 2, 4))
    q = (x @ wide(mixer.q_proj.kernel)).reshape(8, 2, 4)
    w, s, outputs = wide(memory.w_out), 0.0, []
    theta_max = 1 - sigmoid(1.0)
    for t in range(8):
        if t % 3 == 0:
            segment, seen = w, [wide(inside.persistent)]
        h = rms(np.einsum("hvk,hk->hv", segment, asked[t])).reshape(1, -1)
        seen += [h @ wide(inside.h_proj.kernel), x[t : t + 1]]
        k, v = keys(np.concatenate(seen)), values(np.concatenate(seen))
        weights = np.exp(np.einsum("hk,shk->hs", q[t], k) / 2)
        y = np.einsum("hs,shk->hk", weights / weights.sum(-1, keepdims=True), v)
        flat = y.reshape(1, -1)
        mq, mk, mv = np.moveaxis(
            silu(flat @ wide(memory.inputs.proj.kernel)).reshape(2, 3, 4), 1, 0
        )
        mq, mk = unit(mq), unit(mk)
        gates = sigmoid(
            np.einsum("d,dhg->hg", flat[0], wide(memory.gates)) + wide(memory.gates_bias)
        )
        alpha, eta, theta = np.moveaxis(gates, -1, 0)[..., None, None]
        error = np.einsum("hvk,hk->hv", w, mk) - mv
        s = eta * s - theta_max * theta * 2 * error[..., None] * mk[:, None]
        w = (1 - alpha) * w + s
        m = np.einsum("hvk,hk->hv", w, mq)
        outputs.append((rms(y) * sigmoid(rms(m))).reshape(-1) @ wide(mixer.out_proj.kernel))
    got, state = jax.jit(mixer.__call__)(jnp.asarray(x[None], jnp.float32))
    want = np.stack(outputs)
    np.testing.assert_allclose(got[0], want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_allclose(state.carried.now.w_out[0], w, atol=2e-5 * np.abs(w).max())


@pytest.mark.slow
def test_attention_stays_in_its_segment():
    """Without the way through the memory, a segment is what it is alone."""
    mixer = MAKE(16, rngs=nnx.Rngs(0), d_conv=0)
    mixer.inside.h_proj.kernel[...] = 0 * mixer.inside.h_proj.kernel[...]
    seen = []
    combined = mixer.combined
    mixer.combined = lambda y, m: seen.append(y) or combined(y, m)
    x = jax.random.normal(jax.random.key(0), (1, 48, 16))
    mixer(x)
    for i in (0, 16, 32):
        mixer(x[:, i : i + 16])
    np.testing.assert_allclose(seen[0], np.concatenate(seen[1:], axis=1), atol=1e-6)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(segment=0), "segment is 0"),
        (dict(segment=12), "segment is 12 and chunk 8; segment must be a multiple of chunk"),
        (dict(head_dim=3), "head_dim is 3; it must be at least 1, and even with rope"),
        (dict(n_persistent=-1), "n_persistent is -1"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        MAKE(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_spread_over_eight_devices():
    """Operator calls inside the scan over segments stand in shard_map."""
    graphdef, variables = nnx.split(MAKE(16, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.carried.now.w_out)

    run = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(run)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh((2, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        got = jax.jit(lambda p, x: run(p, x))(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
