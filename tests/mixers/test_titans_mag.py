"""Titans with memory as a gate: the contract of a mixer, its parts, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.mixers import SlidingWindowAttention, TitansMAG
from seqzoo.nn.persistent_attention import PersistentAttention
from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh
from seqzoo.testing import PROMISES, Subject, check_promise

MAKE = functools.partial(TitansMAG, n_heads=2, head_dim=8, chunk=16, window=10)
SUBJECT = Subject(build=MAKE, d_model=16)
# Wider than a chunk of the stream and than most documents; nothing persistent.
WIDE = Subject(
    build=functools.partial(
        TitansMAG,
        n_heads=1,
        head_dim=4,
        chunk=8,
        window=40,
        n_persistent=0,
        rope=False,
        memory_layers=1,
    ),
    d_model=16,
)
FAST = ("constructor", "one_graphdef", "state_bytes", "steps_equal_whole", "packed_by_token")
slow_but = lambda fast: [
    pytest.param(p, marks=() if p in fast else pytest.mark.slow) for p in PROMISES
]


@pytest.mark.parametrize("promise", slow_but(FAST))
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize("promise", slow_but(()))
def test_promise_of_a_wide_window(promise):
    result = check_promise(promise, WIDE)
    assert result.outcome == "kept", result.detail


def test_parts():
    """out = (norm(y) * sigmoid(norm(m))) W_o, y and m from the same x."""
    mixer = MAKE(16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))

    @jax.jit
    def run(x):
        opening, _ = mixer.memory.opening(None)
        m, _ = mixer.memory(x, opening=opening)
        y, _ = mixer.attention(x, persistent=mixer.memory.persistent_tokens())
        return mixer(x)[0], y, m

    got, y, m = map(np.asarray, run(x))

    def norm(a):
        heads = a.reshape(2, 9, 2, 8)
        return (heads / np.sqrt(np.mean(heads**2, -1, keepdims=True) + 1e-5)).reshape(a.shape)

    want = (norm(y) / (1 + np.exp(-norm(m)))) @ np.asarray(mixer.out_proj.kernel[...])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("persistent", [0, 3])
def test_attention(persistent):
    """By a masked softmax over everything, with packed documents."""
    layer = PersistentAttention(16, n_heads=2, head_dim=8, window=5, rope=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 90, 16))
    tokens = jax.random.normal(jax.random.key(1), (persistent, 16)) if persistent else None
    ids = np.asarray([[1] * 31 + [2] * 59, [0] * 2 + [1] * 80 + [0] * 8], np.int32)
    y, _ = jax.jit(lambda x: layer(x, persistent=tokens, segment_ids=jnp.asarray(ids)))(x)
    project = lambda x: np.moveaxis(
        np.asarray(x @ layer.inputs.proj.kernel[...]).reshape(*x.shape[:-1], 2, 3, 8), -2, 0
    )
    q, k, v = project(x)
    lag = np.arange(90)[:, None] - np.arange(90)
    seen = (lag >= 0) & (lag < 5) & (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None]
    powers = np.exp(np.einsum("bthk,bshk->bhts", q, k) / 8**0.5) * seen[:, None]
    top = np.einsum("bhts,bshk->bthk", powers, v)
    total = powers.sum(-1)
    if persistent:
        _, pk, pv = project(tokens)
        more = np.exp(np.einsum("bthk,nhk->bhtn", q, pk) / 8**0.5)
        top, total = top + np.einsum("bhtn,nhk->bthk", more, pv), total + more.sum(-1)
    want = top / np.maximum(np.moveaxis(total, 1, 2), 1e-30)[..., None]
    want = np.where((ids > 0)[..., None], want.reshape(2, 90, 16), 0)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_attention_turns_as_sliding_window_attention_does():
    mine = PersistentAttention(16, n_heads=2, head_dim=8, window=5, rngs=nnx.Rngs(0))
    other = SlidingWindowAttention(16, n_heads=2, window=5, rngs=nnx.Rngs(0))
    kernels = jnp.moveaxis(mine.inputs.proj.kernel[...].reshape(16, 2, 3, 8), 2, 0)
    for layer, kernel in zip((other.q_proj, other.k_proj, other.v_proj), kernels, strict=True):
        layer.kernel[...] = kernel.reshape(16, 16)
    other.out_proj.kernel[...] = jnp.eye(16)
    x = jax.random.normal(jax.random.key(0), (2, 70, 16))
    np.testing.assert_allclose(jax.jit(mine)(x)[0], jax.jit(other)(x)[0], atol=1e-5)


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(window=0), "window is 0; it must be at least 1"),
        (dict(attention_conv=-1), "attention_conv is -1; it must be at least 0"),
        (dict(head_dim=3), "head_dim is 3; it must be at least 1, and even with rope"),
        (dict(chunk=0), "chunk is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        MAKE(16, **keywords, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_spread_over_eight_devices():
    graphdef, variables = nnx.split(MAKE(16, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 37, 16))
    ids = jnp.asarray(np.where(np.arange(37) < 9, 1, 2)[None].repeat(8, 0), jnp.int32)

    def loss(variables, x):
        y, state = nnx.merge(graphdef, variables)(x, segment_ids=ids)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state.memory.memory.now.w_in)

    run = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(run)(nnx.as_pure(variables), x)
    mesh = jax.make_mesh((2, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    params = jax.device_put(nnx.as_pure(variables), param_shardings(variables, mesh))
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with use_mesh(mesh):
        got = jax.jit(lambda p, x: run(p, x))(params, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
