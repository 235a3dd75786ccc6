"""Classifiers of one sequence or two, of tokens or vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.mixers import Mamba
from seqzoo.models import Classifier, LanguageModel
from seqzoo.tasks import Classification

D = 16
MIXERS = {"mamba": functools.partial(Mamba, D, d_state=4)}
TRUNK = dict(d_model=D, n_layers=1, pattern=["mamba"], mixers=MIXERS)


def classifier(**keywords):
    return Classifier(13, n_classes=3, **TRUNK, **keywords, rngs=nnx.Rngs(0))


def test_two_documents_are_read_apart_and_joined(compiled, tokens_of):
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


def test_vectors_as_input(compiled, tokens_of):
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
        LanguageModel(13, **TRUNK, input_dim=4, rngs=nnx.Rngs(0))(tokens_of(2, 5))
