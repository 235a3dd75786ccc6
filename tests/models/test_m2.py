"""M2 encoders whole, as configs/model/m2_small.yaml makes them: padding, documents, no mixer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.models import MaskedLanguageModel

SMALL = (
    *("data=masked_stdlib_text", "task=masked_tokens", "model=m2_small", "data.seq_len=40"),
    *("model.d_model=16", "model.n_layers=2", "model.mixers.monarch_mixer.filter_order=8"),
)


@functools.cache
def called(*overrides):
    """The model as one compiled program of tokens and segment ids."""
    model = build(compose([*SMALL, *overrides]).model, rngs=nnx.Rngs(0))
    assert isinstance(model, MaskedLanguageModel)
    graphdef, variables = nnx.split(model)
    program = jax.jit(lambda v, *args: nnx.merge(graphdef, v)(args[0], segment_ids=args[1]))
    return functools.partial(program, variables)


def tokens_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 257, shape), jnp.int32)


@pytest.mark.parametrize("norm_inside", [False, True])
def test_a_sequence_gives_the_same_whatever_length_it_is_padded_to(norm_inside):
    """The reference lets pads into its convolutions: embeddings change with the padded length."""
    call = called(f"model.mixers.monarch_mixer.input_norm={norm_inside}")
    tokens = tokens_of(2, 11)
    alone = call(tokens, None)
    for length in (17, 40):
        more = length - 11
        padded = jnp.concatenate([tokens, tokens_of(2, more, seed=length)], axis=1)
        ids = jnp.asarray(np.arange(length) < 11, jnp.int32)[None].repeat(2, axis=0)
        got = call(padded, ids)[:, :11]
        np.testing.assert_allclose(got, alone, rtol=1e-4, atol=1e-5)


def test_packed_documents_are_alone():
    call = called("model.mixers.monarch_mixer.input_norm=False")
    tokens = tokens_of(1, 40, seed=1)
    ids = jnp.asarray([[0, 0, *[1] * 11, *[2] * 11, 0, *[3] * 11, 0, 0, 0, 0]], jnp.int32)
    packed = call(tokens, ids)
    for start in (2, 13, 25):
        alone = call(tokens[:, start : start + 11].repeat(2, axis=0), None)[:1]
        np.testing.assert_allclose(packed[:, start : start + 11], alone, rtol=1e-4, atol=1e-5)


def test_it_looks_both_ways_and_without_its_mixer_nowhere():
    tokens = tokens_of(2, 11)
    for overrides, far in ((("model.mixers.monarch_mixer.input_norm=False",), True), (_OFF, False)):
        call = called(*overrides)
        moved = np.abs(call(tokens.at[:, 5].add(1) % 257, None) - call(tokens, None)).max(-1)
        assert (moved[:, 5] > 0).all()
        assert (np.delete(moved, 5, axis=1) > 0).all() == far
        assert (np.delete(moved, 5, axis=1) > 0).any() == far


_OFF = ("model.pattern=[identity]",)


def test_a_row_longer_than_the_positions():
    with pytest.raises(ValueError, match="41 tokens has more places than model.max_positions=40"):
        called("model.mixers.monarch_mixer.input_norm=False")(tokens_of(1, 41), None)
