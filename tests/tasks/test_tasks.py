"""Tasks against closed forms, with a model that is a table of logits."""

import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqzoo.data import (
    IGNORE,
    MQAR,
    AssociativeRecall,
    InductionHeads,
    ListOps,
    Masked,
    Needles,
    Passkey,
    StdlibText,
)
from seqzoo.errors import ConfigError
from seqzoo.nn.stack import Run
from seqzoo.tasks import Classification, MaskedAnswers, MaskedTokens, NextToken

HIDDEN = Masked(StdlibText(seq_len=128))


@dataclasses.dataclass
class Output:
    logits: jax.Array
    state: Any = None
    reports: Any = None


@dataclasses.dataclass
class Table:
    """A model whose logits are given."""

    logits: jax.Array

    def run(self, tokens, *, segment_ids=None, state=None, return_state=False, key=None):
        return Output(jnp.broadcast_to(self.logits, (*tokens.shape, self.logits.shape[-1])))


@dataclasses.dataclass
class RowTable(Table):
    def run(self, tokens, *, segment_ids=None, key=None):
        return Output(self.logits)


def totals_of(sums):
    return {"loss": (sums.loss, sums.weight), **sums.metrics}


def test_uniform_logits_cost_the_log_of_the_vocabulary_and_are_right_by_chance():
    tokens = jnp.zeros((2, 5), jnp.int32)
    targets = jnp.array([[1, 2, 3, IGNORE, IGNORE], [0] * 5], jnp.int32)
    sums = NextToken(bytes_per_token=1.0).sums(
        Table(jnp.zeros(16)), {"tokens": tokens, "targets": targets}
    )
    assert float(sums.weight) == 8
    found = NextToken(bytes_per_token=1.0).finish(totals_of(sums))
    assert found["loss"] == pytest.approx(math.log(16), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(4.0, rel=1e-6)
    assert found["perplexity"] == pytest.approx(16.0, rel=1e-5)
    assert found["accuracy"] == pytest.approx(1 / 16, rel=1e-6)


def test_score_equals_log_softmax_and_its_gradient():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 7, 11)) * 30, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (3, 7)), jnp.int32).at[0, :3].set(IGNORE)
    task = NextToken()

    def loss(x):
        return task.sums(Table(x), {"tokens": targets, "targets": targets}).loss

    def literal(x):
        rows = jnp.take_along_axis(jax.nn.log_softmax(x), jnp.maximum(targets, 0)[..., None], -1)
        return -jnp.where(targets == IGNORE, 0.0, rows[..., 0]).sum()

    np.testing.assert_allclose(loss(logits), literal(logits), rtol=1e-6)
    ours, theirs = jax.grad(loss)(logits), jax.grad(literal)(logits)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    sums = task.sums(Table(logits), {"tokens": targets, "targets": targets})
    hits = (np.argmax(logits, -1) == targets).sum()
    assert float(sums.metrics["accuracy"][0]) == hits


def test_nan_where_nothing_is_asked_poisons_neither_loss_nor_gradient():
    logits = jnp.zeros((1, 4, 8)).at[0, 1].set(jnp.nan).at[0, 3].set(jnp.inf)
    targets = jnp.array([[2, IGNORE, 5, IGNORE]], jnp.int32)

    def loss(x):
        return MaskedAnswers().sums(Table(x), {"tokens": targets, "targets": targets}).loss

    value, gradient = jax.value_and_grad(loss)(logits)
    assert float(value) == pytest.approx(2 * math.log(8), rel=1e-6)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[0, [1, 3]] == 0).all()


def test_bfloat16_logits_are_scored_in_float32():
    targets = jnp.zeros((4, 512), jnp.int32)
    logits = jnp.zeros(64, jnp.bfloat16)
    sums = MaskedAnswers().sums(Table(logits), {"tokens": targets, "targets": targets})
    assert sums.loss.dtype == jnp.float32
    assert float(sums.loss) == pytest.approx(4 * 512 * math.log(64), rel=1e-5)


