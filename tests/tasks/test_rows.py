"""Rows read in chunks score as whole rows do, and exact counts rows that are right throughout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.data import IGNORE, Passkey
from seqzoo.errors import ConfigError
from seqzoo.tasks import MaskedAnswers, NextToken
from seqzoo.train.setup import setup

SMALL = [
    "model=titans_mac_small",
    "model.pattern=[attention,titans_mac]",
    "model.d_model=16",
    "model.mixers.titans_mac.head_dim=8",
    "model.mixers.titans_mac.segment=16",
    "data.vocab_size=32",
    "data.seq_len=64",
]


@pytest.fixture(scope="module")
def model():
    return build(compose(SMALL)["model"], rngs=nnx.Rngs(0))


def pairs(task, model, batch, chunk_length=None):
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        sums = task.sums(nnx.merge(graphdef, state), batch, chunk_length=chunk_length)
        return {"loss": (sums.loss, sums.weight), **sums.metrics}, sums.reports.values

    return run(state)


def test_rows_in_chunks_score_as_whole_rows(model):
    """Two documents per row and padding; the last chunk is shorter than the others."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 32, (2, 2, 40)).astype(np.int32)
    ids = np.ones((2, 40), np.int32)
    ids[0, 21:] = 2
    ids[1, 30:] = 0
    targets[1, 30:] = IGNORE
    batch = {"tokens": tokens, "targets": targets, "segment_ids": ids}
    whole, told = pairs(NextToken(), model, batch)
    chunked, told_in_chunks = pairs(NextToken(), model, batch, chunk_length=16)
    assert whole.keys() == chunked.keys() and told.keys() == told_in_chunks.keys()
    for name in whole:
        np.testing.assert_allclose(chunked[name], whole[name], rtol=2e-5)
    np.testing.assert_allclose(
        told_in_chunks["memory_forgetting"], told["memory_forgetting"], rtol=0.5
    )


class Given:
    def __init__(self, right):
        self.right = jnp.asarray(right)

    def run(self, tokens, *, segment_ids=None, key=None):
        logits = 9.0 * jax.nn.one_hot(tokens, 4)
        out = jnp.where(self.right[..., None], logits, -logits)
        return type("Output", (), {"logits": out, "reports": None})


def test_exact_counts_rows_whose_answers_are_all_right():
    targets = np.array([[IGNORE, 1, 2], [IGNORE, 1, 2], [3, IGNORE, IGNORE], [IGNORE] * 3])
    right = np.array([[0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    batch = {"tokens": np.maximum(targets, 0), "targets": targets, "group": np.array([0, 0, 1, 1])}
    task = MaskedAnswers(metric="exact", groups=("a", "b"))
    sums = task.sums(Given(right), batch)
    found = task.finish({"loss": (sums.loss, sums.weight), **sums.metrics})
    assert found["exact"] == pytest.approx(2 / 3) and found["accuracy"] == pytest.approx(2.5 / 3)
    assert found["exact/a"] == 0.5 and found["accuracy/a"] == 0.75 and found["exact/b"] == 1.0
    assert task.mode == "max"


def test_chunks_are_for_tasks_that_read_in_order():
    words = ["data=passkey", "task=masked_answers", "model=mamba_small"]
    assert isinstance(setup(compose([*words, "trainer.eval_chunk_length=512"])).data, Passkey)
    with pytest.raises(ConfigError, match="eval_chunk_length=0; it must be at least 1"):
        setup(compose([*words, "trainer.eval_chunk_length=0"]))
    words = ["data=masked_stdlib_text", "task=masked_tokens", "model=m2_small"]
    with pytest.raises(ConfigError, match="eval_chunk_length=64, but this task needs whole rows"):
        setup(compose([*words, "trainer.eval_chunk_length=64"]))


def test_logits_where_something_is_asked_are_all_that_counts():
    """Rows with as many targets as may be, with fewer and with none; gradients too."""
    words = ["model=mamba_small", "model.d_model=8", "model.n_layers=1", "data.vocab_size=32"]
    graphdef, state = nnx.split(build(compose(words)["model"], rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (3, 40)).astype(np.int32)
    targets = np.full((3, 40), IGNORE, np.int32)
    targets[0, [3, 17, 39]], targets[1, 20] = (1, 2, 3), 4
    batch = {"tokens": tokens, "targets": targets}

    @functools.partial(jax.jit, static_argnums=0)
    def run(task, state):
        def loss(state):
            sums = task.sums(nnx.merge(graphdef, state), batch)
            return sums.loss, (sums.weight, sums.metrics)

        return jax.value_and_grad(loss, has_aux=True)(state)

    expected, got = (run(task, state) for task in (MaskedAnswers(), MaskedAnswers(most_asked=3)))
    for a, b in zip(*map(jax.tree.leaves, (expected, got)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_data_says_how_much_it_asks():
    for data, most in dict(mqar=4, passkey=5, induction_heads=1).items():
        words = [f"data={data}", "task=masked_answers", "model=mamba_small"]
        found = setup(compose(words))
        batch = found.data.source("train").batch(np.arange(20))
        assert found.task.most_asked == most == (batch["targets"] != IGNORE).sum(1).max()
