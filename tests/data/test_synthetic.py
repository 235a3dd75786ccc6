"""Selective copying, induction heads, associative recall: their laws and their limits."""

import numpy as np
import pytest

from seqzoo.data import IGNORE, AssociativeRecall, InductionHeads, SelectiveCopying, pipeline
from seqzoo.errors import ConfigError

N = 20_000


def test_selective_copying_by_its_law(chi_square):
    data = SelectiveCopying(seq_len=40, num_tokens=5)
    batch = data.source("train").batch(np.arange(N))
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.shape == (N, 40) and (tokens[:, 35:] == 15).all()
    assert (targets[:, :35] == IGNORE).all()
    shown = tokens[:, :35] > 0
    assert (shown.sum(1) == 5).all()
    np.testing.assert_array_equal(tokens[:, :35][shown].reshape(N, 5), targets[:, 35:])
    symbols = np.bincount(targets[:, 35:].ravel() - 1, minlength=14)
    assert abs(chi_square(symbols, np.full(14, N * 5 / 14))) < 5
    assert abs(chi_square(shown.sum(0), np.full(35, N * 5 / 35))) < 5


def test_the_papers_size_and_plain_copying():
    batch = SelectiveCopying(seq_len=4128).source("test").batch(np.arange(4))
    assert batch["tokens"].shape == (4, 4128)
    assert ((batch["tokens"][:, :4112] > 0).sum(1) == 16).all()
    plain = SelectiveCopying(seq_len=40, num_tokens=5, selective=False)
    batch = plain.source("train").batch(np.arange(50))
    np.testing.assert_array_equal(batch["tokens"][:, :5], batch["targets"][:, 35:])
    assert (batch["tokens"][:, 5:35] == 0).all()


def test_induction_heads_by_their_law(chi_square):
    data = InductionHeads(seq_len=20)
    batch = data.source("train").batch(np.arange(N))
    tokens, targets = batch["tokens"], batch["targets"]
    marker = tokens == 15
    assert (marker.sum(1) == 2).all() and marker[:, -1].all()
    place = marker.argmax(1)
    np.testing.assert_array_equal(targets[:, -1], tokens[np.arange(N), place + 1])
    assert (targets[:, :-1] == IGNORE).all()
    assert abs(chi_square(np.bincount(place, minlength=18), np.full(18, N / 18))) < 5
    assert abs(chi_square(np.bincount(targets[:, -1], minlength=15), np.full(15, N / 15))) < 5


def test_induction_heads_are_tested_at_every_length_as_a_group():
    data = InductionHeads(seq_len=32, test_lengths=[8, 64], test_samples=6, valid_samples=3)
    assert data.group_names == ("len_32", "len_8", "len_64")
    found = [
        (batch["tokens"].shape, set(batch["group"].tolist()))
        for batch in pipeline.eval_batches(data, "test", batch_size=6)
    ]
    assert found == [((6, 8), {1}), ((6, 64), {2})]
    (batch,) = pipeline.eval_batches(data, "valid", batch_size=3)
    assert batch["tokens"].shape == (3, 32) and set(batch["group"].tolist()) == {0}
    assert InductionHeads(test_lengths=None).test_lengths == (256,)
    assert hash(data) == hash(
        InductionHeads(seq_len=32, test_lengths=(8, 64), test_samples=6, valid_samples=3)
    )


def test_associative_recall_by_its_law(chi_square):
    data = AssociativeRecall(vocab_size=10, seq_len=14, train_samples=None)
    batch = data.source("train").batch(np.arange(N))
    tokens, targets = batch["tokens"], batch["targets"]
    keys, values = tokens[:, 0:12:2], tokens[:, 1:12:2]
    assert keys.min() == 0 and keys.max() == 3 and values.min() == 4 and values.max() == 7
    assert (tokens[:, 12] == 9).all()
    np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])
    seen = keys == tokens[:, 13:]
    assert seen.any(1).all()
    # One value per key and row, and the answer is that of the key that is asked.
    assert (values == targets[:, -1:])[seen].all()
    for symbols, first in ((keys[:, 2], 0), (values[:, 2], 4), (tokens[:, 13], 0)):
        counts = np.bincount(symbols - first, minlength=4)
        assert abs(chi_square(counts, np.full(4, N / 4))) < 5
    # Among the keys seen each is asked alike, however often it occurred.
    often = np.array([(keys == key).sum(1) for key in range(4)]).T
    lopsided = (often == 5).any(1) & ((often == 1).sum(1) == 1)
    rare = (often == 1)[np.arange(N), tokens[:, 13]][lopsided]
    assert abs(rare.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(rare))


def test_associative_recall_asks_only_the_answer_outside_training():
    for source in (
        AssociativeRecall().source("test"),
        AssociativeRecall(train_targets="last").source("train"),
    ):
        targets = source.batch(np.arange(8))["targets"]
        assert (targets[:, :-1] == IGNORE).all() and (targets[:, -1] != IGNORE).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveCopying(vocab_size=2), "data.vocab_size=2 is too small"),
        (lambda: SelectiveCopying(seq_len=31), "data.seq_len=31.*at least 2 \\* num_tokens = 32"),
        (lambda: SelectiveCopying(num_tokens=0), "data.num_tokens=0"),
        (lambda: InductionHeads(vocab_size=2), "data.vocab_size=2 is too small"),
        (lambda: InductionHeads(seq_len=2), "data.seq_len=2"),
        (lambda: InductionHeads(test_lengths=[64, 2]), "data.test_lengths=2"),
        (lambda: AssociativeRecall(vocab_size=3), "data.vocab_size=3 is too small"),
        (lambda: AssociativeRecall(seq_len=41), "data.seq_len=41"),
        (lambda: AssociativeRecall(train_targets="some"), "data.train_targets=some"),
        (lambda: AssociativeRecall(valid_samples=0), "data.valid_samples=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