def test_accuracy_is_the_mean_over_rows_of_each_rows_fraction_and_by_group():
    # Row 0: 1 of 2 right; row 1: 1 of 1; row 2: 0 of 4; row 3 asks nothing and does not count.
    targets = jnp.array(
        [[1, 0, IGNORE, IGNORE], [IGNORE, 1, IGNORE, IGNORE], [0, 2, 3, 0], [IGNORE] * 4],
        jnp.int32,
    )
    batch = {"tokens": targets, "targets": targets, "group": jnp.array([0, 0, 1, 1], jnp.int32)}
    always_one = Table(jnp.array([0.0, 5.0, 0.0, 0.0]))
    task = MaskedAnswers(groups=("easy", "hard", "absent"))
    sums = task.sums(always_one, batch)
    assert float(sums.weight) == 7
    found = task.finish(totals_of(sums))
    assert found["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["accuracy/easy"] == pytest.approx(0.75)
    assert found["accuracy/hard"] == 0.0
    assert "accuracy/absent" not in found


def test_sums_of_parts_add_up_to_the_sums_of_the_whole():
    rng = np.random.default_rng(1)
    batch = MQAR(vocab_size=32, num_kv_pairs=4, seq_len=32).source("valid").batch(np.arange(8))
    logits = jnp.asarray(rng.normal(size=(8, 32, 32)), jnp.float32)
    task = MaskedAnswers()
    whole = totals_of(task.sums(Table(logits), batch))
    parts = [
        totals_of(
            task.sums(Table(logits[rows]), {name: value[rows] for name, value in batch.items()})
        )
        for rows in (slice(0, 3), slice(3, 8))
    ]
    for name, pair in whole.items():
        added = [sum(part[name][n] for part in parts) for n in (0, 1)]
        np.testing.assert_allclose(pair, added, rtol=1e-6)


def test_classification_leaves_out_the_rows_that_fill_up_a_batch():
    logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    batch = {"tokens": jnp.zeros((3, 4), jnp.int32), "label": jnp.array([0, 0, IGNORE])}
    task = Classification()
    sums = task.sums(RowTable(logits), batch)
    assert float(sums.weight) == 2
    found = task.finish(totals_of(sums))
    assert found["accuracy"] == 0.5
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_tasks_know_which_way_is_better_and_refuse_a_metric_they_do_not_have():
    assert MaskedAnswers().mode == "max" and NextToken().mode == "min"
    assert NextToken(metric="accuracy").mode == "max" and MaskedAnswers(metric="loss").mode == "min"
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        MaskedAnswers(metric="acuracy")
    with pytest.raises(ConfigError, match="not bytes"):
        NextToken(metric="bits_per_byte").for_data(MQAR())


def test_for_data_fills_in_what_the_data_knows_and_tasks_stay_hashable():
    task = MaskedAnswers().for_data(MQAR())
    filled = MaskedAnswers(groups=["pairs_4"], most_asked=4)
    assert task.groups == ("pairs_4",) and hash(task) == hash(filled)


@pytest.mark.parametrize("dataset", [Passkey(), Needles(), AssociativeRecall()])
def test_rows_that_hold_answers_are_not_read_both_ways(dataset):
    block = types.SimpleNamespace(mixer=types.SimpleNamespace(causality="none"))
    stack = types.SimpleNamespace(plan=[Run(0, ("attention",), 1)], runs=[[block]])
    task = MaskedAnswers().for_data(dataset)
    text = "rows that hold answers, but the mixer attention looks both ways and sees them"
    with pytest.raises(ConfigError, match=text):
        task.sums(types.SimpleNamespace(stack=stack), {})


@pytest.mark.parametrize(
    ("task", "dataset", "said"),
    [
        (MaskedAnswers(), StdlibText(), r"\(the default\), but StdlibText .* set task=next_token"),
        (MaskedAnswers(), HIDDEN, "Masked hides .* set task=masked_tokens"),
        (MaskedAnswers(), ListOps(), "ListOps has a label per row: set task=classification"),
        (NextToken(), HIDDEN, "task=next_token, but .*task=masked_tokens"),
        (NextToken(), ListOps(), "task=next_token, but .* set task=classification"),
        (Classification(), StdlibText(), "task=classification, but .* set task=next_token"),
        (MaskedTokens(), ListOps(), "hides no tokens.* or task=classification"),
    ],
)
def test_data_made_for_another_task_is_refused_before_anything_runs(task, dataset, said):
    with pytest.raises(ConfigError, match=said):
        task.for_data(dataset)


def test_rows_without_answers_are_read_by_any_model():
    for dataset in (MQAR(), InductionHeads(), AssociativeRecall(train_targets="last")):
        assert not MaskedAnswers().for_data(dataset).answers_in_input


def test_a_group_or_total_without_weight_is_no_division_by_zero():
    found = MaskedAnswers().finish({"loss": (0.0, 0.0), "accuracy/x": (0.0, 0.0)})
    assert math.isnan(found["loss"]) and "accuracy/x" not in found


def test_a_model_that_answers_elsewhere_is_refused():
    """Logits per token and one label: in a batch of one row they would fit by stretching."""
    one = jnp.zeros((1,), jnp.int32)
    batch = {"tokens": jnp.zeros((1, 5), jnp.int32), "label": one}
    with pytest.raises(ConfigError, match=r"logits \[1, 5, 4\].*asks at \[1\]: .*classifier"):
        Classification().sums(Table(jnp.zeros(4)), batch)


@pytest.mark.parametrize(
    ("task", "held", "said"),
    [
        (Classification(), "targets", "rows with label, .* tokens, targets; take .*masked_answers"),
        (NextToken(), "label", "rows with targets, .* tokens, label; take task=classification"),
        (MaskedAnswers(), "label", "task=masked_answers needs rows with targets"),
    ],
)
def test_rows_of_another_task_are_refused(task, held, said):
    tokens = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ConfigError, match=said):
        task.sums(Table(jnp.zeros(4)), {"tokens": tokens, held: tokens})
