"""MQAR: the law of benchmarks.md, the same structure as the original's samples, bad settings."""

import numpy as np
import pytest

from seqzoo.data import IGNORE, MQAR, MQARSegments, pipeline
from seqzoo.errors import ConfigError


def places_of(tokens, targets, vocab_size, pairs):
    """Checks what is true of every row, and returns the slot of each pair, [b, pairs]."""
    half, context = vocab_size // 2, 2 * pairs
    keys, values = tokens[:, 0:context:2], tokens[:, 1:context:2]
    assert keys.min() >= 1 and keys.max() < half
    assert values.min() >= half and values.max() < vocab_size
    for words in (keys, values):
        assert (np.diff(np.sort(words, axis=1), axis=1) > 0).all()
    assert tokens.min() >= 0 and tokens.max() < vocab_size
    asked = targets != IGNORE
    assert (asked.sum(1) == pairs).all()
    assert not asked[:, :context].any()
    row, place = np.nonzero(asked)
    assert ((place - context) % 2 == 0).all()
    slots = np.empty(keys.shape, int)
    found = tokens[row, place][:, None] == keys[row]
    assert (found.sum(1) == 1).all()
    pair = found.argmax(1)
    np.testing.assert_array_equal(targets[row, place], values[row, pair])
    slots[row, pair] = (place - context) // 2
    return slots


