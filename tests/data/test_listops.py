"""ListOps: values against an evaluator that reads the tokens, the law against a literal generator.

The literal generator is the one of the Long Range Arena, written again with Python's recursion.
"""

import dataclasses
import random

import numpy as np
import pytest

from seqzoo.data import ListOps, pipeline
from seqzoo.data.listops_trees import OPERATORS, SYMBOLS
from seqzoo.errors import ConfigError

EVALUATE = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
SMALL = dict(min_length=8, max_length=60, max_depth=5, max_args=4, seq_len=64, append_eos=False)


def words_of(batch, row):
    length = batch["segment_ids"][row].sum()
    assert (batch["segment_ids"][row, :length] == 1).all()
    assert (batch["tokens"][row, length:] == 0).all()
    return [SYMBOLS[token] for token in batch["tokens"][row, :length]]


def value_and_depth(words):
    lists = [[]]
    deepest = 1
    for word in words:
        if word in EVALUATE:
            lists.append([word])
            deepest = max(deepest, len(lists))
        elif word == "X":
            operator, *arguments = lists.pop()
            assert 2 <= len(arguments) <= 10
            lists[-1].append(EVALUATE[operator](arguments))
        else:
            lists[-1].append(int(word))
    ((value,),) = lists
    return value, deepest


def literal(rng, depth, max_depth, max_args):
    """Tokens of one tree; a value needs no second opinion here, the reader above has one."""
    if not (depth < max_depth and rng.random() <= 0.25):
        return [str(rng.randrange(10))]
    arguments = [
        literal(rng, depth + 1, max_depth, max_args) for _ in range(rng.randint(2, max_args))
    ]
    return [rng.choice(OPERATORS), *sum(arguments, []), "X"]


def literal_rows(data, count):
    rng, found = random.Random(0), []
    while len(found) < count:
        words = literal(rng, 1, data.max_depth, data.max_args)
        if data.min_length < len(words) < data.max_length:
            found.append(words)
    return found


def test_values_are_those_of_the_trees_that_the_tokens_spell():
    data = ListOps(append_eos=False)
    batch = data.source("train").batch(np.arange(64))
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "tokens": ((64, 2048), np.int32),
        "segment_ids": ((64, 2048), np.int32),
        "label": ((64,), np.int32),
    }
    for row in range(64):
        words = words_of(batch, row)
        assert 500 < len(words) < 2000
        value, deepest = value_and_depth(words)
        assert value == batch["label"][row] and deepest <= 10


def test_a_row_is_a_function_of_its_number():
    data = ListOps(**{**SMALL, "append_eos": True})
    source = data.source("train")
    whole, some = source.batch(np.arange(200)), source.batch(np.array([150, 3, 150]))
    for name in whole:
        np.testing.assert_array_equal(some[name], whole[name][[150, 3, 150]])
    other = dataclasses.replace(data, seed=1).source("train").batch(np.arange(200))
    assert (other["tokens"] != whole["tokens"]).any(axis=1).mean() > 0.9
    for row in range(20):
        *words, end = words_of(whole, row)
        assert end == "<eos>" and value_and_depth(words)[0] == whole["label"][row]


def test_small_trees_by_the_literal_law(chi_square):
    data, n = ListOps(**SMALL), 10_000
    batch = data.source("train").batch(np.arange(n))
    expected = literal_rows(data, n)

    def compare(found, literal):
        both = np.stack([np.bincount(found, minlength=60), np.bincount(literal, minlength=60)])
        both = both[:, both.sum(0) > 20]
        mean = both.mean(0)
        # Two samples against each other: the difference has twice the variance of one.
        assert abs(chi_square(mean + (both[0] - both[1]) / np.sqrt(2), mean)) < 5

    compare(batch["segment_ids"].sum(1), [len(words) for words in expected])
    compare(batch["label"], [value_and_depth(words)[0] for words in expected])
    compare(batch["tokens"][:, 0], [SYMBOLS.index(words[0]) for words in expected])
    compare(batch["tokens"][:, 1], [SYMBOLS.index(words[1]) for words in expected])
    depth = [value_and_depth(words_of(batch, row))[1] for row in range(n // 4)]
    compare(np.array(depth), [value_and_depth(words)[1] for words in expected[: n // 4]])


def test_rows_of_the_arena_have_its_lengths_and_labels():
    batch = ListOps().source("train").batch(np.arange(3000))
    # 24,000 trees of the literal generator: mean length 1,034, the commonest value 16.9 %.
    assert batch["segment_ids"].sum(1).mean() == pytest.approx(1034, rel=0.03)
    share = np.bincount(batch["label"], minlength=10) / 3000
    assert share.max() == pytest.approx(0.169, abs=0.025)
    assert set(np.argsort(share)[-2:]) == {0, 9}


def test_splits_and_the_pipeline():
    data = ListOps(**SMALL, train_samples=50, valid_samples=7, test_samples=5)
    rows = {
        split: data.source(split).batch(np.arange(5))["tokens"].tobytes()
        for split in ("train", "valid", "test")
    }
    assert len(set(rows.values())) == 3
    (batch,) = pipeline.eval_batches(data, "valid", batch_size=8)
    assert batch["tokens"].shape == (8, 64) and (batch["label"] >= 0).sum() == 7
    assert len(data.source("train")) == 50
    assert data.fingerprint() != dataclasses.replace(data, max_args=5).fingerprint()
    assert hash(data) == hash(dataclasses.replace(data))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(vocab_size=17), "data.vocab_size=17"),
        (dict(n_classes=9), "data.n_classes=9"),
        (dict(seq_len=1500), "data.seq_len=1500 is too short for rows of up to 2000"),
        (dict(min_length=500, max_length=501), "no length lies between"),
        (dict(max_depth=3), "a tree has at most 122 tokens"),
        (dict(max_depth=1), "data.max_depth=1; it must be 2 to"),
        (dict(max_args=1), "data.max_args=1"),
        (dict(leaf_probability=1.0), "data.leaf_probability=1.0"),
        (dict(test_samples=0), "data.test_samples=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ListOps(**settings)


def test_lengths_that_never_come_are_noticed(monkeypatch):
    monkeypatch.setattr("seqzoo.data.listops_trees._MOST_ROUNDS", 5)
    data = ListOps(min_length=1000, max_length=1002, max_depth=5, max_args=10)
    with pytest.raises(ConfigError, match="none of 40 trees drawn for a row has a length between"):
        data.source("train").batch(np.arange(1))
