"""What encoders and MEGA need of a trunk: where norms stand, positions, mixers with a residual of
their own, vectors as input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.mixers import Attention, Mamba
from seqzoo.models import LanguageModel
from seqzoo.nn.block import Block
from seqzoo.nn.linear import NORMS
from seqzoo.nn.mlp import GELU
from seqzoo.nn.positions import LearnedPositions
from seqzoo.nn.stack import Stack

D = 16
MIXERS = {
    "mamba": functools.partial(Mamba, D, d_state=4),
    "attention": functools.partial(Attention, D, n_heads=2, rope=False),
}
POSITIONS = dict(positions="learned", max_positions=12)


def language_model(**keywords):
    settings = dict(d_model=D, n_layers=2, pattern=["mamba", "attention"], mixers=MIXERS)
    return LanguageModel(13, **{**settings, **keywords}, rngs=nnx.Rngs(0))


class Doubled(nnx.Module):
    """y = 2 x, as a mixer that owns the residual connection or not."""

    def __init__(self, owns):
        self.owns_residual = owns

    def __call__(self, x, *, segment_ids=None, state=None):
        return 2 * x, state

    def step(self, x_t, state):
        return 2 * x_t, state


@pytest.mark.parametrize(
    "owns, norm_place, want",
    [
        (False, "pre", lambda x, norm: x + 2 * norm(x)),
        (False, "post", lambda x, norm: norm(3 * x)),
        (True, "pre", lambda x, norm: 2 * x),
        (True, "post", lambda x, norm: 2 * x),
    ],
)
def test_where_a_block_normalises(owns, norm_place, want):
    make = functools.partial(Block, D, mixer=lambda rngs: Doubled(owns), rngs=nnx.Rngs(0))
    norm = NORMS["rmsnorm"](D, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, D))
    block = make(norm_place=norm_place)
    assert (block.mixer_norm is None) == owns
    np.testing.assert_allclose(block(x)[0], want(x, norm), rtol=1e-6)
    np.testing.assert_allclose(block.step(x[:, 0], None)[0], want(x, norm)[:, 0], rtol=1e-6)
    channel = make(norm_place=norm_place, channel_mixer=lambda rngs: lambda x: -x)(x)[0]
    mixed = want(x, norm)
    added = mixed - norm(mixed) if norm_place == "pre" else norm(0 * mixed)
    np.testing.assert_allclose(channel, added, atol=1e-6)


def test_scalenorm():
    norm = NORMS["scalenorm"](D, eps=0.5, dtype="bfloat16", rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(3.0)
    x = jax.random.normal(jax.random.key(0), (2, D))
    want = 3 * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 0.5)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype("float32"), want, rtol=1e-2)


def test_embeddings_are_scaled_placed_and_normalised(tokens_of):
    plain = language_model()
    model = language_model(embed_norm=True, embed_scale=4.0, norm="layernorm", **POSITIONS)
    tokens = tokens_of(2, 5)
    table, places = plain.embed.embedding[...], model.positions.embedding[...]
    np.testing.assert_array_equal(table, model.embed.embedding[...])
    want = 4 * table[tokens] + places[:5]
    want = want - want.mean(-1, keepdims=True)
    want = want / jnp.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(model.embedded(tokens), want, atol=1e-5)


def test_without_a_final_norm(compiled, tokens_of):
    model = language_model(final_norm=False)
    assert model.norm is None
    tokens = tokens_of(1, 4)
    want = model.stack(model.embedded(tokens)).x
    np.testing.assert_allclose(compiled(model, "hidden")(tokens)[0], want, atol=1e-5)


def test_streams_carry_the_position(compiled, tokens_of):
    model = language_model(**POSITIONS)
    tokens = tokens_of(2, 12)
    whole = compiled(model)(tokens)
    run, step = compiled(model, "run"), compiled(model, "step")
    state, parts = model.init_state(2, max_length=12), []
    assert model.state_bytes(12)["total"] * 2 == sum(a.nbytes for a in jax.tree.leaves(state))
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:9]):
        out = run(part, state=state, return_state=True)
        state = out.state
        parts.append(out.logits)
    apart, unrolled = model.unrolled(), model.unrolled_state(state)
    for t in (9, 10, 11):
        logits, state = step(tokens[:, t], state)
        parts.append(logits[:, None])
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
    np.testing.assert_allclose(apart.step(tokens[:, 9], unrolled)[0], whole[:, 9], atol=2e-5)
    assert bool(jnp.isnan(step(tokens[:, 0], state)[0]).all())  # behind the last position


def test_positions_restart_per_document(compiled, tokens_of):
    model = language_model(**POSITIONS)
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0], [0, 3, 3, 3, 3, 3, 3, 3]], jnp.int32)
    tokens, call = tokens_of(2, 8), compiled(model)
    packed = call(tokens, segment_ids=ids)
    for row, start, stop in ((0, 0, 4), (0, 4, 7), (1, 1, 8)):
        alone = call(tokens[row : row + 1, start:stop])[0]
        np.testing.assert_allclose(packed[row, start:stop], alone, atol=2e-5)
    run, state, parts = compiled(model, "run"), model.init_state(2, max_length=8), []
    for at in (0, 4):
        part = slice(at, at + 4)
        out = run(tokens[:, part], segment_ids=ids[:, part], state=state, return_state=True)
        state = out.state
        parts.append(out.logits)
    valid = np.asarray(ids) > 0
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[valid], packed[valid], atol=2e-5)


def test_longer_than_the_positions(tokens_of):
    with pytest.raises(ValueError, match="13 tokens has more places than model.max_positions=12"):
        language_model(**POSITIONS)(tokens_of(1, 13))
    positions = LearnedPositions(D, max_positions=3, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]], jnp.int32)  # one is too long
    rows, _ = positions(6, segment_ids=ids, state=None, batch=2)
    np.testing.assert_array_equal(rows[0], positions.embedding[...][jnp.array([0, 1, 2, 0, 1, 0])])
    np.testing.assert_array_equal(np.isnan(rows[1]).all(-1), [False] * 5 + [True])


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(positions="sine"), "positions is 'sine'; allowed: none, learned"),
        (dict(positions="learned"), "set max_positions"),
        (dict(positions="learned", max_positions=0), "max_positions is 0"),
        (dict(norm_place="middle"), "norm_place is 'middle'; allowed: pre, post"),
        (dict(input_dim=0), "input_dim is 0; it must be at least 1"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        language_model(**keywords)


def test_post_norm_stack_trains_every_parameter():
    stack = Stack(
        D,
        n_layers=2,
        pattern=["mamba"],
        mixers=MIXERS,
        channel_mixer=functools.partial(GELU, D),
        norm="scalenorm",
        norm_place="post",
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(stack)
    x = jax.random.normal(jax.random.key(0), (1, 5, D))
    loss = lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(x).x))
    for path, gradient in nnx.to_flat_state(nnx.as_pure(jax.jit(jax.grad(loss))(params))):
        assert bool(jnp.isfinite(gradient).all()) and float(jnp.abs(gradient).max()) > 0, path