def odds(seq_len, pairs, power=0.01):
    weights = np.arange(1, (seq_len - 2 * pairs) // 2 + 1) ** (power - 1.0)
    return weights / weights.sum()


CASES = {
    "mqar_v128_L64_kv4": dict(vocab_size=128, seq_len=64, num_kv_pairs=4),
    "mqar_v8192_L128_kv8": dict(vocab_size=8192, seq_len=128, num_kv_pairs=8),
    "mqar_norandom_L64_kv8": dict(
        vocab_size=256, seq_len=64, num_kv_pairs=8, random_non_queries=False
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_built_as_those_of_the_original(name, golden):
    settings = CASES[name]
    theirs = golden(f"based/{name}")
    tokens, targets = theirs["out.inputs"].astype(int), theirs["out.labels"].astype(int)
    batch = MQAR(**settings).source("train").batch(np.arange(len(tokens)))
    assert batch["tokens"].shape == tokens.shape
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    vocab_size, pairs = settings["vocab_size"], settings["num_kv_pairs"]
    their_slots = places_of(tokens, targets, vocab_size, pairs)
    our_slots = places_of(batch["tokens"], batch["targets"], vocab_size, pairs)
    # The same mean slot of the first and of the last pair, within the noise of so few rows.
    for pair in (0, -1):
        ours, theirs_ = our_slots[:, pair], their_slots[:, pair]
        error = np.sqrt((ours.var() + theirs_.var()) / len(ours))
        assert abs(ours.mean() - theirs_.mean()) < 4 * error
    if not settings.get("random_non_queries", True):
        asked = batch["targets"] != IGNORE
        rest = batch["tokens"][:, 2 * pairs :][~asked[:, 2 * pairs :]]
        assert (rest == 0).all()
        assert (tokens[:, 2 * pairs :][targets[:, 2 * pairs :] == IGNORE] == 0).all()


def test_gaps_keys_values_and_noise_follow_the_law(chi_square):
    n, pairs = 60_000, 4
    batch = MQAR(vocab_size=64, seq_len=64, num_kv_pairs=pairs).source("train").batch(np.arange(n))
    tokens, targets = batch["tokens"], batch["targets"]
    slots = places_of(tokens, targets, 64, pairs)
    p = odds(64, pairs)
    second = np.array([(p * p[i] / (1 - p))[np.arange(len(p)) != i].sum() for i in range(len(p))])
    assert abs(chi_square(np.bincount(slots[:, 0], minlength=len(p)), n * p)) < 5
    assert abs(chi_square(np.bincount(slots[:, 1], minlength=len(p)), n * second)) < 5
    for pair in (0, 3):
        keys = np.bincount(tokens[:, 2 * pair] - 1, minlength=31)
        values = np.bincount(tokens[:, 2 * pair + 1] - 32, minlength=32)
        assert abs(chi_square(keys, np.full(31, n / 31))) < 5
        assert abs(chi_square(values, np.full(32, n / 32))) < 5
    noise = tokens[:, 9]  # odd places behind the context hold noise only
    assert abs(chi_square(np.bincount(noise, minlength=64), np.full(64, n / 64))) < 5


def test_full_rows_and_power_one(chi_square):
    data = MQAR(vocab_size=512, seq_len=256, num_kv_pairs=64, power_a=1.0)
    batch = data.source("test").batch(np.arange(2000))
    slots = places_of(batch["tokens"], batch["targets"], 512, 64)
    np.testing.assert_array_equal(np.sort(slots, axis=1), np.tile(np.arange(64), (2000, 1)))
    assert abs(chi_square(np.bincount(slots[:, 0], minlength=64), np.full(64, 2000 / 64))) < 5


def test_rows_are_a_function_of_seed_split_and_number():
    data = MQAR()
    whole = data.source("train").batch(np.arange(700))["tokens"]
    np.testing.assert_array_equal(
        data.source("train").batch(np.array([699, 3]))["tokens"], whole[[699, 3]]
    )
    for other in (
        data.source("valid").batch(np.arange(10)),
        data.source("test").batch(np.arange(10)),
        MQAR(seed=1).source("train").batch(np.arange(10)),
    ):
        assert not (other["tokens"][:, None] == whole[None]).all(-1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(seq_len=63), "data.seq_len=63.*even"),
        (dict(seq_len=12), "at least 4 \\* num_kv_pairs = 16"),
        (dict(vocab_size=8), "data.vocab_size=8 is too small.*at least 10"),
        (dict(num_kv_pairs=0), "data.num_kv_pairs=0"),
        (dict(power_a=-1.0), "data.power_a=-1.0"),
        (dict(test_samples=0), "data.test_samples=0"),
        (dict(train_samples=0), "data.train_samples=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MQAR(**settings)


def test_the_smallest_vocabulary_works():
    batch = MQAR(vocab_size=10).source("train").batch(np.arange(50))
    places_of(batch["tokens"], batch["targets"], 10, 4)


SEGMENTS = dict(
    vocab_size=256, train=[[32, 2, 40], [64, 4, 20]], test=[[32, 2, 10], [128, 4, 6]], block=8
)


def test_segments_keep_their_lengths_and_a_batch_comes_from_one():
    data = MQARSegments(**SEGMENTS)
    assert data.seq_len == 128
    source = data.source("train")
    assert len(source) == 40 + 16  # what does not fill a block is left out
    seen = {}
    for step, batch in pipeline.batches(data, "train", global_batch_size=4, stop_step=28):
        names = {data.group_names[group] for group in batch["group"]}
        pairs = {32: 2, 64: 4}[batch["tokens"].shape[1]]
        assert names == {f"len_{batch['tokens'].shape[1]}_pairs_{pairs}"}
        places_of(batch["tokens"], batch["targets"], 256, pairs)
        index = source.order(np.arange(step * 4, step * 4 + 4))
        for number in index % 56:
            seen[number] = seen.get(number, 0) + 1
    assert set(seen) == set(range(56)) and set(seen.values()) == {2}


def test_orders_of_segments():
    listed = MQARSegments(**SEGMENTS, order="zoology").source("train")
    place = np.arange(56 * 2)
    np.testing.assert_array_equal(listed.order(place) % 56, place % 56)
    shuffled = MQARSegments(**SEGMENTS).source("train").order(place)
    first, second = shuffled[:56] % 56, shuffled[56:] % 56
    assert (first != second).any()
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(56))
        blocks = epoch.reshape(7, 8)
        np.testing.assert_array_equal(blocks - blocks[:, :1], np.tile(np.arange(8), (7, 1)))


def test_every_test_segment_is_evaluated_whole_with_its_own_shape():
    data = MQARSegments(**SEGMENTS)
    asked, shapes = {}, []
    for batch in pipeline.eval_batches(data, "test", batch_size=4):
        shapes.append(batch["tokens"].shape)
        counted = (batch["targets"] != IGNORE).any(1)
        for group in batch["group"][counted]:
            asked[data.group_names[group]] = asked.get(data.group_names[group], 0) + 1
    assert asked == {"len_32_pairs_2": 10, "len_128_pairs_4": 6}
    assert shapes == [(4, 32)] * 3 + [(4, 128)] * 2
    few = pipeline.eval_batches(data, "test", batch_size=4, max_samples=8)
    assert sum((batch["targets"] != IGNORE).any(1).sum() for batch in few) == 5 + 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(order="random"), "data.order=random"),
        (dict(block=32), "fewer samples than data.block=32"),
        (dict(test=[[31, 2, 5]]), "data.seq_len=31"),
        (dict(train=[]), "data.train is empty"),
        (dict(vocab_size=4), "data.vocab_size=4"),
    ],
)
def test_segments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        MQARSegments(**{**SEGMENTS, **change})


def test_a_batch_that_does_not_divide_the_block_is_refused():
    with pytest.raises(ConfigError, match="global_batch_size=3 does not divide data.block=8"):
        pipeline.batches(MQARSegments(**SEGMENTS), "train", global_batch_size=3)
    with pytest.raises(ValueError, match="different shapes"):
        MQARSegments(**SEGMENTS).source("train").batch(np.array([39, 40]))
