"""The counter hash: its laws, and that a row depends on its own key alone."""

import itertools

import numpy as np
import pytest

from seqzoo.data import counter

ROWS = np.arange(40_000)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 256, 1000])
def test_integers_are_uniform(n, chi_square):
    drawn = counter.integers(counter.keys(0, ROWS), 1, 5, n)
    assert drawn.dtype == np.int32 and drawn.min() >= 0 and drawn.max() == n - 1
    if n > 1:
        for slot in range(5):
            counts = np.bincount(drawn[:, slot], minlength=n)
            assert abs(chi_square(counts, np.full(n, len(ROWS) / n))) < 5


def test_slots_rows_purposes_seeds_and_streams_are_independent(chi_square):
    base = counter.integers(counter.keys(0, ROWS), 1, 2, 16)
    others = [
        base[:, 1],
        np.roll(base[:, 0], 1),
        counter.integers(counter.keys(0, ROWS), 2, 1, 16)[:, 0],
        counter.integers(counter.keys(1, ROWS), 1, 1, 16)[:, 0],
        counter.integers(counter.keys(0, ROWS, stream=1), 1, 1, 16)[:, 0],
        counter.integers(counter.keys(0, ROWS + 2**40), 1, 1, 16)[:, 0],
    ]
    for other in others:
        counts = np.bincount(base[:, 0] * 16 + other, minlength=256)
        assert abs(chi_square(counts, np.full(256, len(ROWS) / 256))) < 5


@pytest.mark.parametrize(("n", "count"), [(5, 3), (13, 3)], ids=["dense", "sparse"])
def test_every_ordered_choice_of_distinct_integers_is_equally_likely(n, count, chi_square):
    drawn = counter.distinct(counter.keys(3, np.arange(200_000)), 1, count, n)
    code = (drawn.astype(int) * n ** np.arange(count)).sum(1)
    possible = [
        sum(value * n**place for place, value in enumerate(choice))
        for choice in itertools.permutations(range(n), count)
    ]
    counts = np.bincount(code, minlength=n**count)
    assert counts.sum() == counts[possible].sum()
    assert abs(chi_square(counts[possible], np.full(len(possible), 200_000 / len(possible)))) < 5


def test_weighted_order_is_drawing_without_replacement(chi_square):
    weights = np.array([4.0, 2.0, 1.0, 0.5])
    drawn = counter.weighted_order(counter.keys(5, np.arange(200_000)), 1, 4, weights)
    orders = list(itertools.permutations(range(4)))
    counts = [(drawn == order).all(1).sum() for order in orders]
    expected = []
    for order in orders:
        chance, left = 1.0, weights.sum()
        for place in order:
            chance *= weights[place] / left
            left -= weights[place]
        expected.append(200_000 * chance)
    assert abs(chi_square(counts, expected)) < 5
    # The first few alone come out the same as the head of the whole order.
    few = counter.weighted_order(counter.keys(5, np.arange(1000)), 1, 1, weights)
    np.testing.assert_array_equal(few[:, 0], drawn[:1000, 0])


@pytest.mark.parametrize(("count", "n"), [(4, 5), (64, 4095), (4, 4095), (7, 7), (1, 1)])
def test_a_row_does_not_depend_on_the_rows_beside_it(count, n):
    key = counter.keys(9, np.arange(300))
    together = counter.distinct(key, 1, count, n)
    apart = np.concatenate(
        [
            counter.distinct(key[rows], 1, count, n)
            for rows in (slice(0, 1), slice(1, 100), slice(100, 300))
        ]
    )
    np.testing.assert_array_equal(together, apart)
    assert (np.diff(np.sort(together, axis=1), axis=1) > 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1000])
def test_permute_maps_numbers_onto_themselves(n):
    orders = [counter.permute(np.arange(n), n, seed=1, stream=stream) for stream in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    if n >= 64:
        assert (orders[0] != orders[1]).mean() > 0.9
        # A window of the permutation, without the rest.
        np.testing.assert_array_equal(
            counter.permute(np.arange(10, 20), n, seed=1), orders[0][10:20]
        )


def test_permute_reaches_every_place_equally_often(chi_square):
    n, epochs = 20, 4000
    first = [counter.permute(np.array([3]), n, seed=0, stream=epoch)[0] for epoch in range(epochs)]
    assert abs(chi_square(np.bincount(first, minlength=n), np.full(n, epochs / n))) < 5


def test_more_distinct_integers_than_there_are_is_refused():
    with pytest.raises(ValueError, match="5 different integers out of 4"):
        counter.distinct(counter.keys(0, ROWS[:2]), 1, 5, 4)
