"""The encoder of configs/model/m2_small.yaml beside padding: packed documents, its mixer off."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose

SMALL = (
    *("data=masked_stdlib_text", "task=masked_tokens", "model=m2_small", "data.seq_len=40"),
    *("model.d_model=16", "model.n_layers=2"),
)
M2 = "model.mixers.monarch_mixer.filter_order=8"
OFF = "model.pattern=[identity]"


def encoder(*overrides):
    return build(compose([*SMALL, *overrides]).model, rngs=nnx.Rngs(0))


def test_packed_documents_are_alone(compiled, tokens_of):
    call, tokens = compiled(encoder(M2)), tokens_of(1, 40)
    ids = jnp.asarray([[0, 0, *[1] * 11, *[2] * 11, 0, *[3] * 11, 0, 0, 0, 0]], jnp.int32)
    packed = call(tokens, segment_ids=ids)
    starts = (2, 13, 25)
    alone = call(jnp.concatenate([tokens[:, start : start + 11] for start in starts]))
    for start, want in zip(starts, alone, strict=True):
        np.testing.assert_allclose(packed[0, start : start + 11], want, rtol=1e-4, atol=1e-5)


def test_prepared_it_says_the_same_without_its_filters(compiled, tokens_of):
    """Kernels are kept for the longest rows; shorter ones take their first lags."""
    model, tokens = encoder(M2), tokens_of(2, 40)
    ready = model.prepared()
    assert "SineNetwork" in str(nnx.graphdef(model))
    assert "SineNetwork" not in str(nnx.graphdef(ready))
    for length in (40, 17):
        want, got = compiled(model)(tokens[:, :length]), compiled(ready)(tokens[:, :length])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer, sees", [(M2, True), (OFF, False)])
def test_without_its_mixer_it_sees_each_token_alone(mixer, sees, compiled, tokens_of):
    call, tokens = compiled(encoder(mixer)), tokens_of(2, 11)
    moved = np.abs(call(tokens.at[:, 5].add(1)) - call(tokens)).max(-1) > 0
    assert moved[:, 5].all()
    assert np.delete(moved, 5, axis=1).any() == sees
