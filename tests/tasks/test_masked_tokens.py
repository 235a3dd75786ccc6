"""Masked tokens against closed forms, with a model that is a table of logits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqzoo.data import IGNORE, Masked, StdlibText
from seqzoo.errors import ConfigError
from seqzoo.tasks import MaskedTokens


@dataclasses.dataclass
class Output:
    logits: jax.Array
    reports: Any = None


@dataclasses.dataclass
class Given:
    logits: jax.Array

    def run(self, tokens, *, segment_ids=None, key=None):
        return Output(self.logits)


def found(logits, targets):
    task = MaskedTokens()
    sums = task.sums(Given(logits), {"tokens": targets, "targets": targets})
    return task.finish({"loss": (sums.loss, sums.weight), **sums.metrics})


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    targets = jnp.full((2, 5), IGNORE).at[0, 1].set(3).at[1, :3].set(7)
    result = found(jnp.zeros((2, 5, 16)), targets)
    assert result["bits_per_masked_token"] == pytest.approx(4.0, rel=1e-6)
    assert result["loss"] == pytest.approx(math.log(16), rel=1e-6)
    assert result["accuracy"] == pytest.approx(1 / 16, rel=1e-6)


def test_each_hidden_token_counts_the_same_wherever_it_stands():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 8, 11)), jnp.float32)
    targets = np.full((3, 8), IGNORE)
    targets[0, :6], targets[1, 2] = rng.integers(0, 11, 6), 4
    p = jax.nn.log_softmax(logits)
    where = np.nonzero(targets != IGNORE)
    cost = -np.asarray(p)[(*where, targets[where])]
    right = np.argmax(np.asarray(logits), -1)[where] == targets[where]
    result = found(logits, jnp.asarray(targets))
    assert result["bits_per_masked_token"] == pytest.approx(cost.mean() / math.log(2), rel=1e-5)
    assert result["accuracy"] == pytest.approx(right.mean(), rel=1e-6)


def test_what_is_better_and_what_is_no_metric():
    assert MaskedTokens().mode == "min" and MaskedTokens(metric="accuracy").mode == "max"
    assert MaskedTokens().for_data(Masked(StdlibText(seq_len=128))) == MaskedTokens()
    with pytest.raises(ConfigError, match="StdlibText hides no tokens: .*take data=masked_text"):
        MaskedTokens().for_data(StdlibText())
    with pytest.raises(ConfigError, match="bits_per_masked_token"):
        MaskedTokens(metric="bits_per_byte")
