"""Masked language models: an encoder that sees both ways, its head, and what it has not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.errors import ConfigError
from seqzoo.eval import describe
from seqzoo.eval.generate import generate
from seqzoo.mixers import Attention
from seqzoo.models import LanguageModel, MaskedLanguageModel
from seqzoo.nn.mlp import GELU
from seqzoo.tasks import NextToken

D = 16
POSITIONS = dict(positions="learned", max_positions=12)
MIXERS = {"attention": functools.partial(Attention, D, n_heads=2, rope=False, causal=False)}


def language_model(**keywords):
    """One that may not decode: its attention looks both ways."""
    settings = dict(d_model=D, n_layers=2, pattern=["attention"], mixers=MIXERS)
    return LanguageModel(13, **{**settings, **keywords}, rngs=nnx.Rngs(0))


def encoder(**keywords):
    """A masked language model whose tokens see both ways."""
    settings = dict(
        d_model=D,
        n_layers=2,
        pattern=["attention"],
        mixers=MIXERS,
        channel_mixer=functools.partial(GELU, D),
        norm="layernorm",
        norm_place="post",
        final_norm=False,
        embed_norm=True,
        **POSITIONS,
    )
    return MaskedLanguageModel(13, **{**settings, **keywords}, rngs=nnx.Rngs(0))


def test_an_encoder_sees_both_ways_and_no_other_document(compiled, tokens_of):
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


def test_the_head_of_an_encoder_by_hand(tokens_of):
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
    with pytest.raises(ConfigError, match="writes no text: attention with causal=False"):
        generate(language_model(), [[1, 2]], max_new_tokens=2)
    with pytest.raises(ValueError, match="a masked language model reads tokens"):
        encoder(input_dim=3)


def test_writing_beyond_the_positions():
    with pytest.raises(ConfigError, match="more than model.max_positions=12; write fewer"):
        generate(language_model(**POSITIONS), [[1, 2, 3], [4]], max_new_tokens=10)


def test_what_is_counted_of_encoders():
    counted = describe.parameters(encoder())
    parts = {"embedding", "positions", "mixers.attention", "channel_mixers", "norms", "head"}
    assert set(counted.by_part) == parts
    assert counted.by_part["positions"] == 12 * D
    assert counted.by_part["head"] == D * D + D + 2 * D + 16
    assert counted.by_part["norms"] == 2 * D + 2 * 2 * 2 * D  # of embeddings, of two layers
    assert counted.total - counted.without_embeddings == (16 + 12) * D


def test_nobody_is_asked_for_a_token_that_it_sees():
    batch = {name: jnp.zeros((1, 4), jnp.int32) for name in ("tokens", "targets")}
    with pytest.raises(ConfigError, match="the mixer attention looks both ways"):
        NextToken().sums(language_model(), batch)
