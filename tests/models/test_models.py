"""Language models and classifiers over real mixers: whole = streamed = stepped, packed = alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.mixers import Attention, Mamba
from seqzoo.models import Classifier, LanguageModel
from seqzoo.models.classifier import pool
from seqzoo.nn.mlp import GELU, SwiGLU
from seqzoo.nn.param import decays

D = 16
MIXERS = {
    "mamba": functools.partial(Mamba, D, d_state=4),
    "attention": functools.partial(Attention, D, n_heads=2, n_kv_heads=1),
}


def language_model(**keywords):
    settings = dict(
        d_model=D,
        n_layers=3,
        pattern=["mamba", "attention"],
        mixers=MIXERS,
        channel_mixer=functools.partial(SwiGLU, D),
        rngs=nnx.Rngs(0),
    )
    return LanguageModel(13, **{**settings, **keywords})


def classifier(**keywords):
    settings = dict(n_classes=3, d_model=D, n_layers=2, pattern=["mamba"], mixers=MIXERS)
    return Classifier(13, **{**settings, **keywords}, rngs=nnx.Rngs(0))


def compiled(model, method="__call__"):
    """A method as one compiled program; run eagerly, each operation would compile alone."""
    graphdef, variables = nnx.split(model)
    static = ("return_state",) if method == "run" else ()
    call = lambda variables, *args, **kw: getattr(nnx.merge(graphdef, variables), method)(
        *args, **kw
    )
    program = jax.jit(call, static_argnames=static)
    return functools.partial(program, variables)


def tokens_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 13, shape), jnp.int32)


def test_streamed_and_stepped():
    model = language_model()
    tokens = tokens_of(2, 11)
    whole = compiled(model)(tokens)
    assert whole.shape == (2, 11, 13) and whole.dtype == jnp.float32
    state, parts = model.init_state(2, max_length=11), []
    run, step = compiled(model, "run"), compiled(model, "step")
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:9]):
        out = run(part, state=state, return_state=True)
        state = out.state
        parts.append(out.logits)
    for t in (9, 10):
        logits, state = step(tokens[:, t], state)
        parts.append(logits[:, None])
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)


def test_packed_documents_are_alone():
    model = language_model()
    ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0], [0, 3, 3, 3, 3, 3, 3, 3]], jnp.int32)
    tokens = tokens_of(2, 8)
    call = compiled(model)
    packed = call(tokens, segment_ids=ids)
    for row, start, stop in ((0, 0, 4), (0, 4, 7), (1, 1, 8)):
        alone = call(tokens[row : row + 1, start:stop])[0]
        np.testing.assert_allclose(packed[row, start:stop], alone, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_is_padded_and_logits_are_not(tied):
    model = language_model(tie_embeddings=tied, pad_vocab_multiple=8)
    assert model.embed.embedding.shape == (16, D)
    assert compiled(model)(tokens_of(1, 2)).shape[-1] == 13
    tables = [p for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "embedding" in p]
    assert len(tables) == (1 if tied else 2)


def test_every_parameter_gets_a_gradient():
    model = language_model(tie_embeddings=False)
    graphdef, params = nnx.split(model)
    loss = lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(tokens_of(2, 9))))
    for path, gradient in nnx.to_flat_state(nnx.as_pure(jax.jit(jax.grad(loss))(params))):
        assert bool(jnp.isfinite(gradient).all()), path
        assert float(jnp.abs(gradient).max()) > 0, path


def test_bfloat16_computes_and_float32_keeps():
    model = language_model(dtype="bfloat16")
    dtypes = {v.dtype for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert dtypes == {jnp.dtype("float32")}
    out = compiled(model)(tokens_of(2, 9))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, compiled(language_model())(tokens_of(2, 9)), atol=0.05)


def test_weight_decay_spares_vectors_and_rates():
    spared = {
        path[-1] if path[-1] not in ("kernel", "weight") else path[-2]
        for path, v in nnx.to_flat_state(nnx.state(language_model(), nnx.Param))
        if not decays(v)
    }
    assert spared == {"scale", "bias", "dt_bias", "A_log", "D"}


def test_dropout_needs_a_key():
    model = language_model(dropout=0.5, embed_dropout=0.5)
    tokens = tokens_of(1, 5)
    program = compiled(model, "run")
    run = lambda key: program(tokens, key=key).logits
    np.testing.assert_array_equal(run(None), run(None))
    first, again, other = (run(jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("how", ["mean", "last", "first"])
def test_pooling_sees_valid_tokens_alone(how):
    model = compiled(classifier(pool=how))
    tokens = tokens_of(2, 6)
    ids = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], jnp.int32)
    logits = model(tokens, segment_ids=ids)
    assert logits.shape == (2, 3)
    np.testing.assert_allclose(logits[0], model(tokens[:1, :4])[0], atol=1e-5)
    padded = model(jnp.pad(tokens, ((0, 0), (0, 3))), segment_ids=jnp.pad(ids, ((0, 0), (0, 3))))
    np.testing.assert_allclose(padded, logits, atol=1e-5)


def test_pool_by_hand():
    h = jnp.arange(12.0).reshape(1, 4, 3)
    ids = jnp.asarray([[0, 1, 1, 0]])
    np.testing.assert_array_equal(pool(h, ids, "first")[0], h[0, 1])
    np.testing.assert_array_equal(pool(h, ids, "last")[0], h[0, 2])
    np.testing.assert_array_equal(pool(h, ids, "mean")[0], (h[0, 1] + h[0, 2]) / 2)
    np.testing.assert_array_equal(pool(h, jnp.zeros((1, 4), jnp.int32), "mean")[0], 0.0)


def test_state_bytes_add_up():
    model = language_model()
    held = sum(a.nbytes for a in jax.tree.leaves(model.init_state(1, max_length=32)))
    assert model.state_bytes(32)["total"] == held
    growing = model.state_bytes(64)["total"] - held
    assert growing == 1 * 2 * 32 * 1 * (D // 2) * 4  # one attention layer: keys and values


@pytest.mark.parametrize(
    "keywords, message",
    [
        (dict(dropout=1.0), r"dropout is 1.0; it must lie in \[0, 1\)"),
        (dict(norm="batchnorm"), "norm is 'batchnorm'; allowed: rmsnorm, layernorm"),
        (dict(pattern=["mamba", "retnet"]), "pattern names 'retnet'"),
        (dict(dtype="int8"), "dtype is 'int8'; allowed: float32, bfloat16"),
        (dict(dtype="float16"), "dtype is 'float16', which is not served.*set bfloat16"),
        (dict(residual_dtype="float16"), "residual_dtype is 'float16', which is not served"),
        (dict(pad_vocab_multiple=0), "pad_vocab_multiple is 0"),
    ],
)
def test_bad_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        language_model(**keywords)


def test_bad_classifiers():
    with pytest.raises(ValueError, match="n_classes is 1"):
        classifier(n_classes=1)
    with pytest.raises(ValueError, match="pool is 'max'"):
        classifier(pool="max")


@pytest.mark.parametrize("channel_mixer", [GELU, SwiGLU])
def test_channel_mixers_see_one_token(channel_mixer):
    mlp = channel_mixer(D, d_ff=24, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, D))
    changed = x.at[0, 1].add(1.0)
    difference = jnp.abs(mlp(changed) - mlp(x)).max(-1)[0]
    assert difference[1] > 0 and float(difference[jnp.array([0, 2, 3])].max()) == 0
    with pytest.raises(ValueError, match="d_ff 0"):
        channel_mixer(D, d_ff=0, rngs=nnx.Rngs(0))
