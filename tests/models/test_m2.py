"""Models of Monarch Mixer: counts by the card's formula, padding, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.eval import describe


def count(d: int, *, length: int = 128, vocab: int = 30528, norm: bool = False) -> int:
    """Parameters of an M2-BERT of 12 layers, part by part."""
    filter_network = 5 * 128 + 128 + 2 * (128 * 128 + 128) + 128 * d
    filters = 2 * (5 * length + 128 + 2 * filter_network + d)
    mixer = (3 * d * d + 3 * d) + (3 * 3 * d + 3 * d) + (d * d + d) + filters + 2 * d * norm
    mlp = 2 * 4 * d * d // 4 + 4 * d * d // 4 + d
    embedding = vocab * d + length * d + 2 * d
    head = d * d + d + 2 * d + vocab
    return 12 * (mixer + mlp + 2 * d) + embedding + head


# The authors' names round the 110M's 115.6M down; the others are theirs to 0.5 %.
@pytest.mark.parametrize(
    "name, d, millions",
    [("80m", 768, 80), ("110m", 960, 115.6), ("260m", 1536, 260), ("341m", 1792, 341)],
)
def test_published_sizes(name, d, millions):
    config = compose([f"model=m2_bert_{name}", "data=masked_stdlib_text", "task=masked_tokens"])
    found = describe.parameters(describe.abstract_model(config.model)).total
    assert found == count(d, norm=name == "80m")
    assert found == pytest.approx(1e6 * millions, rel=0.005)


_M2 = "model.mixers.monarch_mixer."
WORDS = ("model.d_model=16", "model.n_layers=2", _M2 + "filter_order=8", _M2 + "init_std=null")


def test_an_encoder_does_not_see_padding():
    """The same row padded to two lengths has the same logits (their issue 43)."""
    words = ("model=m2_small", "data=masked_stdlib_text", "task=masked_tokens", *WORDS)
    words += ("model.n_layers=1", _M2 + "residual_long_conv=false")
    model = build(describe.plain(compose(words).model), rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(model)
    run = jax.jit(lambda v, tokens, ids: nnx.merge(graphdef, v).run(tokens, segment_ids=ids).logits)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 30)), jnp.int32)
    ids = lambda length: jnp.broadcast_to((jnp.arange(length) < 21).astype(jnp.int32), (2, length))
    short, long = (run(variables, tokens[:, :n], ids(n))[:, :21] for n in (24, 30))
    np.testing.assert_allclose(short, long, atol=2e-5 * float(jnp.abs(long).max()))
    moved = run(variables, tokens.at[:, 20].add(1) % 256, ids(30))
    assert np.abs(moved[:, 0] - long[:, 0]).max() > 1e-6  # it looks both ways


def test_a_causal_model_writes_what_it_reads():
    """Steps through the cache are the whole forward."""
    words = ("model=m2_causal", "data=stdlib_text", *WORDS)
    model = build(describe.plain(compose(words).model), rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 20)), jnp.int32)
    whole = jax.jit(model.__call__)(tokens)

    @jax.jit
    def written(variables, tokens):
        def one(state, token):
            logits, state = nnx.merge(graphdef, variables).step(token, state)
            return state, logits

        state = nnx.merge(graphdef, variables).init_state(2, max_length=20)
        return jnp.swapaxes(jax.lax.scan(one, state, tokens.T)[1], 0, 1)

    np.testing.assert_allclose(
        written(variables, tokens), whole, atol=2e-5 * float(jnp.abs(whole).max())
    )


def test_either_mlp():
    sizes = {}
    for name in ("block_diagonal_mlp", "monarch_mlp"):
        words = ("model=m2_small", "data=masked_stdlib_text", "task=masked_tokens", *WORDS)
        config = compose([*words, f"model.channel_mixer={name}"])
        found = describe.parameters(describe.abstract_model(config.model))
        sizes[name] = found.by_part["channel_mixers"]
    d, ff = 16, 64
    assert sizes["block_diagonal_mlp"] == 2 * (2 * ff * d // 4 + ff * d // 4 + d)
    between = 4 * (d // 4) ** 2
    up, down = between + 4 * (d // 4) * (2 * ff // 4), 4 * (ff // 4) * (d // 4) + between
    assert sizes["monarch_mlp"] == 2 * (up + down + d)
