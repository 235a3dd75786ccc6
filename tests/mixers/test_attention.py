"""Attention: the contract of a mixer, an oracle of masked sums, its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.mixers import Attention
from seqzoo.testing import PROMISES, STREAMS, Subject, check_promise

SUBJECT = Subject(
    build=functools.partial(Attention, n_heads=4, n_kv_heads=2, use_bias=True), d_model=16
)
BOTH_WAYS = Subject(
    build=functools.partial(Attention, n_heads=4, n_kv_heads=2, use_bias=True, causal=False),
    d_model=16,
)


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise):
    result = check_promise(promise, SUBJECT)
    assert result.outcome == "kept", result.detail


@pytest.mark.parametrize("promise", PROMISES)
def test_promise_of_an_encoder(promise):
    result = check_promise(promise, BOTH_WAYS)
    assert result.outcome == ("declined" if promise in STREAMS else "kept"), result.detail
    if promise in STREAMS:
        assert "sees later tokens" in result.detail or "looks both ways" in result.detail


@pytest.mark.parametrize("causal", [True, False])
def test_against_sums_in_float64(causal):
    """softmax(q k / sqrt(k)) v with explicit loops over heads, documents and positions."""
    mixer = Attention(12, n_heads=6, n_kv_heads=2, head_dim=4, causal=causal, rngs=nnx.Rngs(0))
    b, t = 2, 9
    x = np.random.default_rng(0).standard_normal((b, t, 12))
    ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 3, 3, 3]], np.int32)
    weight = lambda layer: np.asarray(layer.kernel[...], np.float64)
    project = lambda layer, h: (x @ weight(layer)).reshape(b, t, h, 4)
    q, k, v = project(mixer.q_proj, 6), project(mixer.k_proj, 2), project(mixer.v_proj, 2)
    want = np.zeros((b, t, 6, 4))
    for row in range(b):
        for i in np.flatnonzero(ids[row]):
            seen = (np.arange(t) <= i) | (not causal)
            mine = np.flatnonzero((ids[row] == ids[row, i]) & seen)
            place = mine - mine[0]
            for head in range(6):
                turned = lambda a, p: _turn(a, p)
                query = turned(q[row, i, head], i - mine[0])
                keys = [turned(k[row, j, head // 3], p) for j, p in zip(mine, place, strict=True)]
                score = np.array([query @ key for key in keys]) / 2.0
                weights = np.exp(score - score.max())
                want[row, i, head] = weights / weights.sum() @ v[row, mine, head // 3]
    want = want.reshape(b, t, 24) @ weight(mixer.out_proj)
    got, _ = mixer(jnp.asarray(x, jnp.float32), segment_ids=jnp.asarray(ids))
    np.testing.assert_allclose(got, want * (ids > 0)[..., None], atol=2e-6)


def _turn(a, position):
    half = a.shape[-1] // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    first, second = a[:half], a[half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ]
    )


def test_without_rope_only_the_mask_knows_the_order():
    mixer = Attention(16, n_heads=2, rope=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    swapped = x[:, jnp.array([2, 0, 1, 3, 4, 5])]
    np.testing.assert_allclose(mixer(x)[0][:, 5], mixer(swapped)[0][:, 5], atol=1e-6)


def test_a_full_cache_says_so():
    mixer = Attention(16, rngs=nnx.Rngs(0))
    state = mixer.init_state(1, max_length=2)
    x = jnp.ones((1, 3, 16))
    with pytest.raises(ValueError, match="3 tokens do not fit into a cache of 2"):
        mixer(x, state=state)
    _, state = mixer(x[:, :2], state=state)
    y, _ = mixer.step(x[:, 2], state)
    assert bool(jnp.isnan(y).all())
    with pytest.raises(ValueError, match="init_state needs max_length"):
        mixer.init_state(1)


@pytest.mark.parametrize("batch, n_kv_heads", [(1, 1), (1, 4), (3, 2)])
def test_steps_leave_the_cache_where_it_is(batch, n_kv_heads):
    """A loop of steps holds one cache: nothing as large is copied beside it."""
    mixer = Attention(64, n_heads=4, n_kv_heads=n_kv_heads, head_dim=64, rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(mixer)
    state = jax.eval_shape(lambda: mixer.init_state(batch, max_length=4096))

    def loop(variables, x, state):
        step = lambda state, x_t: nnx.merge(graphdef, variables).step(x_t, state)[::-1]
        return jax.lax.scan(step, state, x)

    x = jax.ShapeDtypeStruct((8, batch, 64), jnp.float32)
    compiled = jax.jit(loop, donate_argnums=2).lower(variables, x, state).compile()
    cache = state.k.size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 2


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(n_heads=3), "no multiple of n_heads"),
        (dict(n_heads=4, n_kv_heads=3), "must be a multiple of n_kv_heads"),
        (dict(head_dim=3), "head_dim is 3; it must be at least 1, and even with rope"),
        (dict(implementation="flash"), "allowed: null, xla, cudnn"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        Attention(16, **keywords, rngs=nnx.Rngs(0))
