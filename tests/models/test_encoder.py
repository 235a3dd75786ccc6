"""What encoders and MEGA need of a trunk: where norms stand, positions, mixers with a residual of
their own, vectors as input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.errors import ConfigError
from seqzoo.eval import describe
from seqzoo.eval.generate import generate
from seqzoo.mixers import Attention, Mamba
from seqzoo.models import Classifier, LanguageModel, MaskedLanguageModel
from seqzoo.nn.block import Block
from seqzoo.nn.linear import NORMS
from seqzoo.nn.mlp import GELU
from seqzoo.nn.stack import Stack
from seqzoo.tasks import Classification

D = 16
MIXERS = {
    "mamba": functools.partial(Mamba, D, d_state=4),
    "attention": functools.partial(Attention, D, n_heads=2, rope=False),
}
POSITIONS = dict(positions="learned", max_positions=12)


def language_model(**keywords):
    settings = dict(d_model=D, n_layers=2, pattern=["mamba", "attention"], mixers=MIXERS)
    return LanguageModel(13, **{**settings, **keywords}, rngs=nnx.Rngs(0))


def compiled(model, method="__call__"):
    """A method as one compiled program; run eagerly, each operation would compile alone."""
    graphdef, variables = nnx.split(model)
    static = ("return_state",) if method == "run" else ()
    call = lambda variables, *args, **kw: getattr(nnx.merge(graphdef, variables), method)(
        *args, **kw
    )
    return functools.partial(jax.jit(call, static_argnames=static), variables)


def tokens_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 13, shape), jnp.int32)


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


def test_embeddings_are_scaled_placed_and_normalised():
    plain = language_model()
    model = language_model(embed_norm=True, embed_scale=4.0, norm="layernorm", **POSITIONS)
    tokens = tokens_of(2, 5)
    table, places = plain.embed.embedding[...], model.positions.embedding[...]
    np.testing.assert_array_equal(table, model.embed.embedding[...])
    want = 4 * table[tokens] + places[:5]
    want = want - want.mean(-1, keepdims=True)
    want = want / jnp.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(model.embedded(tokens), want, atol=1e-5)


def test_without_a_final_norm():
    model = language_model(final_norm=False)
    assert model.norm is None
    tokens = tokens_of(1, 4)
    want = model.stack(model.embedded(tokens)).x
    np.testing.assert_allclose(compiled(model, "hidden")(tokens)[0], want, atol=1e-5)


def test_streams_carry_the_position():
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


def test_positions_restart_per_document():
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


def test_longer_than_the_positions():
    with pytest.raises(ValueError, match="13 tokens has more places than model.max_positions=12"):
        language_model(**POSITIONS)(tokens_of(1, 13))


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


def encoder(mixer="attention", **keywords):
    """A masked language model whose tokens see both ways."""
    mixers = {"attention": functools.partial(Attention, D, n_heads=2, rope=False, causal=False)}
    settings = dict(
        d_model=D,
        n_layers=2,
        pattern=[mixer],
        mixers=mixers,
        channel_mixer=functools.partial(GELU, D),
        norm="layernorm",
        norm_place="post",
        final_norm=False,
        embed_norm=True,
        **POSITIONS,
    )
    return MaskedLanguageModel(13, **{**settings, **keywords}, rngs=nnx.Rngs(0))


def test_an_encoder_sees_both_ways_and_no_other_document():
    call = compiled(encoder())
    tokens = tokens_of(1, 8)
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]], jnp.int32)
    y = call(tokens, segment_ids=ids)
    assert y.shape == (1, 8, 13) and y.dtype == jnp.float32
    changed = call(tokens.at[0, 5].set((tokens[0, 5] + 1) % 13), segment_ids=ids)
    moved = np.abs(changed - y).max(-1)[0] > 0
    np.testing.assert_array_equal(moved, [0, 0, 0, 0, 1, 1, 1, 0])
    for start, stop in ((0, 4), (4, 7)):
        alone = call(tokens[:, start:stop])
        np.testing.assert_allclose(y[:, start:stop], alone, atol=2e-5)


def test_the_head_of_an_encoder_by_hand():
    model = encoder()
    model.head.bias[...] = jnp.arange(16.0)
    tokens = tokens_of(1, 4)
    h = model.hidden(tokens)[0] @ model.head.dense.kernel[...]
    h = jax.nn.gelu(h, approximate=False)
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    want = h @ model.embed.embedding[...][:13].T + jnp.arange(13.0)
    np.testing.assert_allclose(model(tokens), want, atol=1e-5)
    tables = [p for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "embedding" in p]
    assert sorted(path[0] for path in tables) == ["embed", "positions"]


def test_an_encoder_has_no_state():
    model = encoder()
    for attempt in (lambda: model.init_state(1, max_length=8), lambda: model.state_bytes(8)):
        with pytest.raises(NotImplementedError, match="there is nothing to decode from"):
            attempt()
    with pytest.raises(ConfigError, match="MaskedLanguageModel writes no text"):
        generate(model, [[1, 2]], max_new_tokens=2)
    both_ways = language_model(
        pattern=["attention"],
        mixers={"attention": functools.partial(Attention, D, n_heads=2, causal=False)},
    )
    with pytest.raises(ConfigError, match="writes no text: attention with causal=False"):
        generate(both_ways, [[1, 2]], max_new_tokens=2)
    with pytest.raises(ValueError, match="a masked language model reads tokens"):
        encoder(input_dim=3)


def test_writing_beyond_the_positions():
    with pytest.raises(ConfigError, match="more than model.max_positions=12; write fewer"):
        generate(language_model(**POSITIONS), [[1, 2, 3], [4]], max_new_tokens=10)


def classifier(**keywords):
    settings = dict(n_classes=3, d_model=D, n_layers=1, pattern=["mamba"], mixers=MIXERS)
    return Classifier(13, **{**settings, **keywords}, rngs=nnx.Rngs(0))


def test_two_documents_are_read_apart_and_joined():
    model = classifier(documents=2)
    tokens = tokens_of(3, 2, 6)
    lengths = np.array([[6, 4], [1, 6], [2, 3]])
    ids = jnp.asarray(np.arange(6) < lengths[..., None], jnp.int32)
    got = compiled(model)(tokens, segment_ids=ids)
    one = compiled(classifier(), "hidden")
    for row in range(3):
        pooled = [one(tokens[row, n : n + 1, : lengths[row, n]])[0][0].mean(0) for n in range(2)]
        x, y = pooled
        joined = jnp.concatenate([x, y, x * y, x - y])
        want = joined @ model.head.kernel[...] + model.head.bias[...]
        np.testing.assert_allclose(got[row], want, atol=1e-5)
    with pytest.raises(ValueError, match=r"documents=2 and input_dim=None it reads \[b 2 t\]"):
        model(tokens[:, 0])
    with pytest.raises(ValueError, match="documents is 3; allowed: 1, 2"):
        classifier(documents=3)


def test_vectors_as_input():
    model = classifier(input_dim=4, embed_scale=2.0)
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 4))
    ids = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], jnp.int32)
    x = 2 * (inputs @ model.embed.kernel[...] + model.embed.bias[...])
    np.testing.assert_allclose(model.embedded(inputs), x, atol=1e-5)
    logits = compiled(model)(inputs, segment_ids=ids)
    alone = compiled(model)(inputs[:1, :3])
    np.testing.assert_allclose(logits[0], alone[0], atol=1e-5)
    label = jnp.asarray([0, 2])
    sums = Classification().sums(model, {"inputs": inputs, "segment_ids": ids, "label": label})
    want = -jax.nn.log_softmax(logits)[jnp.arange(2), label].sum()
    assert float(sums.loss) == pytest.approx(float(want), rel=1e-5)
    with pytest.raises(ValueError, match=r"int32 \(2, 5\); with documents=1 and input_dim=4"):
        model(tokens_of(2, 5))
    with pytest.raises(ValueError, match="tokens .b t. need null"):
        language_model(input_dim=4)(tokens_of(2, 5))


def test_what_is_counted_of_encoders():
    counted = describe.parameters(encoder())
    parts = {"embedding", "positions", "mixers.attention", "channel_mixers", "norms", "head"}
    assert set(counted.by_part) == parts
    assert counted.by_part["positions"] == 12 * D
    assert counted.by_part["head"] == D * D + D + 2 * D + 16
    assert counted.by_part["norms"] == 2 * D + 2 * 2 * 2 * D  # of embeddings, of two layers
    assert counted.total - counted.without_embeddings == (16 + 12) * D
